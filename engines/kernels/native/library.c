/* What native.py calls: choice of the instruction set, the task queue, and one exported function an operation. */
#include <string.h>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))

typedef void (*StartTeam)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static StartTeam start_team;

typedef struct {
    TaskBody body;
    const void *context;
    int64_t items, next;
    int workers;
} Queue;

static void drain(void *data) {
    Queue *queue = data;
    int worker = __atomic_fetch_add(&queue->workers, 1, __ATOMIC_RELAXED);
    int64_t item;
    while ((item = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED)) < queue->items)
        queue->body(queue->context, item, worker);
}

void slim_parallel_for(int64_t items, int threads, TaskBody body, const void *context) {
    if (threads > items) threads = (int)items;
    if (threads <= 1) {
        for (int64_t item = 0; item < items; item++) body(context, item, 0);
        return;
    }
    Queue queue = {body, context, items, 0, 0};
    start_team(drain, &queue, (unsigned)threads, 0);
}

/* ``team`` is GOMP_parallel of the OpenMP runtime that torch has loaded, so that both share one team of threads. */
EXPORT void slim_share_threads(StartTeam team) {
    start_team = team;
}

/* The kernels of one instruction set, for the first argument of the functions below; NULL where the machine lacks it. */
EXPORT const KernelTable *slim_kernels(const char *variant) {
    if (strcmp(variant, "base") == 0) return &slim_kernels_base;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && strcmp(variant, "avx2") == 0) return &slim_kernels_avx2;
    if (avx512 && strcmp(variant, "avx512") == 0) return &slim_kernels_avx512;
    if (avx512 && __builtin_cpu_supports("avx512vnni") && strcmp(variant, "avx512vnni") == 0) return &slim_kernels_avx512vnni;
#endif
    return NULL;
}

EXPORT int64_t slim_panel_width(const KernelTable *kernels) {
    return kernels->panel_width;
}

/* Floats of workspace that slim_linear needs. */
EXPORT int64_t slim_linear_workspace(const KernelTable *kernels, int64_t rows, int64_t depth) {
    return rows > 1 ? (rows + kernels->tile_rows - 1) / kernels->tile_rows * kernels->lanes * depth : 0;
}

EXPORT void slim_pack_panels(const KernelTable *kernels, const float *weight, int64_t stride, int64_t columns, int64_t depth, float *panels,
                             int threads) {
    kernels->pack_panels(weight, stride, columns, depth, panels, threads);
}

EXPORT void slim_linear(const KernelTable *kernels, const float *x, int64_t x_stride, const float *panels, const float *bias, float *out,
                        float *workspace, int64_t rows, int64_t depth, int64_t columns, int threads) {
    LinearCall call = {x, x_stride, panels, bias, out, workspace, rows, depth, columns, threads};
    kernels->linear(&call);
}

EXPORT int64_t slim_attention_workspace(const KernelTable *kernels, int64_t rows, int64_t head_dim, int64_t value_dim, int threads) {
    return kernels->attention_workspace(rows, head_dim, value_dim, threads);
}

EXPORT void slim_attention(const KernelTable *kernels, const AttentionCall *call) {
    kernels->attention(call);
}

EXPORT void slim_norm(const KernelTable *kernels, const void *x, int64_t outer_stride, int64_t inner_stride,
                      const void *weight, void *out, int64_t outer, int64_t inner, int64_t width, float eps, int type,
                      int threads) {
    NormCall call = {x, outer_stride, inner_stride, weight, out, outer, inner, width, eps, type, threads};
    kernels->norm(&call);
}

EXPORT void slim_silu_mul(const KernelTable *kernels, const void *gate_up, int64_t stride, void *out, int64_t rows, int64_t width, int type,
                          int threads) {
    SiluCall call = {gate_up, stride, out, rows, width, type, threads};
    kernels->silu_mul(&call);
}

EXPORT void slim_rope(const KernelTable *kernels, void *queries, int64_t query_token_stride, int64_t query_head_stride, int64_t query_heads,
                      void *keys, int64_t key_token_stride, int64_t key_head_stride, int64_t key_heads,
                      const int64_t *positions, const float *cos_sin, int64_t tokens, int64_t rope_dim,
                      int interleaved, int type, int threads) {
    RopeCall call = {{queries, keys}, {query_token_stride, key_token_stride}, {query_head_stride, key_head_stride},
                     {query_heads, key_heads}, positions, cos_sin, tokens, rope_dim, interleaved, type, threads};
    kernels->rope(&call);
}

EXPORT void slim_write_cache(const KernelTable *kernels, const void *entries, int64_t token_stride, int64_t head_stride, void *cache,
                             const int64_t *slots, int64_t tokens, int64_t heads, int64_t width, int entry_type,
                             int cache_type) {
    CacheWriteCall call = {entries, token_stride, head_stride, cache, slots, tokens, heads, width, entry_type,
                           cache_type};
    kernels->write_cache(&call);
}

EXPORT void slim_gumbel(const KernelTable *kernels, const int64_t *seeds, const int64_t *choices, const int64_t *positions, float *out,
                        int64_t rows, int64_t vocab, int threads) {
    GumbelCall call = {seeds, choices, positions, out, rows, vocab, threads};
    kernels->gumbel(&call);
}

EXPORT void slim_argmax(const KernelTable *kernels, const float *values, int64_t stride, int64_t *out, int64_t rows, int64_t width,
                        int threads) {
    ArgmaxCall call = {values, stride, out, rows, width, threads};
    kernels->argmax(&call);
}

/* Returns 0, or the bytes of workspace that it needs and does not have: then it has done nothing. */
EXPORT int64_t slim_quantized_linear(const KernelTable *kernels, const QuantizedCall *call) {
    return kernels->quantized_linear(call);
}
