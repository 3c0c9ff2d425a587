/* What calls.py calls: choice of the instruction set, the team of threads, tapes, and one exported function an operation. */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))

#define CACHE_LINE 64
#define PATIENT_LOOKS 2000 /* at what other threads do, before the core is offered to somebody else */
#define SHARES 3           /* a thread takes one of so many parts of what would be its share of the items left */
#define MOST_HELPERS 255

/* One loop of independent items. A phase begins when all items of the one before it are done. */
typedef struct {
    TaskBody body;
    const void *context;
    int64_t items;
} Phase;

/* Of one phase. ``next`` has the number of its run in the upper half: who is late takes no item of a later run. */
typedef struct {
    _Alignas(CACHE_LINE) uint64_t next;
    _Alignas(CACHE_LINE) int64_t done;
} Progress;

typedef struct {
    const Phase *phases;
    Progress *progress;
    int64_t count;
    int threads;
} Run;

/* Helpers take items of whatever run there is. Nobody waits for a helper, only for items that one has taken, so a
 * helper that has no core, or was lost in a fork, costs nothing but its help. One run at a time is helped. */
static struct {
    int owned;       /* by the thread whose run it is */
    uint32_t number; /* of the present run, 0 where there is none */
    uint32_t last;   /* number that was given */
    Run run;
    Phase phase;
    Progress progress; /* of a run of one phase */
    int helpers, asleep;
    const Progress *busy[MOST_HELPERS + 1]; /* what each helper looks at */
    pthread_mutex_t lock;
    pthread_cond_t wake;
} team = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void relax(int looks) {
    if (looks > PATIENT_LOOKS) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

/* Takes items that the caller has to do, from ``*first`` on: many while many are left, in the end one by one. Returns
 * how many. */
static int64_t take_items(Progress *progress, uint32_t number, int64_t items, int threads, int64_t *first) {
    uint64_t next = __atomic_load_n(&progress->next, __ATOMIC_ACQUIRE);
    int64_t count;
    do {
        const int64_t left = items - (int64_t)(uint32_t)next;
        if ((uint32_t)(next >> 32) != number || left <= 0) return 0;
        count = left / ((int64_t)threads * SHARES);
        if (count == 0) count = 1;
    } while (!__atomic_compare_exchange_n(&progress->next, &next, next + (uint64_t)count, 1, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    *first = (int64_t)(uint32_t)next;
    return count;
}

static int is_over(uint32_t number) {
    return __atomic_load_n(&team.number, __ATOMIC_ACQUIRE) != number;
}

static void take_part(const Run *run, uint32_t number, int worker) {
    for (int64_t at = 0; at < run->count; at++) {
        const Phase *phase = &run->phases[at];
        Progress *progress = &run->progress[at];
        const int64_t items = phase->items;
        int64_t first, count;
        while ((count = take_items(progress, number, items, run->threads, &first)) > 0) {
            for (int64_t item = first; item < first + count; item++) phase->body(phase->context, item, worker);
            __atomic_fetch_add(&progress->done, count, __ATOMIC_RELEASE);
        }
        for (int looks = 0; __atomic_load_n(&progress->done, __ATOMIC_ACQUIRE) < items; looks++) {
            if (is_over(number)) return;
            relax(looks);
        }
    }
}

/* Number of the run that comes after that of number ``seen``. */
static uint32_t await_run(uint32_t seen) {
    uint32_t number;
    for (int looks = 0; looks < PATIENT_LOOKS; looks++) {
        number = __atomic_load_n(&team.number, __ATOMIC_SEQ_CST);
        if (number && number != seen) return number;
        relax(looks);
    }
    pthread_mutex_lock(&team.lock);
    __atomic_fetch_add(&team.asleep, 1, __ATOMIC_SEQ_CST);
    while ((number = __atomic_load_n(&team.number, __ATOMIC_SEQ_CST)) == 0 || number == seen)
        pthread_cond_wait(&team.wake, &team.lock);
    __atomic_fetch_sub(&team.asleep, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&team.lock);
    return number;
}

static void *help(void *place) {
    const int worker = (int)(intptr_t)place;
    uint32_t seen = 0;
    for (;;) {
        seen = await_run(seen);
        const Run run = team.run; /* parts of two, where it has changed meanwhile: then it is over */
        __atomic_store_n(&team.busy[worker], run.progress, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (!is_over(seen) && worker < run.threads) take_part(&run, seen, worker);
        __atomic_store_n(&team.busy[worker], NULL, __ATOMIC_RELEASE);
    }
    return NULL;
}

static void forget_helpers(void) {
    team.owned = team.helpers = team.asleep = 0;
    team.number = 0;
    memset(team.busy, 0, sizeof(team.busy));
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.wake, NULL);
}

static void hire_helpers(int wanted) {
    static int prepared;
    if (!prepared) prepared = pthread_atfork(NULL, NULL, forget_helpers) == 0;
    if (wanted > MOST_HELPERS) wanted = MOST_HELPERS;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    while (team.helpers < wanted && pthread_create(&thread, NULL, help, (void *)(intptr_t)(team.helpers + 1)) == 0) {
        pthread_detach(thread);
        team.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* ``progress`` is NULL for a run of one phase. */
static void run_phases(const Phase *phases, Progress *progress, int64_t count, int threads) {
    if (threads <= 1 || __atomic_exchange_n(&team.owned, 1, __ATOMIC_ACQUIRE)) {
        for (int64_t at = 0; at < count; at++)
            for (int64_t item = 0; item < phases[at].items; item++) phases[at].body(phases[at].context, item, 0);
        return;
    }
    if (team.helpers < threads - 1) hire_helpers(threads - 1);
    team.last = team.last == UINT32_MAX ? 1 : team.last + 1;
    if (progress == NULL) {
        progress = &team.progress;
        team.phase = *phases;
        phases = &team.phase;
    }
    for (int64_t at = 0; at < count; at++) {
        __atomic_store_n(&progress[at].next, (uint64_t)team.last << 32, __ATOMIC_RELAXED);
        __atomic_store_n(&progress[at].done, 0, __ATOMIC_RELAXED);
    }
    team.run = (Run){phases, progress, count, threads};
    __atomic_store_n(&team.number, team.last, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&team.asleep, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.lock);
    }
    take_part(&team.run, team.last, 0);
    __atomic_store_n(&team.number, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&team.owned, 0, __ATOMIC_RELEASE);
}

/* The phases of many operations, which it runs again as one. */
typedef struct {
    Phase *phases;
    Progress *progress; /* (count), made for the first run */
    int64_t count, room;
    int threads; /* the most that the phases have memory for */
    int failed;  /* there was no memory to record them all */
} Tape;

static _Thread_local Tape *recording;

static void record(Tape *tape, const Phase *phase, size_t context_bytes) {
    if (tape->count == tape->room) {
        const int64_t room = 2 * tape->room + 64;
        Phase *grown = realloc(tape->phases, (size_t)room * sizeof(Phase));
        if (grown == NULL) {
            tape->failed = 1;
            return;
        }
        tape->phases = grown;
        tape->room = room;
    }
    void *context = malloc(context_bytes);
    if (context == NULL) {
        tape->failed = 1;
        return;
    }
    memcpy(context, phase->context, context_bytes);
    tape->phases[tape->count++] = (Phase){phase->body, context, phase->items};
}

void slim_parallel_for(int64_t items, int threads, TaskBody body, const void *context, size_t context_bytes) {
    const Phase phase = {body, context, items};
    run_phases(&phase, NULL, 1, items < threads ? (int)items : threads);
    if (recording) record(recording, &phase, context_bytes);
}

/* What the calling thread does from now on goes on a new tape too, until slim_tape_end. Its calls say ``threads``. */
EXPORT Tape *slim_tape_begin(int threads) {
    recording = calloc(1, sizeof(Tape));
    if (recording) recording->threads = threads;
    return recording;
}

EXPORT void slim_tape_free(Tape *tape) {
    /* A helper that is late may still look at it. */
    for (int worker = 1; tape->progress && worker <= MOST_HELPERS; worker++)
        while (__atomic_load_n(&team.busy[worker], __ATOMIC_SEQ_CST) == tape->progress) sched_yield();
    for (int64_t at = 0; at < tape->count; at++) free((void *)tape->phases[at].context);
    free(tape->phases);
    free(tape->progress);
    free(tape);
}

/* Returns the number of phases on the tape; 0 where there was no memory for them all. */
EXPORT int64_t slim_tape_end(void) {
    Tape *tape = recording;
    recording = NULL;
    if (!tape->failed) tape->progress = aligned_alloc(CACHE_LINE, ((size_t)tape->count + 1) * sizeof(Progress));
    return tape->progress ? tape->count : 0;
}

EXPORT void slim_tape_run(Tape *tape, int threads) {
    run_phases(tape->phases, tape->progress, tape->count, threads < tape->threads ? threads : tape->threads);
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
                             int cache_type, int threads) {
    CacheWriteCall call = {entries, token_stride, head_stride, cache, slots, tokens, heads, width, entry_type,
                           cache_type, threads};
    kernels->write_cache(&call);
}

EXPORT void slim_embed(const KernelTable *kernels, const uint8_t *codes, const float *scale, const int64_t *ids, void *out, int64_t lines,
                       int64_t tokens, int64_t width, int64_t groups, int zero_point, int type, int threads) {
    EmbedCall call = {codes, scale, ids, out, lines, tokens, width, groups, zero_point, type, threads};
    kernels->embed(&call);
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
