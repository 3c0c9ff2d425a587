/* Gumbel noise from the counter-based generator Philox4x32-10; the definition is in reference.py. */
#ifndef SLIMSERVE_SAMPLING_H
#define SLIMSERVE_SAMPLING_H

#include "vectors.h"

#define TASK_COUNTERS 1024 /* counters, of four words each, in one task */

typedef uint64_t wide __attribute__((vector_size(2 * VECTOR_BYTES)));

INLINE void philox(uvec counter[4], uint32_t key_low, uint32_t key_high) {
    for (int round = 0; round < 10; round++) {
        wide product_0 = __builtin_convertvector(counter[0], wide) * 0xD2511F53u;
        wide product_1 = __builtin_convertvector(counter[2], wide) * 0xCD9E8D57u;
        counter[0] = __builtin_convertvector(product_1 >> 32, uvec) ^ counter[1] ^ key_low;
        counter[2] = __builtin_convertvector(product_0 >> 32, uvec) ^ counter[3] ^ key_high;
        counter[1] = __builtin_convertvector(product_1, uvec);
        counter[3] = __builtin_convertvector(product_0, uvec);
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
}

/* u = (word's upper 24 bits + 1/2) / 2**24 has 25 significant bits. Near 1, where float32 cannot hold it, 1 - u can. */
INLINE vec gumbel_of(uvec word) {
    ivec upper = (ivec)(word >> 8);
    const float unit = 1.0f / 16777216.0f;
    vec u = (__builtin_convertvector(upper, vec) + 0.5f) * unit;
    vec below_one = (__builtin_convertvector(16777215 - upper, vec) + 0.5f) * unit;
    /* The largest u round to 1, whose logarithm would take the other branch: keep them in [1/2, 1). */
    u = choose(u >= splat(1.0f), splat(0.99999994f), u);
    vec inner = -log_vec(choose(u > splat(0.70710678f), splat(1.0f), u), below_one);
    return -log_vec(inner, 1.0f - inner);
}

static void gumbel_task(const void *context, int64_t item, int worker) {
    (void)worker;
    const GumbelCall *call = context;
    int64_t groups = (call->vocab + 3) / 4, tasks = (groups + TASK_COUNTERS - 1) / TASK_COUNTERS;
    int64_t row = item / tasks, first = item % tasks * TASK_COUNTERS;
    int64_t last = first + TASK_COUNTERS < groups ? first + TASK_COUNTERS : groups;
    uint64_t seed = (uint64_t)call->seeds[row];
    float *out = call->out + row * call->vocab;
    for (int64_t group = first; group < last; group += VECTOR_LANES) {
        uvec words[4] = {(uvec){IOTA} + (uint32_t)group, (uvec){0} + (uint32_t)call->positions[row],
                         (uvec){0} + (uint32_t)call->choices[row], (uvec){0}};
        philox(words, (uint32_t)seed, (uint32_t)(seed >> 32));
        vec noise[4];
        for (int lane = 0; lane < 4; lane++) noise[lane] = gumbel_of(words[lane]);
        /* Counter by counter: 0 1 2 3 of the first, 0 1 2 3 of the second, ... */
        vec even_low = SHUFFLE(noise[0], noise[2], ZIP_LOW), even_high = SHUFFLE(noise[0], noise[2], ZIP_HIGH);
        vec odd_low = SHUFFLE(noise[1], noise[3], ZIP_LOW), odd_high = SHUFFLE(noise[1], noise[3], ZIP_HIGH);
        vec ordered[4] = {SHUFFLE(even_low, odd_low, ZIP_LOW), SHUFFLE(even_low, odd_low, ZIP_HIGH),
                          SHUFFLE(even_high, odd_high, ZIP_LOW), SHUFFLE(even_high, odd_high, ZIP_HIGH)};
        int64_t at = 4 * group, count = call->vocab - at;
        if (count > 4 * VECTOR_LANES) count = 4 * VECTOR_LANES;
        if (4 * last - at < count) count = 4 * last - at;
        __builtin_memcpy(out + at, ordered, (size_t)count * sizeof(float));
    }
}

static void gumbel(const GumbelCall *call) {
    int64_t groups = (call->vocab + 3) / 4, tasks = (groups + TASK_COUNTERS - 1) / TASK_COUNTERS;
    slim_parallel_for(call->rows * tasks, call->threads, gumbel_task, call, sizeof(*call));
}

/* The first of the largest values; 0 where all are not numbers. */
static void argmax_row(const void *context, int64_t row, int worker) {
    (void)worker;
    const ArgmaxCall *call = context;
    const float *values = call->values + row * call->stride;
    const ivec lane = {IOTA};
    int64_t i = 0;
    vec best = splat(-__builtin_inff());
    ivec places = {0}, at = lane;
    for (; i + VECTOR_LANES <= call->width; i += VECTOR_LANES, at += VECTOR_LANES) {
        vec part = load(values + i);
        ivec larger = part > best;
        best = choose(larger, part, best);
        places = (larger & at) | (~larger & places);
    }
    float top = max_lanes(best);
    int64_t place = INT32_MAX;
    for (int k = 0; k < VECTOR_LANES; k++)
        if (best[k] == top && places[k] < place) place = places[k];
    for (; i < call->width; i++) {
        if (values[i] <= top || values[i] != values[i]) continue;
        top = values[i];
        place = i;
    }
    call->out[row] = place;
}

static void argmax(const ArgmaxCall *call) {
    slim_parallel_for(call->rows, call->threads, argmax_row, call, sizeof(*call));
}

#endif
