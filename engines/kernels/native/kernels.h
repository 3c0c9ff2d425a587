/* The native CPU kernels: argument blocks, the table that each instruction-set variant fills, and the task queue. */
#ifndef SLIMSERVE_KERNELS_H
#define SLIMSERVE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* Element types; the numbers are shared with native.py. */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef struct {
    const float *x; /* (rows, depth), row stride x_stride */
    int64_t x_stride;
    const float *panels; /* (ceil(columns / width), depth, width) */
    const float *bias;   /* (columns) or NULL */
    float *out;          /* (rows, columns) contiguous */
    float *packed_rows;  /* workspace: ceil(rows / tile rows) * depth * vector lanes floats; unused for one row */
    int64_t rows, depth, columns;
    int threads;
} LinearCall;

typedef struct {
    const void *queries; /* (tokens, query heads, head_dim), strides in elements */
    int64_t query_token_stride, query_head_stride;
    const void *keys, *values; /* (blocks, block_size, kv heads, width), strides in elements */
    int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
    void *out; /* (tokens, query heads, value_dim) contiguous */
    const int64_t *positions;
    const int32_t *query_starts, *block_tables;
    int64_t table_stride, block_size, rows, query_heads, kv_heads, head_dim, value_dim;
    void *workspace; /* slim_attention_workspace() bytes, 64-byte aligned */
    float scale;
    int decodes; /* every row has one token */
    int query_type, cache_type, threads;
} AttentionCall;

typedef struct {
    const void *x; /* (outer, inner, width), strides in elements */
    int64_t outer_stride, inner_stride;
    const void *weight; /* (width) */
    void *out;          /* (outer * inner, width) contiguous */
    int64_t outer, inner, width;
    float eps;
    int type, threads;
} NormCall;

typedef struct {
    const void *gate_up; /* (rows, 2 * width), row stride in elements */
    int64_t stride;
    void *out; /* (rows, width) contiguous */
    int64_t rows, width;
    int type, threads;
} SiluCall;

typedef struct {
    void *heads[2]; /* queries, keys: (tokens, head_count, >= rope_dim), strides in elements */
    int64_t token_stride[2], head_stride[2], head_count[2];
    const int64_t *positions;
    const float *cos_sin; /* (max_pos, rope_dim): cosines, then sines */
    int64_t tokens, rope_dim;
    int interleaved, type, threads;
} RopeCall;

typedef struct {
    const void *entries; /* (tokens, heads, width), strides in elements */
    int64_t token_stride, head_stride;
    void *cache; /* (slots, heads, width) contiguous */
    const int64_t *slots;
    int64_t tokens, heads, width;
    int entry_type, cache_type, threads;
} CacheWriteCall;

typedef struct {
    const uint8_t *codes; /* (lines, width) contiguous */
    const float *scale;   /* (lines, groups) contiguous */
    const int64_t *ids;
    void *out; /* (tokens, width) contiguous */
    int64_t lines, tokens, width, groups;
    int zero_point, type, threads;
} EmbedCall;

typedef struct {
    const int64_t *seeds, *choices, *positions;
    float *out; /* (rows, vocab) contiguous */
    int64_t rows, vocab;
    int threads;
} GumbelCall;

typedef struct {
    const void *x; /* (rows, width), row stride x_stride */
    int64_t x_stride;
    const void *norm_weight; /* (width) or NULL: x goes through an RMS norm first */
    const uint8_t *codes;    /* laid out as quantized.h says */
    const void *scale;       /* (panels, depth / group, panel width) of scale_type */
    const void *offset;      /* the same shape, or NULL: codes are symmetric around zero_point */
    const void *bias;        /* (columns) or NULL */
    const void *residual;    /* (rows, columns of out), row stride residual_stride, or NULL */
    int64_t residual_stride;
    void *out; /* (rows, columns, or columns / 2 where gated) contiguous, of out_type */
    void *workspace; /* 64-byte aligned */
    int64_t workspace_bytes;
    int64_t rows, width, depth, columns; /* depth: width, filled up with zeros to what a panel holds */
    int64_t group, block;                /* features that share a weight's scale; that share an activation's */
    float eps, input_scale;              /* input_scale: of all activations; 0: taken from them */
    int zero_point;
    int halves;    /* two codes a byte */
    int per_token; /* one scale for all of a row's activations */
    int gated;     /* out = silu(first half of the columns) * second half */
    int type;      /* of x, norm_weight, bias and residual */
    int scale_type, out_type, threads;
} QuantizedCall;

typedef struct {
    const float *values; /* (rows, width), row stride ``stride`` */
    int64_t stride;
    int64_t *out; /* (rows) */
    int64_t rows, width;
    int threads;
} ArgmaxCall;

/* One instruction-set variant. */
typedef struct {
    int64_t lanes;       /* floats in a vector */
    int64_t panel_width; /* output columns in a weight panel */
    int64_t tile_rows;   /* rows of x that one pass over a panel serves */
    void (*pack_panels)(const float *weight, int64_t stride, int64_t columns, int64_t depth, float *panels, int threads);
    void (*linear)(const LinearCall *call);
    int64_t (*attention_workspace)(int64_t rows, int64_t head_dim, int64_t value_dim, int threads);
    void (*attention)(const AttentionCall *call);
    void (*norm)(const NormCall *call);
    void (*silu_mul)(const SiluCall *call);
    void (*rope)(const RopeCall *call);
    void (*write_cache)(const CacheWriteCall *call);
    void (*embed)(const EmbedCall *call);
    void (*gumbel)(const GumbelCall *call);
    int64_t (*quantized_linear)(const QuantizedCall *call);
    void (*argmax)(const ArgmaxCall *call);
} KernelTable;

extern const KernelTable slim_kernels_base;
#if defined(__x86_64__)
extern const KernelTable slim_kernels_avx2;
extern const KernelTable slim_kernels_avx512;
extern const KernelTable slim_kernels_avx512vnni;
#endif

/* Does one item; ``worker`` < threads is the same for no two items that run at once. */
typedef void (*TaskBody)(const void *context, int64_t item, int worker);

/* Runs items 0 .. items-1, each once, on up to ``threads`` threads. No result may depend on which thread runs an
 * item, or when. A tape that records keeps a copy of the context: what that leads to outside of itself has to be there,
 * and the same, whenever the tape runs. */
void slim_parallel_for(int64_t items, int threads, TaskBody body, const void *context, size_t context_bytes);

#endif
