/* Products with quantized weights, and what stands before and after them: norm, bias, gating, residual.
 *
 * Activations are rounded to 8 bits, one scale for each block of a row's features (or for the whole row); weights are
 * unsigned codes. Inside a block everything is exact integer arithmetic; the blocks' sums are added in order, in
 * float32. So a row's result is the same bits whatever the other rows are and however the work is split.
 *
 * Codes are panels of PANEL_WIDTH output columns, (depth / 4, PANEL_WIDTH, 4) bytes each, or (depth / 8, PANEL_WIDTH,
 * 4) where a byte holds two codes: that of feature 8 i + j in its lower half, that of 8 i + 4 + j in its upper one.
 * Rounded rows lie in tiles of QUANTIZED_ROWS, (depth / 4, QUANTIZED_ROWS) words of four features each. */
#ifndef SLIMSERVE_QUANTIZED_H
#define SLIMSERVE_QUANTIZED_H

#include "dot.h"
#include "elementwise.h"
#include "gemm.h"

#define LARGEST_CODE 127.0f
#define ROUND_ELEMENTS 4096 /* features of one task of rounding: less is not worth another thread */

/* The call's rounded rows in its workspace. */
typedef struct {
    int32_t *words;  /* (tiles, depth / 4, QUANTIZED_ROWS, DOT_WORDS) */
    int32_t *starts; /* (tiles, blocks, QUANTIZED_ROWS): what the integer sums of a block begin with */
    float *scales;   /* the same shape: value of one step of a block's codes */
    float *shares;   /* the same shape: sum of a block's rounded features */
    float *features; /* (threads, depth): a row before it is rounded */
    int8_t *rounded; /* (threads, depth) */
} RoundedRows;

typedef struct {
    QuantizedCall call;
    RoundedRows rows;
    int64_t blocks, tiles;
} QuantizedPlan;

INLINE int64_t quantized_tiles(int64_t rows) {
    return (rows + QUANTIZED_ROWS - 1) / QUANTIZED_ROWS;
}

/* Lays out the workspace from ``memory`` on; returns its bytes. */
static int64_t lay_out_rows(const QuantizedCall *call, char *memory, RoundedRows *rows) {
    int64_t tiles = quantized_tiles(call->rows), blocks = call->depth / call->block;
    int64_t words = tiles * call->depth / 4 * QUANTIZED_ROWS * DOT_WORDS * 4, sums = tiles * blocks * QUANTIZED_ROWS * 4;
    int64_t at = 0;
    rows->words = (int32_t *)memory;
    at += (words + 63) / 64 * 64;
    rows->starts = (int32_t *)(memory + at);
    at += sums;
    rows->scales = (float *)(memory + at);
    at += sums;
    rows->shares = (float *)(memory + at);
    at += sums;
    rows->features = (float *)(memory + at);
    at += call->threads * call->depth * 4;
    rows->rounded = (int8_t *)(memory + at);
    return at + call->threads * call->depth;
}

/* Row ``row`` of the input, through the norm if there is one, as float32; zero behind its end. Returns 0, or not a
 * number where a feature is none: rounded to codes it could not be told from others. */
INLINE float take_features(int type, const QuantizedCall *call, int64_t row, float *features) {
    const int64_t from = row * call->x_stride, width = call->width, whole = width - width % VECTOR_LANES;
    vec squares = {0}, faults = {0};
    for (int64_t i = 0; i < whole; i += VECTOR_LANES) {
        vec part = load_as(type, call->x, from + i);
        squares += part * part;
        faults += part * 0.0f;
        store(features + i, part);
    }
    for (int64_t i = width; i < call->depth; i++) features[i] = 0;
    if (whole < width) {
        vec part = load_part(type, call->x, from + whole, width - whole);
        squares += part * part;
        faults += part * 0.0f;
        store_part(FLOAT32, features, whole, part, width - whole);
    }
    if (!call->norm_weight) return sum_lanes(faults);
    float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)width + call->eps);
    for (int64_t i = 0; i < whole; i += VECTOR_LANES)
        store(features + i, load(features + i) * scale * load_as(type, call->norm_weight, i));
    if (whole < width) {
        vec weight = load_part(type, call->norm_weight, whole, width - whole);
        vec part = load_part(FLOAT32, features, whole, width - whole) * scale * weight;
        store_part(FLOAT32, features, whole, part, width - whole);
    }
    return sum_lanes(faults);
}

/* Step of the codes that hold ``count`` features: the largest over 127. */
INLINE float code_scale(const float *features, int64_t count) {
    vec largest = {0};
    int64_t i = 0;
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES) largest = maximum(largest, magnitude(load(features + i)));
    if (i < count) largest = maximum(largest, magnitude(load_part(FLOAT32, features, i, count - i)));
    float top = max_lanes(largest);
    return top > 0 ? top / LARGEST_CODE : 1.0f;
}

INLINE ivec round_codes(vec features, float per_step) {
    const float round_bias = 12582912.0f; /* as in exp_vec */
    vec codes = maximum(features * per_step, splat(-LARGEST_CODE));
    codes = choose(codes > splat(LARGEST_CODE), splat(LARGEST_CODE), codes);
    return (ivec)(codes + round_bias) - 0x4b400000;
}

/* Rounds ``count`` features; returns the sum of their codes. */
INLINE int32_t round_block(const float *features, int64_t count, float scale, int8_t *rounded) {
    const float per_step = 1.0f / scale;
    ivec sums = {0};
    int64_t i = 0;
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES) {
        ivec codes = round_codes(load(features + i), per_step);
        bvec bytes = __builtin_convertvector(codes, bvec);
        __builtin_memcpy(rounded + i, &bytes, sizeof(bytes));
        sums += codes;
    }
    if (i < count) {
        ivec codes = round_codes(load_part(FLOAT32, features, i, count - i), per_step);
        bvec bytes = __builtin_convertvector(codes, bvec);
        __builtin_memcpy(rounded + i, &bytes, (size_t)(count - i));
        sums += codes; /* features that were not loaded are 0, and so are their codes */
    }
    return sum_integers(sums);
}

INLINE void round_row(const QuantizedPlan *shared, int64_t row, int worker) {
    /* Copies: the bytes written below could be part of anything that a pointer leads to. */
    const QuantizedPlan plan = *shared;
    const QuantizedCall call = plan.call;
    float *features = plan.rows.features + worker * call.depth;
    int8_t *rounded = plan.rows.rounded + worker * call.depth;
    float fault = call.type == BFLOAT16 ? take_features(BFLOAT16, &call, row, features)
                                        : take_features(FLOAT32, &call, row, features);
    float whole = call.input_scale;
    if (call.per_token && whole == 0) whole = code_scale(features, call.depth);
    const int64_t tile = row / QUANTIZED_ROWS, place = row % QUANTIZED_ROWS, quads = call.depth / 4;
    for (int64_t block = 0; block < plan.blocks; block++) {
        const float *part = features + block * call.block;
        int64_t at = (tile * plan.blocks + block) * QUANTIZED_ROWS + place;
        float scale = call.per_token ? whole : code_scale(part, call.block);
        int32_t sum = round_block(part, call.block, scale, rounded + block * call.block);
        plan.rows.starts[at] = -call.zero_point * sum;
        plan.rows.scales[at] = scale + fault;
        plan.rows.shares[at] = scale * (float)sum;
    }
    int32_t *words = plan.rows.words + (tile * quads * QUANTIZED_ROWS + place) * DOT_WORDS;
    for (int64_t i = 0; i < quads; i++) put_word(rounded + 4 * i, words + i * QUANTIZED_ROWS * DOT_WORDS);
}

INLINE int64_t rows_per_round_task(int64_t width) {
    return width < ROUND_ELEMENTS ? ROUND_ELEMENTS / width : 1;
}

static void round_rows(const void *context, int64_t item, int worker) {
    const QuantizedPlan *plan = context;
    int64_t group = rows_per_round_task(plan->call.width);
    for (int64_t row = item * group; row < (item + 1) * group && row < plan->call.rows; row++) round_row(plan, row, worker);
}

INLINE vec load_scale(const QuantizedCall *call, const void *array, int64_t index) {
    if (call->scale_type == FLOAT16) return widen_half(*(const hvec_at *)((const uint16_t *)array + index));
    return load_as(call->scale_type, array, index);
}

/* One group of four features of all rows times the codes of two vectors of columns. */
INLINE void multiply_words(const int rows, const int32_t *words, ivec low_codes, ivec high_codes, ivec *low, ivec *high) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        low[i] = dot(low[i], low_codes, words + i * DOT_WORDS);
        high[i] = dot(high[i], high_codes, words + i * DOT_WORDS);
    }
}

/* out (rows, PANEL_WIDTH) = one tile of rounded rows . one panel. */
INLINE void quantized_tile(const int rows, const int halves, const int shifted, const QuantizedPlan *plan, int64_t tile,
                           int64_t panel, float *out) {
    const QuantizedCall *call = &plan->call;
    const int64_t block = call->block, groups = call->depth / call->group, per_code = halves ? 2 : 1;
    const uint8_t *codes = call->codes + panel * (call->depth * PANEL_WIDTH / per_code);
    const int32_t *words = plan->rows.words + tile * (call->depth / 4) * QUANTIZED_ROWS * DOT_WORDS;
    const int64_t sums = tile * plan->blocks * QUANTIZED_ROWS;
    vec low_total[QUANTIZED_ROWS], high_total[QUANTIZED_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) low_total[i] = high_total[i] = (vec){0};
    for (int64_t b = 0; b < plan->blocks; b++) {
        const int64_t at = sums + b * QUANTIZED_ROWS;
        ivec low[QUANTIZED_ROWS], high[QUANTIZED_ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
            low[i] = high[i] = shifted ? (ivec){0} : (ivec){0} + plan->rows.starts[at + i];
        for (int64_t k = 0; k < block; k += 4 * per_code) {
            ivec first = load_codes(codes), second = load_codes(codes + VECTOR_BYTES);
            if (halves) {
                multiply_words(rows, words, first & 0x0f0f0f0f, second & 0x0f0f0f0f, low, high);
                words += QUANTIZED_ROWS * DOT_WORDS;
                first = (ivec)((uvec)first >> 4) & 0x0f0f0f0f;
                second = (ivec)((uvec)second >> 4) & 0x0f0f0f0f;
            }
            multiply_words(rows, words, first, second, low, high);
            words += QUANTIZED_ROWS * DOT_WORDS;
            codes += 2 * VECTOR_BYTES;
        }
        const int64_t column = (panel * groups + b * block / call->group) * PANEL_WIDTH;
        vec low_scale = load_scale(call, call->scale, column);
        vec high_scale = load_scale(call, call->scale, column + VECTOR_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            float step = plan->rows.scales[at + i];
            low_total[i] += __builtin_convertvector(low[i], vec) * (low_scale * step);
            high_total[i] += __builtin_convertvector(high[i], vec) * (high_scale * step);
        }
        if (!shifted) continue;
        vec low_offset = load_scale(call, call->offset, column);
        vec high_offset = load_scale(call, call->offset, column + VECTOR_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            float share = plan->rows.shares[at + i];
            low_total[i] += low_offset * share;
            high_total[i] += high_offset * share;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        store(out + i * PANEL_WIDTH, low_total[i]);
        store(out + i * PANEL_WIDTH + VECTOR_LANES, high_total[i]);
    }
}

#if QUANTIZED_ROWS == 12
#define FOR_EACH_QUANTIZED_ROWS(CASE) \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define FOR_EACH_QUANTIZED_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif

#define DEFINE_TILES(name, halves, shifted)                                                                      \
    static void name(int rows, const QuantizedPlan *plan, int64_t tile, int64_t panel, float *out) {             \
        switch (rows) { FOR_EACH_QUANTIZED_ROWS(CASE_##name) }                                                   \
    }
#define CASE_byte_tile(n) case n: quantized_tile(n, 0, 0, plan, tile, panel, out); break;
#define CASE_byte_tile_shifted(n) case n: quantized_tile(n, 0, 1, plan, tile, panel, out); break;
#define CASE_half_tile(n) case n: quantized_tile(n, 1, 0, plan, tile, panel, out); break;
#define CASE_half_tile_shifted(n) case n: quantized_tile(n, 1, 1, plan, tile, panel, out); break;
DEFINE_TILES(byte_tile, 0, 0)
DEFINE_TILES(byte_tile_shifted, 0, 1)
DEFINE_TILES(half_tile, 1, 0)
DEFINE_TILES(half_tile_shifted, 1, 1)

static void multiply_codes(int rows, const QuantizedPlan *plan, int64_t tile, int64_t panel, float *out) {
    const QuantizedCall *call = &plan->call;
    if (call->halves && call->offset) half_tile_shifted(rows, plan, tile, panel, out);
    else if (call->halves) half_tile(rows, plan, tile, panel, out);
    else if (call->offset) byte_tile_shifted(rows, plan, tile, panel, out);
    else byte_tile(rows, plan, tile, panel, out);
}

INLINE vec load_some(int type, const void *array, int64_t index, int64_t count) {
    return count >= VECTOR_LANES ? load_as(type, array, index) : load_part(type, array, index, count);
}

/* Writes columns ``column`` .. of one tile: product, bias, gating, residual. */
INLINE void finish_tile(int type, const QuantizedCall *call, int64_t first_row, int rows, int64_t column,
                        const float *values, const float *up) {
    const int64_t width = call->gated ? call->columns / 2 : call->columns;
    for (int part = 0; part < 2 && column + part * VECTOR_LANES < width; part++) {
        const int64_t at = column + part * VECTOR_LANES, count = width - at;
        vec bias = call->bias ? load_some(type, call->bias, at, count) : (vec){0};
        vec up_bias = call->bias && up ? load_some(type, call->bias, width + at, count) : (vec){0};
        for (int i = 0; i < rows; i++) {
            const int64_t inside = i * PANEL_WIDTH + part * VECTOR_LANES, row = first_row + i;
            vec result = load(values + inside) + bias;
            if (up) result = silu_times(result, load(up + inside) + up_bias);
            if (call->residual) result += load_some(type, call->residual, row * call->residual_stride + at, count);
            if (count >= VECTOR_LANES) store_as(call->out_type, call->out, row * width + at, result);
            else store_part(call->out_type, call->out, row * width + at, result, count);
        }
    }
}

static void multiply_quantized(const void *context, int64_t item, int worker) {
    (void)worker;
    const QuantizedPlan *plan = context;
    const QuantizedCall *call = &plan->call;
    const int64_t width = call->gated ? call->columns / 2 : call->columns;
    const int64_t panels = (width + PANEL_WIDTH - 1) / PANEL_WIDTH, panel = item % panels;
    const int64_t first_tile = item / panels * BLOCK_TILES;
    const int64_t last_tile = first_tile + BLOCK_TILES < plan->tiles ? first_tile + BLOCK_TILES : plan->tiles;
    float values[QUANTIZED_ROWS * PANEL_WIDTH], up[QUANTIZED_ROWS * PANEL_WIDTH];
    for (int64_t tile = first_tile; tile < last_tile; tile++) {
        const int64_t first = tile * QUANTIZED_ROWS, left = call->rows - first;
        const int rows = left < QUANTIZED_ROWS ? (int)left : QUANTIZED_ROWS;
        multiply_codes(rows, plan, tile, panel, values);
        if (call->gated) multiply_codes(rows, plan, tile, panel + panels, up);
        if (call->type == BFLOAT16) finish_tile(BFLOAT16, call, first, rows, panel * PANEL_WIDTH, values, call->gated ? up : NULL);
        else finish_tile(FLOAT32, call, first, rows, panel * PANEL_WIDTH, values, call->gated ? up : NULL);
    }
}

static int64_t quantized_linear(const QuantizedCall *call) {
    QuantizedPlan plan = {.call = *call, .blocks = call->depth / call->block, .tiles = quantized_tiles(call->rows)};
    const int64_t needed = lay_out_rows(call, call->workspace, &plan.rows);
    if (needed > call->workspace_bytes) return needed;
    const int64_t width = call->gated ? call->columns / 2 : call->columns;
    const int64_t panels = (width + PANEL_WIDTH - 1) / PANEL_WIDTH, group = rows_per_round_task(call->width);
    slim_parallel_for((call->rows + group - 1) / group, call->threads, round_rows, &plan, sizeof(plan));
    slim_parallel_for((plan.tiles + BLOCK_TILES - 1) / BLOCK_TILES * panels, call->threads, multiply_quantized, &plan, sizeof(plan));
    return 0;
}

#endif
