/* Causal attention over a paged cache, decode rows and prefill chunks alike.
 *
 * A group is up to GROUP_QUERIES query vectors (consecutive tokens of a row x heads of one KV head), a task up to
 * TASK_GROUPS groups of the same tokens. A task walks the row's keys in tiles of PANEL_WIDTH positions from position 0
 * and keeps a running maximum, sum and output for each query (online softmax). What happens to one query depends on
 * its own position alone: keys after it get weight 0, which changes no bit of its sums, so chunking and neighbours do
 * not matter. */
#ifndef SLIMSERVE_ATTENTION_H
#define SLIMSERVE_ATTENTION_H

#include "gemm.h"

#define GROUP_QUERIES (2 * TILE_ROWS)
#define GROUP_LANES (GROUP_QUERIES + VECTOR_LANES) /* room for whole vectors past the last query */
#define TASK_GROUPS 4

typedef struct {
    AttentionCall call;
    const int64_t *first_task; /* (rows + 1): tasks of the rows before; NULL where every row has one token */
    int64_t groups, groups_per_task, heads_per_group, groups_per_kv_head, tokens_per_task;
} AttentionPlan;

typedef struct {
    int64_t row, first_group, groups, first_token, tokens, first_position;
} AttentionTask;

/* One group's queries, packed, and what it has summed so far. */
typedef struct {
    int64_t kv_head, first_head, heads, queries;
    float *packed, *out;
    float maxima[GROUP_LANES], sums[GROUP_LANES];
} Group;

/* A worker's memory for one tile. */
typedef struct {
    float *keys, *values, *scores;
    float rescale[GROUP_LANES], tile_sums[GROUP_LANES];
    int64_t visible[GROUP_QUERIES];
    const void *value_rows[PANEL_WIDTH]; /* where ``values`` was copied from, or would have been */
} Scratch;

INLINE int64_t padded_width(int64_t width) {
    return (width + PANEL_WIDTH - 1) / PANEL_WIDTH * PANEL_WIDTH;
}

INLINE int64_t plan_bytes(int64_t rows) {
    return ((rows + 1) * (int64_t)sizeof(int64_t) + 63) / 64 * 64;
}

INLINE int64_t group_floats(int64_t head_dim, int64_t value_dim) {
    return 2 * head_dim * VECTOR_LANES + GROUP_QUERIES * padded_width(value_dim);
}

INLINE int64_t worker_floats(int64_t head_dim, int64_t value_dim) {
    int64_t tile = (head_dim + padded_width(value_dim) + GROUP_QUERIES) * PANEL_WIDTH;
    return tile + TASK_GROUPS * group_floats(head_dim, value_dim);
}

/* Whether a group is small enough to read values where they lie: copies of a tile would be read but once. */
INLINE int reads_values_in_place(const AttentionPlan *plan, const Group *group) {
    return group->queries <= TILE_ROWS && plan->groups_per_kv_head == 1 && plan->call.value_dim % PANEL_WIDTH == 0;
}

static int64_t attention_workspace(int64_t rows, int64_t head_dim, int64_t value_dim, int threads) {
    return plan_bytes(rows) + threads * worker_floats(head_dim, value_dim) * (int64_t)sizeof(float);
}

/* The row that a task belongs to. */
INLINE int64_t find_row(const AttentionPlan *plan, int64_t item) {
    int64_t low = 0, high = plan->call.rows - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (plan->first_task[middle] <= item) low = middle;
        else high = middle - 1;
    }
    return low;
}

INLINE AttentionTask find_task(const AttentionPlan *plan, int64_t item) {
    const AttentionCall *call = &plan->call;
    int64_t shares = (plan->groups + plan->groups_per_task - 1) / plan->groups_per_task;
    int64_t low = plan->first_task ? find_row(plan, item) : item / shares;
    int64_t inside = item - (plan->first_task ? plan->first_task[low] : low * shares);
    AttentionTask task = {.row = low, .first_group = inside % shares * plan->groups_per_task};
    int64_t groups_left = plan->groups - task.first_group;
    task.groups = groups_left < plan->groups_per_task ? groups_left : plan->groups_per_task;
    task.first_token = call->query_starts[low] + inside / shares * plan->tokens_per_task;
    int64_t tokens_left = call->query_starts[low + 1] - task.first_token;
    task.tokens = tokens_left < plan->tokens_per_task ? tokens_left : plan->tokens_per_task;
    task.first_position = call->positions[task.first_token];
    return task;
}

/* Query i of a group is head i % heads of token i / heads. */
INLINE void pack_queries(const AttentionCall *call, const AttentionTask *task, const Group *group) {
    const int64_t bytes = call->query_type == BFLOAT16 ? 2 : 4;
    for (int64_t first = 0; first < group->queries; first += TILE_ROWS) {
        const void *source[VECTOR_LANES] = {0};
        int rows = 0;
        for (; rows < TILE_ROWS && first + rows < group->queries; rows++) {
            int64_t token = task->first_token + (first + rows) / group->heads;
            int64_t head = group->first_head + (first + rows) % group->heads;
            int64_t offset = token * call->query_token_stride + head * call->query_head_stride;
            source[rows] = (const char *)call->queries + offset * bytes;
        }
        float *to = group->packed + first / TILE_ROWS * call->head_dim * VECTOR_LANES;
        if (call->query_type == BFLOAT16) pack_rows(BFLOAT16, source, rows, call->head_dim, to, VECTOR_LANES);
        else pack_rows(FLOAT32, source, rows, call->head_dim, to, VECTOR_LANES);
    }
}

INLINE void start_group(const AttentionPlan *plan, const AttentionTask *task, int64_t index, float *memory,
                        Group *group) {
    const AttentionCall *call = &plan->call;
    int64_t shared = call->query_heads / call->kv_heads, part = index % plan->groups_per_kv_head;
    int64_t skipped = part * plan->heads_per_group;
    group->kv_head = index / plan->groups_per_kv_head;
    group->first_head = group->kv_head * shared + skipped;
    group->heads = shared - skipped < plan->heads_per_group ? shared - skipped : plan->heads_per_group;
    group->queries = task->tokens * group->heads;
    group->packed = memory;
    group->out = memory + 2 * call->head_dim * VECTOR_LANES;
    for (int i = 0; i < GROUP_LANES; i++) {
        group->maxima[i] = -__builtin_inff();
        group->sums[i] = 0;
    }
    for (int64_t i = 0; i < group->queries * padded_width(call->value_dim); i++) group->out[i] = 0;
    pack_queries(call, task, group);
}

/* Rows of values -> panels of (PANEL_WIDTH, PANEL_WIDTH), zero past ``width``. */
INLINE void copy_values(int type, const void *const *rows, int64_t count, int64_t width, float *values) {
    for (int64_t j = 0; j < count; j++) {
        float *to = values + j * PANEL_WIDTH;
        int64_t d = 0;
        for (; d + PANEL_WIDTH <= width; d += PANEL_WIDTH, to += PANEL_WIDTH * PANEL_WIDTH) {
            store(to, load_as(type, rows[j], d));
            store(to + VECTOR_LANES, load_as(type, rows[j], d + VECTOR_LANES));
        }
        for (int half = 0; d < width; half++, d += VECTOR_LANES)
            store(to + half * VECTOR_LANES, width - d < VECTOR_LANES ? load_part(type, rows[j], d, width - d)
                                                                       : load_as(type, rows[j], d));
    }
}

/* Cache slots of positions start .. start+PANEL_WIDTH-1 (those below ``end``); returns how many. */
INLINE int64_t find_slots(const AttentionCall *call, const AttentionTask *task, int64_t start, int64_t end,
                          int64_t *slots) {
    const int32_t *block = call->block_tables + task->row * call->table_stride + start / call->block_size;
    int64_t offset = start % call->block_size, count = end - start < PANEL_WIDTH ? end - start : PANEL_WIDTH;
    for (int64_t j = 0; j < count; j++) {
        slots[j] = *block * call->block_size + offset;
        if (++offset == call->block_size) {
            offset = 0;
            block++;
        }
    }
    return count;
}

/* Reads one word of every cache line of a tile, tokens in order with the task's heads side by side. The processor's
 * stream prefetchers follow such a run, and not the short pieces that one head takes; prefetch instructions for the
 * same lines were measured to be no faster. */
INLINE void stream_lines(const char *tensor, int64_t bytes, const int64_t *slots, int64_t count, int64_t token_stride,
                         int64_t first, int64_t width) {
    uint32_t read = 0;
    for (int64_t j = 0; j < count; j++) {
        const char *token = tensor + (slots[j] * token_stride + first) * bytes;
        for (int64_t at = 0; at < width * bytes; at += 64) read += *(const uint16_t *)(token + at);
    }
    __asm__ volatile("" : : "r"(read));
}

INLINE void stream_tile(const AttentionCall *call, const int64_t *slots, int64_t count, int64_t first_head,
                        int64_t last_head) {
    const int64_t bytes = call->cache_type == BFLOAT16 ? 2 : 4, heads = last_head - first_head;
    stream_lines(call->keys, bytes, slots, count, call->key_token_stride, first_head * call->key_head_stride,
                 heads * call->key_head_stride + call->head_dim);
    if (call->values != call->keys)
        stream_lines(call->values, bytes, slots, count, call->value_token_stride, first_head * call->value_head_stride,
                     heads * call->value_head_stride + call->value_dim);
}

/* Keys as (head_dim, PANEL_WIDTH), values as panels of (PANEL_WIDTH, PANEL_WIDTH). */
/* Asks for one head's share of the next tile, which arrives while this one is worked on. */
INLINE void fetch_tile(const AttentionCall *call, const int64_t *slots, int64_t count, int64_t kv_head) {
    const int64_t bytes = call->cache_type == BFLOAT16 ? 2 : 4;
    for (int64_t j = 0; j < count; j++) {
        const char *key = (const char *)call->keys + (slots[j] * call->key_token_stride + kv_head * call->key_head_stride) * bytes;
        const char *value = (const char *)call->values + (slots[j] * call->value_token_stride + kv_head * call->value_head_stride) * bytes;
        for (int64_t at = 0; at < call->head_dim * bytes; at += 64) __builtin_prefetch(key + at);
        if (call->values == call->keys) continue;
        for (int64_t at = 0; at < call->value_dim * bytes; at += 64) __builtin_prefetch(value + at);
    }
}

INLINE void gather_tile(int type, const AttentionCall *call, const int64_t *slots, int64_t count, int64_t kv_head,
                        int copy, Scratch *scratch) {
    const int64_t bytes = type == BFLOAT16 ? 2 : 4;
    const void *keys[PANEL_WIDTH], **values = scratch->value_rows;
    for (int64_t j = 0; j < count; j++) {
        int64_t key = slots[j] * call->key_token_stride + kv_head * call->key_head_stride;
        int64_t value = slots[j] * call->value_token_stride + kv_head * call->value_head_stride;
        keys[j] = (const char *)call->keys + key * bytes;
        values[j] = (const char *)call->values + value * bytes;
    }
    const int first_part = (int)(count < VECTOR_LANES ? count : VECTOR_LANES), rest = (int)count - first_part;
    if (type == BFLOAT16 && call->head_dim % (2 * VECTOR_LANES) == 0) {
        pack_pairs(keys, first_part, call->head_dim, scratch->keys, PANEL_WIDTH);
        pack_pairs(keys + VECTOR_LANES, rest, call->head_dim, scratch->keys + VECTOR_LANES, PANEL_WIDTH);
    } else {
        pack_rows(type, keys, first_part, call->head_dim, scratch->keys, PANEL_WIDTH);
        pack_rows(type, keys + VECTOR_LANES, rest, call->head_dim, scratch->keys + VECTOR_LANES, PANEL_WIDTH);
    }
    if (copy) copy_values(type, values, count, call->value_dim, scratch->values);
}

/* Scores of one tile -> weights, in place; updates each query's maximum and sum and says in ``rescale`` what its
 * output so far must be multiplied by. Query i sees the first ``visible[i]`` keys of the tile. */
INLINE void soften_tile(const AttentionCall *call, Group *group, Scratch *scratch) {
    const ivec lane = {IOTA};
    const vec nothing = splat(-__builtin_inff());
    for (int64_t i = 0; i < group->queries; i++) {
        float *row = scratch->scores + i * PANEL_WIDTH;
        int64_t visible = scratch->visible[i];
        int32_t seen = visible < 0 ? 0 : visible > PANEL_WIDTH ? PANEL_WIDTH : (int32_t)visible;
        vec low = choose(lane < seen, load(row) * call->scale, nothing);
        vec high = choose(lane + VECTOR_LANES < seen, load(row + VECTOR_LANES) * call->scale, nothing);
        float best = max_lanes(maximum(low, high)), before = group->maxima[i];
        float top = best > before ? best : before;
        scratch->rescale[i] = before - top;
        group->maxima[i] = top;
        low = exp_vec(low - top);
        high = exp_vec(high - top);
        store(row, low);
        store(row + VECTOR_LANES, high);
        scratch->tile_sums[i] = sum_lanes(low + high);
    }
    for (int64_t i = 0; i < group->queries; i += VECTOR_LANES) {
        vec factor = exp_vec(load(scratch->rescale + i));
        store(scratch->rescale + i, factor);
        store(group->sums + i, load(group->sums + i) * factor + load(scratch->tile_sums + i));
    }
}

INLINE void rescale_output(const Group *group, const float *rescale, int64_t stride) {
    for (int64_t i = 0; i < group->queries; i++) {
        if (rescale[i] == 1.0f) continue;
        for (int64_t d = 0; d < stride; d += VECTOR_LANES)
            store(group->out + i * stride + d, load(group->out + i * stride + d) * rescale[i]);
    }
}

/* accumulate_rows with values where they lie: c (rows, PANEL_WIDTH) += weights . columns ``at`` .. of the values. */
INLINE void add_values(const int rows, const int type, const float *weights, const void *const *values, int64_t count,
                       int64_t at, float *c, int64_t c_stride) {
    vec low[TILE_ROWS], high[TILE_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        low[i] = load(c + i * c_stride);
        high[i] = load(c + i * c_stride + VECTOR_LANES);
    }
    for (int64_t j = 0; j < count; j++) {
        vec value_low = load_as(type, values[j], at), value_high = load_as(type, values[j], at + VECTOR_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec factor = splat(weights[i * PANEL_WIDTH + j]);
            low[i] += factor * value_low;
            high[i] += factor * value_high;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        store(c + i * c_stride, low[i]);
        store(c + i * c_stride + VECTOR_LANES, high[i]);
    }
}

static void add_values_in_place(const AttentionCall *call, const Scratch *scratch, int64_t count, Group *group) {
    const int64_t width = call->value_dim;
    for (int64_t at = 0; at < width; at += PANEL_WIDTH) {
        switch (group->queries) {
#define CASE(n)                                                                                                  \
    case n:                                                                                                      \
        if (call->cache_type == BFLOAT16)                                                                        \
            add_values(n, BFLOAT16, scratch->scores, scratch->value_rows, count, at, group->out + at, width);    \
        else add_values(n, FLOAT32, scratch->scores, scratch->value_rows, count, at, group->out + at, width);    \
        break;
            FOR_EACH_TILE_ROWS(CASE)
#undef CASE
        }
    }
}

/* Takes one tile of keys and values, ``count`` of them, into a group's running softmax. */
INLINE void attend_tile(const AttentionCall *call, const AttentionTask *task, int64_t start, int64_t count, int copied,
                        Group *group, Scratch *scratch) {
    const int64_t stride = padded_width(call->value_dim), depth = call->head_dim;
    for (int64_t i = 0; i < group->queries; i++)
        scratch->visible[i] = task->first_position + i / group->heads + 1 - start;
    for (int64_t first = 0; first < group->queries; first += TILE_ROWS) {
        int rows = (int)(group->queries - first < TILE_ROWS ? group->queries - first : TILE_ROWS);
        multiply_packed(rows, group->packed + first / TILE_ROWS * depth * VECTOR_LANES, depth, scratch->keys,
                        scratch->scores + first * PANEL_WIDTH, PANEL_WIDTH, NULL);
    }
    soften_tile(call, group, scratch);
    rescale_output(group, scratch->rescale, stride);
    if (!copied) {
        add_values_in_place(call, scratch, count, group);
        return;
    }
    for (int64_t first = 0; first < group->queries; first += TILE_ROWS) {
        int rows = (int)(group->queries - first < TILE_ROWS ? group->queries - first : TILE_ROWS);
        for (int64_t d = 0; d < stride; d += PANEL_WIDTH)
            accumulate_rows(rows, scratch->scores + first * PANEL_WIDTH, count, scratch->values + d * PANEL_WIDTH,
                            group->out + first * stride + d, stride);
    }
}

INLINE void write_output(const AttentionCall *call, const AttentionTask *task, const Group *group) {
    const int64_t stride = padded_width(call->value_dim);
    for (int64_t i = 0; i < group->queries; i++) {
        int64_t token = task->first_token + i / group->heads, head = group->first_head + i % group->heads;
        int64_t to = (token * call->query_heads + head) * call->value_dim;
        float share = 1.0f / group->sums[i];
        for (int64_t d = 0; d < call->value_dim; d += VECTOR_LANES) {
            vec part = load(group->out + i * stride + d) * share;
            if (call->value_dim - d < VECTOR_LANES)
                store_part(call->query_type, call->out, to + d, part, call->value_dim - d);
            else store_as(call->query_type, call->out, to + d, part);
        }
    }
}

static void attend(const void *context, int64_t item, int worker) {
    const AttentionPlan *plan = context;
    const AttentionCall *call = &plan->call;
    const AttentionTask task = find_task(plan, item);
    const int64_t value_floats = PANEL_WIDTH * padded_width(call->value_dim);
    float *memory = (float *)((char *)call->workspace + plan_bytes(call->rows)) +
                    worker * worker_floats(call->head_dim, call->value_dim);
    Scratch scratch = {.keys = memory, .values = memory + call->head_dim * PANEL_WIDTH};
    scratch.scores = scratch.values + value_floats;
    for (int64_t i = 0; i < value_floats; i++) scratch.values[i] = 0;
    memory = scratch.scores + GROUP_QUERIES * PANEL_WIDTH;
    Group groups[TASK_GROUPS];
    for (int64_t g = 0; g < task.groups; g++, memory += group_floats(call->head_dim, call->value_dim))
        start_group(plan, &task, task.first_group + g, memory, &groups[g]);
    const int64_t end = task.first_position + task.tokens;
    int64_t slots[2][PANEL_WIDTH], count = find_slots(call, &task, 0, end, slots[0]);
    stream_tile(call, slots[0], count, groups[0].kv_head, groups[task.groups - 1].kv_head);
    for (int64_t start = 0, now = 0; start < end; start += PANEL_WIDTH, now = !now) {
        const int64_t after = start + PANEL_WIDTH, next = after < end ? find_slots(call, &task, after, end, slots[!now]) : 0;
        for (int64_t g = 0; g < task.groups; g++) {
            const int64_t head = groups[g].kv_head;
            const int copied = !reads_values_in_place(plan, &groups[g]);
            if (g == 0 || head != groups[g - 1].kv_head) {
                fetch_tile(call, slots[!now], next, head);
                if (call->cache_type == BFLOAT16) gather_tile(BFLOAT16, call, slots[now], count, head, copied, &scratch);
                else gather_tile(FLOAT32, call, slots[now], count, head, copied, &scratch);
            }
            attend_tile(call, &task, start, count, copied, &groups[g], &scratch);
        }
        count = next;
    }
    for (int64_t g = 0; g < task.groups; g++) write_output(call, &task, &groups[g]);
}

static void attention(const AttentionCall *call) {
    AttentionPlan plan = {.call = *call};
    int64_t shared = call->query_heads / call->kv_heads;
    plan.groups_per_kv_head = (shared + GROUP_QUERIES - 1) / GROUP_QUERIES;
    plan.heads_per_group = (shared + plan.groups_per_kv_head - 1) / plan.groups_per_kv_head;
    plan.tokens_per_task = GROUP_QUERIES / plan.heads_per_group;
    plan.groups = call->kv_heads * plan.groups_per_kv_head;
    /* Tokens lie in the cache with their heads side by side: a task that takes several reads longer runs of memory,
     * but only where enough tasks are left for all threads. */
    plan.groups_per_task = 1;
    if (call->rows >= 4 * call->threads) plan.groups_per_task = plan.groups < TASK_GROUPS ? plan.groups : TASK_GROUPS;
    int64_t shares = (plan.groups + plan.groups_per_task - 1) / plan.groups_per_task;
    if (call->decodes) {
        slim_parallel_for(call->rows * shares, call->threads, attend, &plan, sizeof(plan));
        return;
    }
    int64_t *first_task = call->workspace;
    first_task[0] = 0;
    for (int64_t row = 0; row < call->rows; row++) {
        int64_t tokens = call->query_starts[row + 1] - call->query_starts[row];
        int64_t tiles = (tokens + plan.tokens_per_task - 1) / plan.tokens_per_task;
        first_task[row + 1] = first_task[row] + tiles * shares;
    }
    plan.first_task = first_task;
    slim_parallel_for(first_task[call->rows], call->threads, attend, &plan, sizeof(plan));
}

#endif
