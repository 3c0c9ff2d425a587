/* Vector types and small functions over them, for the instruction set that the including file has switched on.
 * VECTOR_LANES is 4, 8 or 16. Written with the compilers' portable vector extensions, and intrinsics where these
 * compile to something slow. */
#ifndef SLIMSERVE_VECTORS_H
#define SLIMSERVE_VECTORS_H

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define VECTOR_BYTES (4 * VECTOR_LANES)

typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t uvec __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t hvec __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint8_t codevec __attribute__((vector_size(VECTOR_BYTES / 4)));
typedef float vec_at __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t hvec_at __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

#if VECTOR_LANES == 16
#define IOTA 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define SWAP_1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define SWAP_2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define SWAP_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define SWAP_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#elif VECTOR_LANES == 8
#define IOTA 0, 1, 2, 3, 4, 5, 6, 7
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define SWAP_1 1, 0, 3, 2, 5, 4, 7, 6
#define SWAP_2 2, 3, 0, 1, 6, 7, 4, 5
#define SWAP_4 4, 5, 6, 7, 0, 1, 2, 3
#else
#define IOTA 0, 1, 2, 3
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#define SWAP_1 1, 0, 3, 2
#define SWAP_2 2, 3, 0, 1
#endif

INLINE vec splat(float x) {
    return x - (vec){0};
}

INLINE vec load(const float *from) {
    return *(const vec_at *)from;
}

INLINE vec load_words(const void *from) {
    return *(const vec_at *)from;
}

INLINE void store(float *to, vec x) {
    *(vec_at *)to = x;
}

INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE vec maximum(vec a, vec b) {
    return choose(a > b, a, b);
}

INLINE vec magnitude(vec x) {
    return (vec)((uvec)x & 0x7fffffff);
}

/* Between words of 16 and 32 bits: one instruction, for which the compiler's own conversion takes about eight. */
#if VECTOR_LANES == 16
INLINE uvec extend(hvec bits) {
    return (uvec)_mm512_cvtepu16_epi32((__m256i)bits);
}

INLINE hvec lower_halves(uvec words) {
    return (hvec)_mm512_cvtepi32_epi16((__m512i)words);
}
#else
INLINE uvec extend(hvec bits) {
    return __builtin_convertvector(bits, uvec);
}

INLINE hvec lower_halves(uvec words) {
    return __builtin_convertvector(words, hvec);
}
#endif

INLINE vec widen(hvec bits) {
    return (vec)(extend(bits) << 16);
}

/* IEEE half precision, finite: its bits moved to a float32's place, the exponent's bias made up for by the factor. */
INLINE vec widen_half(hvec bits) {
    uvec wide = extend(bits);
    vec size = (vec)((wide & 0x7fff) << 13) * 0x1p112f;
    return (vec)((uvec)size | (wide & 0x8000) << 16);
}

/* Rounds to nearest even; a NaN stays one. */
INLINE hvec narrow(vec x) {
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec number = (uvec)(x == x);
    return lower_halves((rounded & number) | (0x7fc0 & ~number));
}

/* Elements index .. index+lanes-1 of an array of the given type, as float32. */
INLINE vec load_as(int type, const void *array, int64_t index) {
    if (type == BFLOAT16) return widen(*(const hvec_at *)((const uint16_t *)array + index));
    return load((const float *)array + index);
}

INLINE void store_as(int type, void *array, int64_t index, vec x) {
    if (type == BFLOAT16) *(hvec_at *)((uint16_t *)array + index) = narrow(x);
    else store((float *)array + index, x);
}

/* As load_as for count < lanes elements; the other lanes are 0. */
INLINE vec load_part(int type, const void *array, int64_t index, int64_t count) {
    vec x = {0};
    if (type == BFLOAT16) {
        hvec bits = {0};
        __builtin_memcpy(&bits, (const uint16_t *)array + index, 2 * (size_t)count);
        x = widen(bits);
    } else {
        __builtin_memcpy(&x, (const float *)array + index, 4 * (size_t)count);
    }
    return x;
}

INLINE void store_part(int type, void *array, int64_t index, vec x, int64_t count) {
    if (type == BFLOAT16) {
        hvec bits = narrow(x);
        __builtin_memcpy((uint16_t *)array + index, &bits, 2 * (size_t)count);
    } else {
        __builtin_memcpy((float *)array + index, &x, 4 * (size_t)count);
    }
}

INLINE float sum_lanes(vec x) {
#if VECTOR_LANES >= 16
    x += SHUFFLE(x, x, SWAP_8);
#endif
#if VECTOR_LANES >= 8
    x += SHUFFLE(x, x, SWAP_4);
#endif
    x += SHUFFLE(x, x, SWAP_2);
    x += SHUFFLE(x, x, SWAP_1);
    return x[0];
}

INLINE float max_lanes(vec x) {
#if VECTOR_LANES >= 16
    x = maximum(x, SHUFFLE(x, x, SWAP_8));
#endif
#if VECTOR_LANES >= 8
    x = maximum(x, SHUFFLE(x, x, SWAP_4));
#endif
    x = maximum(x, SHUFFLE(x, x, SWAP_2));
    x = maximum(x, SHUFFLE(x, x, SWAP_1));
    return x[0];
}

INLINE int32_t sum_integers(ivec x) {
#if VECTOR_LANES >= 16
    x += SHUFFLE(x, x, SWAP_8);
#endif
#if VECTOR_LANES >= 8
    x += SHUFFLE(x, x, SWAP_4);
#endif
    x += SHUFFLE(x, x, SWAP_2);
    x += SHUFFLE(x, x, SWAP_1);
    return x[0];
}

/* Transposes a lanes x lanes matrix: log2(lanes) rounds of interleaving row i with row i + lanes/2. */
INLINE void transpose(vec *rows) {
    vec zipped[VECTOR_LANES];
#pragma GCC unroll 4
    for (int step = 1; step < VECTOR_LANES; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < VECTOR_LANES / 2; i++) {
            zipped[2 * i] = SHUFFLE(rows[i], rows[i + VECTOR_LANES / 2], ZIP_LOW);
            zipped[2 * i + 1] = SHUFFLE(rows[i], rows[i + VECTOR_LANES / 2], ZIP_HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR_LANES; i++) rows[i] = zipped[i];
    }
}

/* e**x to about 1e-7 relative; 0 below -87, exactly 1 at 0, finite above 88. */
INLINE vec exp_vec(vec x) {
    const float round_bias = 12582912.0f; /* 1.5 * 2**23: adding it leaves the nearest integer in the low bits */
    vec bounded = maximum(x, splat(-87.0f));
    bounded = choose(bounded > splat(88.0f), splat(88.0f), bounded);
    vec shifted = bounded * 1.44269504f + round_bias;
    vec whole = shifted - round_bias;
    vec rest = bounded - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    vec series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * (rest * rest) + rest + 1.0f;
    uvec exponent = ((uvec)shifted - 0x4b400000u + 127u) << 23;
    vec result = series * (vec)exponent;
    return choose(x < splat(-87.0f), (vec){0}, result);
}

/* ln(x), for normal x > 0. ``below_one`` is 1 - x, exact where x is near 1 and cannot be. */
INLINE vec log_vec(vec x, vec below_one) {
    uvec bits = (uvec)x;
    ivec high = (ivec)(bits & 0x7fffff) > 0x3504f3; /* mantissa above sqrt(2): halve it */
    ivec exponent = (ivec)(bits >> 23) - 127 - high;
    vec mantissa = (vec)((bits & 0x7fffff) | (uvec)(0x3f800000 + (high << 23)));
    vec f = choose(exponent == 0, -below_one, mantissa - 1.0f);
    vec series = f * 7.0376836292e-2f - 1.1514610310e-1f;
    series = series * f + 1.1676998740e-1f;
    series = series * f - 1.2420140846e-1f;
    series = series * f + 1.4249322787e-1f;
    series = series * f - 1.6668057665e-1f;
    series = series * f + 2.0000714765e-1f;
    series = series * f - 2.4999993993e-1f;
    series = series * f + 3.3333331174e-1f;
    vec square = f * f;
    vec scale = __builtin_convertvector(exponent, vec);
    vec tail = series * f * square + scale * -2.12194440e-4f - 0.5f * square;
    return f + tail + scale * 0.693359375f;
}

#endif
