/* The kernels for x86-64 with AVX2 and FMA. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define VARIANT slim_kernels_avx2
#define VECTOR_LANES 8
#define TILE_ROWS 6
#define QUANTIZED_ROWS 4
#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
