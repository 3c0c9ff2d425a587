/* The product that quantized weights are made of: each 32-bit lane takes the sum of four unsigned codes times four
 * signed ones. With intrinsics: no portable expression compiles to these instructions. */
#ifndef SLIMSERVE_DOT_H
#define SLIMSERVE_DOT_H

#include "vectors.h"

typedef int8_t bvec __attribute__((vector_size(VECTOR_BYTES / 4)));
typedef int32_t ivec_at __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

INLINE ivec load_codes(const uint8_t *from) {
    return *(const ivec_at *)from;
}

#if defined(DOT_VNNI)

#define DOT_WORDS 1 /* 32-bit words that hold four signed codes as ``dot`` wants them */

INLINE void put_word(const int8_t *codes, int32_t *word) {
    __builtin_memcpy(word, codes, 4);
}

INLINE ivec dot(ivec sums, ivec codes, const int32_t *words) {
    return (ivec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(*words));
}

#else

/* As pairs of 16 bits, codes 0 and 2, then 1 and 3: products of 8 bits would not fit the sums of 16 bits that the
 * instructions before VNNI make of them. */
#define DOT_WORDS 2

INLINE void put_word(const int8_t *codes, int32_t *word) {
    for (int i = 0; i < 2; i++) word[i] = (int32_t)((uint32_t)(uint16_t)codes[i] | (uint32_t)(uint16_t)codes[i + 2] << 16);
}

/* Each lane: the sum of two products of signed 16-bit halves. */
INLINE ivec add_pairs(ivec sums, ivec codes, int32_t word) {
#if VECTOR_LANES == 16
    return sums + (ivec)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(word));
#elif VECTOR_LANES == 8
    return sums + (ivec)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(word));
#elif defined(__SSE2__)
    return sums + (ivec)_mm_madd_epi16((__m128i)codes, _mm_set1_epi32(word));
#else
    return sums + (codes & 0xffff) * (int32_t)(int16_t)word + (codes >> 16) * (word >> 16);
#endif
}

INLINE ivec dot(ivec sums, ivec codes, const int32_t *words) {
    sums = add_pairs(sums, codes & 0x00ff00ff, words[0]);
    return add_pairs(sums, (ivec)((uvec)codes >> 8) & 0x00ff00ff, words[1]);
}

#endif
#endif
