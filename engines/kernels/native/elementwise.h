/* Norms, activation, rotary embedding, cache writes and lines of the embedding. Each row's result depends on that row alone. */
#ifndef SLIMSERVE_ELEMENTWISE_H
#define SLIMSERVE_ELEMENTWISE_H

#include "vectors.h"

#define TASK_ELEMENTS 8192 /* less work than this is not worth another thread */

INLINE int64_t rows_per_task(int64_t width) {
    return width < TASK_ELEMENTS ? TASK_ELEMENTS / width : 1;
}

/* Runs ``body`` over rows in tasks of a worthwhile size. */
INLINE void for_row_groups(int64_t rows, int64_t width, int threads, TaskBody body, const void *call, size_t bytes) {
    int64_t group = rows_per_task(width);
    slim_parallel_for((rows + group - 1) / group, threads, body, call, bytes);
}

INLINE void norm_row(int type, const NormCall *call, int64_t row) {
    const int64_t width = call->width, whole = width - width % VECTOR_LANES, rest = width - whole, to = row * width;
    const void *x = call->x;
    int64_t from = row / call->inner * call->outer_stride + row % call->inner * call->inner_stride;
    vec squares = {0};
    for (int64_t i = 0; i < whole; i += VECTOR_LANES) {
        vec part = load_as(type, x, from + i);
        squares += part * part;
    }
    if (rest) {
        vec part = load_part(type, x, from + whole, rest);
        squares += part * part;
    }
    float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)width + call->eps);
    for (int64_t i = 0; i < whole; i += VECTOR_LANES)
        store_as(type, call->out, to + i, load_as(type, x, from + i) * scale * load_as(type, call->weight, i));
    if (rest)
        store_part(type, call->out, to + whole,
                   load_part(type, x, from + whole, rest) * scale * load_part(type, call->weight, whole, rest), rest);
}

static void norm_group(const void *context, int64_t item, int worker) {
    (void)worker;
    const NormCall *call = context;
    int64_t group = rows_per_task(call->width), rows = call->outer * call->inner;
    for (int64_t row = item * group; row < (item + 1) * group && row < rows; row++) {
        if (call->type == BFLOAT16) norm_row(BFLOAT16, call, row);
        else norm_row(FLOAT32, call, row);
    }
}

static void norm(const NormCall *call) {
    for_row_groups(call->outer * call->inner, call->width, call->threads, norm_group, call, sizeof(*call));
}

INLINE vec silu_times(vec gate, vec up) {
    return gate / (1.0f + exp_vec(-gate)) * up;
}

INLINE void silu_row(int type, const SiluCall *call, int64_t row) {
    const int64_t width = call->width, whole = width - width % VECTOR_LANES, rest = width - whole, to = row * width;
    const int64_t gate = row * call->stride, up = gate + width;
    for (int64_t i = 0; i < whole; i += VECTOR_LANES) {
        vec result = silu_times(load_as(type, call->gate_up, gate + i), load_as(type, call->gate_up, up + i));
        store_as(type, call->out, to + i, result);
    }
    if (rest) {
        vec result = silu_times(load_part(type, call->gate_up, gate + whole, rest),
                                load_part(type, call->gate_up, up + whole, rest));
        store_part(type, call->out, to + whole, result, rest);
    }
}

static void silu_group(const void *context, int64_t item, int worker) {
    (void)worker;
    const SiluCall *call = context;
    int64_t group = rows_per_task(call->width);
    for (int64_t row = item * group; row < (item + 1) * group && row < call->rows; row++) {
        if (call->type == BFLOAT16) silu_row(BFLOAT16, call, row);
        else silu_row(FLOAT32, call, row);
    }
}

static void silu_mul(const SiluCall *call) {
    for_row_groups(call->rows, call->width, call->threads, silu_group, call, sizeof(*call));
}

INLINE void rotate_halves(int type, void *heads, int64_t at, const float *cosines, const float *sines, int64_t half) {
    int64_t i = 0;
    for (; i + VECTOR_LANES <= half; i += VECTOR_LANES) {
        vec left = load_as(type, heads, at + i), right = load_as(type, heads, at + half + i);
        vec cosine = load(cosines + i), sine = load(sines + i);
        store_as(type, heads, at + i, left * cosine - right * sine);
        store_as(type, heads, at + half + i, right * cosine + left * sine);
    }
    if (i < half) {
        int64_t rest = half - i;
        vec left = load_part(type, heads, at + i, rest), right = load_part(type, heads, at + half + i, rest);
        vec cosine = load_part(FLOAT32, cosines, i, rest), sine = load_part(FLOAT32, sines, i, rest);
        store_part(type, heads, at + i, left * cosine - right * sine, rest);
        store_part(type, heads, at + half + i, right * cosine + left * sine, rest);
    }
}

INLINE void rotate_pairs(int type, void *heads, int64_t at, const float *cosines, const float *sines, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        vec pair = load_part(type, heads, at + 2 * i, 2), turned = pair;
        turned[0] = pair[0] * cosines[i] - pair[1] * sines[i];
        turned[1] = pair[1] * cosines[i] + pair[0] * sines[i];
        store_part(type, heads, at + 2 * i, turned, 2);
    }
}

INLINE void rope_token(int type, const RopeCall *call, int64_t token) {
    const int64_t half = call->rope_dim / 2;
    const float *cosines = call->cos_sin + call->positions[token] * call->rope_dim;
    for (int side = 0; side < 2; side++) {
        for (int64_t head = 0; head < call->head_count[side]; head++) {
            int64_t at = token * call->token_stride[side] + head * call->head_stride[side];
            if (call->interleaved) rotate_pairs(type, call->heads[side], at, cosines, cosines + half, half);
            else rotate_halves(type, call->heads[side], at, cosines, cosines + half, half);
        }
    }
}

INLINE int64_t rope_width(const RopeCall *call) {
    return (call->head_count[0] + call->head_count[1]) * call->rope_dim;
}

static void rope_group(const void *context, int64_t item, int worker) {
    (void)worker;
    const RopeCall *call = context;
    int64_t group = rows_per_task(rope_width(call));
    for (int64_t token = item * group; token < (item + 1) * group && token < call->tokens; token++) {
        if (call->type == BFLOAT16) rope_token(BFLOAT16, call, token);
        else rope_token(FLOAT32, call, token);
    }
}

static void rope(const RopeCall *call) {
    for_row_groups(call->tokens, rope_width(call), call->threads, rope_group, call, sizeof(*call));
}

INLINE void convert_row(int from_type, const void *source, int64_t from, int to_type, void *target, int64_t to,
                        int64_t width) {
    int64_t i = 0;
    for (; i + VECTOR_LANES <= width; i += VECTOR_LANES)
        store_as(to_type, target, to + i, load_as(from_type, source, from + i));
    if (i < width) store_part(to_type, target, to + i, load_part(from_type, source, from + i, width - i), width - i);
}

static void write_entries(const void *context, int64_t item, int worker) {
    (void)worker;
    const CacheWriteCall *call = context;
    const int64_t width = call->width, group = rows_per_task(call->heads * width);
    for (int64_t token = item * group; token < (item + 1) * group && token < call->tokens; token++) {
        for (int64_t head = 0; head < call->heads; head++) {
            int64_t from = token * call->token_stride + head * call->head_stride;
            int64_t to = (call->slots[token] * call->heads + head) * width;
            if (call->entry_type == FLOAT32 && call->cache_type == FLOAT32)
                convert_row(FLOAT32, call->entries, from, FLOAT32, call->cache, to, width);
            else if (call->entry_type == FLOAT32)
                convert_row(FLOAT32, call->entries, from, BFLOAT16, call->cache, to, width);
            else if (call->cache_type == FLOAT32)
                convert_row(BFLOAT16, call->entries, from, FLOAT32, call->cache, to, width);
            else convert_row(BFLOAT16, call->entries, from, BFLOAT16, call->cache, to, width);
        }
    }
}

static void write_cache(const CacheWriteCall *call) {
    for_row_groups(call->tokens, call->heads * call->width, call->threads, write_entries, call, sizeof(*call));
}

/* One token's line of a table of codes. An id that the table does not have gives zeros. */
INLINE void embed_token(int type, const EmbedCall *call, int64_t token) {
    const int64_t width = call->width, group = width / call->groups, line = call->ids[token];
    const int known = line >= 0 && line < call->lines;
    for (int64_t g = 0; g < call->groups; g++) {
        const float scale = known ? call->scale[line * call->groups + g] : 0.0f;
        for (int64_t i = 0; i < group; i += VECTOR_LANES) {
            const int64_t at = g * group + i, count = group - i < VECTOR_LANES ? group - i : VECTOR_LANES;
            codevec codes = {0};
            if (known && count == VECTOR_LANES) __builtin_memcpy(&codes, call->codes + line * width + at, sizeof(codes));
            else if (known) __builtin_memcpy(&codes, call->codes + line * width + at, (size_t)count);
            vec values = __builtin_convertvector(__builtin_convertvector(codes, ivec) - call->zero_point, vec) * scale;
            if (count == VECTOR_LANES) store_as(type, call->out, token * width + at, values);
            else store_part(type, call->out, token * width + at, values, count);
        }
    }
}

static void embed_group(const void *context, int64_t item, int worker) {
    (void)worker;
    const EmbedCall *call = context;
    const int64_t group = rows_per_task(call->width);
    for (int64_t token = item * group; token < (item + 1) * group && token < call->tokens; token++) {
        if (call->type == BFLOAT16) embed_token(BFLOAT16, call, token);
        else embed_token(FLOAT32, call, token);
    }
}

static void embed(const EmbedCall *call) {
    for_row_groups(call->tokens, call->width, call->threads, embed_group, call, sizeof(*call));
}

#endif
