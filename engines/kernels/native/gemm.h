/* Float32 matrix products. Every output element is one chain of multiply-adds over depth 0, 1, 2, ... whatever the
 * other rows are and however the work is split, so a row's result is the same bits in every batch.
 *
 * Weights are panels of PANEL_WIDTH output columns, (depth, PANEL_WIDTH) each, so that a panel is read once, in
 * order. Rows of x are packed in tiles of at most TILE_ROWS, (depth, VECTOR_LANES) each. */
#ifndef SLIMSERVE_GEMM_H
#define SLIMSERVE_GEMM_H

#include "vectors.h"

#define PANEL_WIDTH (2 * VECTOR_LANES)
#define BLOCK_TILES 8 /* tiles of x that stay in the second-level cache beside one panel */

/* c (rows, PANEL_WIDTH) = [c +] a (rows, depth) . b (depth, PANEL_WIDTH) [+ bias]; a's strides are constants where
 * this is inlined. */
INLINE void multiply_tile(const int rows, const float *a, const int64_t row_stride, const int64_t depth_stride,
                          int64_t depth, const float *b, float *c, int64_t c_stride, const float *bias,
                          const int accumulate) {
    vec low[TILE_ROWS], high[TILE_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        low[i] = accumulate ? load(c + i * c_stride) : (vec){0};
        high[i] = accumulate ? load(c + i * c_stride + VECTOR_LANES) : (vec){0};
    }
    for (int64_t k = 0; k < depth; k++) {
        vec b_low = load(b + k * PANEL_WIDTH), b_high = load(b + k * PANEL_WIDTH + VECTOR_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec factor = splat(a[i * row_stride + k * depth_stride]);
            low[i] += factor * b_low;
            high[i] += factor * b_high;
        }
    }
    vec bias_low = bias ? load(bias) : (vec){0}, bias_high = bias ? load(bias + VECTOR_LANES) : (vec){0};
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        store(c + i * c_stride, bias ? low[i] + bias_low : low[i]);
        store(c + i * c_stride + VECTOR_LANES, bias ? high[i] + bias_high : high[i]);
    }
}

#if TILE_ROWS == 12
#define FOR_EACH_TILE_ROWS(CASE) \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#elif TILE_ROWS == 6
#define FOR_EACH_TILE_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#else
#define FOR_EACH_TILE_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif

/* a is a packed tile: (depth, VECTOR_LANES), one row a lane. */
static void multiply_packed(int rows, const float *a, int64_t depth, const float *b, float *c, int64_t c_stride,
                            const float *bias) {
    switch (rows) {
#define CASE(n)                                                                                  \
    case n:                                                                                      \
        multiply_tile(n, a, 1, VECTOR_LANES, depth, b, c, c_stride, bias, 0);                    \
        break;
        FOR_EACH_TILE_ROWS(CASE)
#undef CASE
    }
}

/* c += a . b with a (rows, depth) in rows of PANEL_WIDTH floats. */
static void accumulate_rows(int rows, const float *a, int64_t depth, const float *b, float *c, int64_t c_stride) {
    switch (rows) {
#define CASE(n)                                                                                  \
    case n:                                                                                      \
        multiply_tile(n, a, PANEL_WIDTH, 1, depth, b, c, c_stride, NULL, 1);                     \
        break;
        FOR_EACH_TILE_ROWS(CASE)
#undef CASE
    }
}

/* Packs rows of any type into (width, VECTOR_LANES) float32, row i in lane i; lanes past ``rows`` are 0. */
INLINE void pack_rows(int type, const void *const *source, int rows, int64_t width, float *packed,
                      int64_t packed_stride) {
    for (int64_t k = 0; k < width; k += VECTOR_LANES) {
        int64_t count = width - k < VECTOR_LANES ? width - k : VECTOR_LANES;
        vec block[VECTOR_LANES];
        for (int i = 0; i < VECTOR_LANES; i++) {
            if (i >= rows) block[i] = (vec){0};
            else block[i] = count == VECTOR_LANES ? load_as(type, source[i], k) : load_part(type, source[i], k, count);
        }
        transpose(block);
        for (int64_t i = 0; i < count; i++) store(packed + (k + i) * packed_stride, block[i]);
    }
}

/* pack_rows for whole blocks of bfloat16: two features move as one word, which halves the transposing. */
INLINE void pack_pairs(const void *const *source, int rows, int64_t width, float *packed, int64_t packed_stride) {
    for (int64_t k = 0; k < width; k += 2 * VECTOR_LANES) {
        vec block[VECTOR_LANES];
        for (int i = 0; i < VECTOR_LANES; i++) block[i] = i < rows ? load_words((const uint16_t *)source[i] + k) : (vec){0};
        transpose(block);
        for (int64_t i = 0; i < VECTOR_LANES; i++) {
            store(packed + (k + 2 * i) * packed_stride, (vec)((uvec)block[i] << 16));
            store(packed + (k + 2 * i + 1) * packed_stride, (vec)((uvec)block[i] & 0xffff0000));
        }
    }
}

/* Tiles are as even as can be: 32 rows are 11 + 11 + 10. */
INLINE int64_t tile_start(int64_t tile, int64_t tiles, int64_t rows) {
    return tile * rows / tiles;
}

INLINE int64_t tile_count(int64_t rows) {
    return (rows + TILE_ROWS - 1) / TILE_ROWS;
}

static void pack_tile(const void *context, int64_t tile, int worker) {
    (void)worker;
    const LinearCall *call = context;
    int64_t tiles = tile_count(call->rows), start = tile_start(tile, tiles, call->rows);
    int rows = (int)(tile_start(tile + 1, tiles, call->rows) - start);
    const void *source[VECTOR_LANES] = {0};
    for (int i = 0; i < rows; i++) source[i] = call->x + (start + i) * call->x_stride;
    pack_rows(FLOAT32, source, rows, call->depth, call->packed_rows + tile * call->depth * VECTOR_LANES, VECTOR_LANES);
}

INLINE void multiply_rows(const LinearCall *call, int64_t tile, int rows, const float *panel, float *c,
                          int64_t c_stride, const float *bias) {
    if (call->rows == 1) multiply_tile(1, call->x, 0, 1, call->depth, panel, c, c_stride, bias, 0);
    else multiply_packed(rows, call->packed_rows + tile * call->depth * VECTOR_LANES, call->depth, panel, c, c_stride,
                         bias);
}

/* One panel times one block of tiles. */
static void multiply_block(const void *context, int64_t item, int worker) {
    (void)worker;
    const LinearCall *call = context;
    int64_t panels = (call->columns + PANEL_WIDTH - 1) / PANEL_WIDTH, tiles = tile_count(call->rows);
    int64_t column = item % panels * PANEL_WIDTH, first_tile = item / panels * BLOCK_TILES;
    int64_t last_tile = first_tile + BLOCK_TILES < tiles ? first_tile + BLOCK_TILES : tiles;
    const float *panel = call->panels + column * call->depth;
    const float *bias = call->bias ? call->bias + column : NULL;
    for (int64_t tile = first_tile; tile < last_tile; tile++) {
        int64_t start = tile_start(tile, tiles, call->rows);
        int rows = (int)(tile_start(tile + 1, tiles, call->rows) - start);
        float *out = call->out + start * call->columns + column;
        if (column + PANEL_WIDTH <= call->columns) {
            multiply_rows(call, tile, rows, panel, out, call->columns, bias);
            continue;
        }
        float whole[TILE_ROWS * PANEL_WIDTH];
        multiply_rows(call, tile, rows, panel, whole, PANEL_WIDTH, NULL);
        for (int i = 0; i < rows; i++)
            for (int64_t n = 0; n < call->columns - column; n++)
                out[i * call->columns + n] = whole[i * PANEL_WIDTH + n] + (bias ? bias[n] : 0.0f);
    }
}

static void linear(const LinearCall *call) {
    int64_t tiles = tile_count(call->rows), panels = (call->columns + PANEL_WIDTH - 1) / PANEL_WIDTH;
    if (call->rows > 1) slim_parallel_for(tiles, call->threads, pack_tile, call, sizeof(*call));
    slim_parallel_for((tiles + BLOCK_TILES - 1) / BLOCK_TILES * panels, call->threads, multiply_block, call, sizeof(*call));
}

typedef struct {
    const float *weight;
    int64_t stride, columns, depth;
    float *panels;
} PackCall;

static void pack_panel(const void *context, int64_t item, int worker) {
    (void)worker;
    const PackCall *call = context;
    for (int part = 0; part < 2; part++) {
        int64_t first = item * PANEL_WIDTH + part * VECTOR_LANES;
        const void *source[VECTOR_LANES] = {0};
        int rows = 0;
        while (rows < VECTOR_LANES && first + rows < call->columns) {
            source[rows] = call->weight + (first + rows) * call->stride;
            rows++;
        }
        pack_rows(FLOAT32, source, rows, call->depth, call->panels + item * PANEL_WIDTH * call->depth + part * VECTOR_LANES,
                  PANEL_WIDTH);
    }
}

static void pack_panels(const float *weight, int64_t stride, int64_t columns, int64_t depth, float *panels,
                        int threads) {
    PackCall call = {weight, stride, columns, depth, panels};
    slim_parallel_for((columns + PANEL_WIDTH - 1) / PANEL_WIDTH, threads, pack_panel, &call, sizeof(call));
}

#endif
