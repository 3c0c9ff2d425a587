"""The products and the softmax of ``hopper_attention``: what each of its two groups of four warps does.

A group starts the scores of the next keys, then the sums over the last ones, and takes the softmax of the scores while
the sums are still being computed; and while one group takes its softmax, the other's products run. A tile's queries
are on their way while the tile before is still multiplied, its first scores are computed together with that tile's last
sums, and that tile's results are written while the next one runs. The method is that of FlashAttention-3 (Shah et al.
2024), for a cache in blocks.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engines.kernels.cuda.hopper_tiles import keys_seen, noted


@gluon.jit
def _fetch_queries(
    q, turn, queries, token_stride, head_stride, start, count, tile, kv_head, GROUP: gl.constexpr, SECOND: gl.constexpr
):  # fmt: skip
    """Begin to load the group's 64 lines; those behind the row's last token are copies of its lines."""
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    line = tile * 128 + SECOND * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, loads))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, loads))
    token, head, first = gl.minimum(line // GROUP, count - 1), kv_head * GROUP + line % GROUP, tile * 128 // GROUP
    source = queries + (start + first).to(gl.int64) * token_stride
    source += ((token - first) * token_stride + head * head_stride)[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(q.index(turn % 2 * 2), source)
    async_copy.async_copy_global_to_shared(q.index(turn % 2 * 2 + 1), source + 64)
    async_copy.commit_group()


@gluon.jit
def _have_queries():
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _last_keys(count, earlier, tile, layout: gl.constexpr, GROUP: gl.constexpr, SECOND: gl.constexpr):
    """The last key that each of the group's lines sees."""
    line = tile * 128 + SECOND * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    return earlier + gl.minimum(line // GROUP, count - 1)


@gluon.jit
def _scores(q, turn, k_tiles, slot, KEYS: gl.constexpr, layout: gl.constexpr):
    scores = gl.zeros([64, KEYS], gl.float32, layout)
    buffer = turn % 2 * 2
    keys = k_tiles.index(slot * 2).permute((1, 0))
    scores = warpgroup_mma(q.index(buffer), keys, scores, use_acc=False, is_async=True)
    return warpgroup_mma(q.index(buffer + 1), k_tiles.index(slot * 2 + 1).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _softmax(scores, last, first, scale, best, total, KEYS: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr):
    """Weights of one more tile of scores, the running maximum and total, and what the sums shrink by."""
    if MASKED:
        place = first + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
        scores = gl.where(place[None, :] <= last[:, None], scores, float("-inf"))
    higher = gl.maximum(best, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - higher[:, None])
    shrink = gl.exp2(best - higher)
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _attend_steps(
    begin, end, base, q, turn, k_tiles, v_tiles, full, empty, last, scale, best, total, weights, left, right,
    KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr, sums_layout: gl.constexpr
):  # fmt: skip
    """Scores of steps ``begin`` to ``end`` of a tile whose first is at ``base``, and the sums of those before each."""
    for step in range(begin, end):
        slot, behind = (base + step) % STAGES, base + step + 1
        scores = _scores(q, turn, k_tiles, slot, KEYS, layout)
        left = warpgroup_mma(weights, v_tiles.index(slot * 2), left, is_async=True)
        right = warpgroup_mma(weights, v_tiles.index(slot * 2 + 1), right, is_async=True)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        wide, best, total, shrink = _softmax(scores, last, step * KEYS, scale, best, total, KEYS, MASKED, layout)
        fresh = gl.convert_layout(wide.to(weights.dtype), weights.type.layout)
        # The next step is waited for here because ptxas moves no softmax past a loop: it belongs before the next line.
        mbarrier.wait(full.index(behind % STAGES), (behind // STAGES) & 1)
        left, right, weights, fresh, total = warpgroup_mma_wait(0, deps=(left, right, weights, fresh, total))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        factor = gl.convert_layout(shrink, gl.SliceLayout(1, sums_layout))[:, None]
        left *= factor
        right *= factor
        weights = fresh
    return best, total, weights, left, right


@gluon.jit
def _clean(v_tiles, slot, known, KEYS: gl.constexpr):
    """Zeros behind the first ``known`` values: behind a row's end may be NaN, which no weight of zero hides."""
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if known < KEYS:
        present = gl.arange(0, KEYS, layout=gl.SliceLayout(1, loads)) < known
        for half in gl.static_range(2):
            v = v_tiles.index(slot * 2 + half)
            v.store(gl.where(present[:, None], v.load(loads), 0.0))


@gluon.jit
def _write(
    output, q, turn, left, right, total, start, count, tile, kv_head, HEADS: gl.constexpr, GROUP: gl.constexpr,
    SECOND: gl.constexpr, sums_layout: gl.constexpr
):  # fmt: skip
    """By way of the tile's queries, which nothing reads any more: so each thread writes 16 bytes that lie together."""
    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, sums_layout))[:, None]
    buffer = turn % 2 * 2
    q.index(buffer).store((left * share).to(output.dtype.element_ty))
    q.index(buffer + 1).store((right * share).to(output.dtype.element_ty))
    gl.thread_barrier()
    writes: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    line = tile * 128 + SECOND * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, writes))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, writes))
    token, head, first = line // GROUP, kv_head * GROUP + line % GROUP, tile * 128 // GROUP
    target = output + (start + first).to(gl.int64) * (HEADS * 128)
    target += ((token - first) * HEADS + head)[:, None] * 128 + column[None, :]
    mask = (token < count)[:, None]
    gl.store(target, q.index(buffer).load(writes), mask=mask)
    gl.store(target + 64, q.index(buffer + 1).load(writes), mask=mask)
    # The tile after the next one's queries come here.
    gl.thread_barrier()


@gluon.jit
def multiply_tiles(
    q, k_tiles, v_tiles, full, empty, notes, queries, output, token_stride, head_stride, start, count, earlier, tile,
    kv_head, more, scale, HEADS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    SECOND: gl.constexpr
):  # fmt: skip
    """A group of four warps: the first 64 lines of every tile, or the SECOND ones."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    if more:
        _fetch_queries(q, 0, queries, token_stride, head_stride, start, count, tile, kv_head, GROUP, SECOND)
        _have_queries()
        nothing = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        zero = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
        left = gl.zeros([64, 64], gl.float32, sums_layout)
        right = gl.zeros([64, 64], gl.float32, sums_layout)
        last = _last_keys(count, earlier, tile, layout, GROUP, SECOND)
        mbarrier.wait(full.index(0), 0)
        scores = warpgroup_mma_wait(0, deps=(_scores(q, 0, k_tiles, 0, KEYS, layout),))
        wide, best, total, _ = _softmax(scores, last, 0, scale, nothing, zero, KEYS, True, layout)
        gl.thread_barrier()
        mbarrier.arrive(empty.index(0), count=1)
        weights = gl.convert_layout(wide.to(queries.dtype.element_ty), weights_layout)
        mbarrier.wait(full.index(1 % STAGES), (1 // STAGES) & 1)
        base, turn = tile * 0, tile * 0
        while more:
            next_start, next_count = noted(notes, turn + 1, 0), noted(notes, turn + 1, 1)
            next_earlier, next_tile = noted(notes, turn + 1, 2), noted(notes, turn + 1, 3)
            next_head, more = noted(notes, turn + 1, 4), noted(notes, turn + 1, 5) != 0
            _fetch_queries(
                q, turn + 1, queries, token_stride, head_stride, next_start, next_count, next_tile, next_head, GROUP,
                SECOND
            )  # fmt: skip
            steps = (keys_seen(count, earlier, tile, GROUP) + KEYS - 1) // KEYS
            # Whole tiles of keys that every line of the tile sees.
            common = gl.maximum((earlier + tile * 128 // GROUP + 1) // KEYS, 1)
            best, total, weights, left, right = _attend_steps(
                1, common, base, q, turn, k_tiles, v_tiles, full, empty, last, scale, best, total, weights, left,
                right, KEYS, STAGES, False, layout, sums_layout
            )  # fmt: skip
            best, total, weights, left, right = _attend_steps(
                common, steps, base, q, turn, k_tiles, v_tiles, full, empty, last, scale, best, total, weights, left,
                right, KEYS, STAGES, True, layout, sums_layout
            )  # fmt: skip

            # The next tile's first scores; behind the last tile of what happens to lie there, used by nothing.
            base += steps
            slot = base % STAGES
            _clean(v_tiles, slot, earlier + count - (steps - 1) * KEYS, KEYS)
            _have_queries()
            scores = _scores(q, turn + 1, k_tiles, slot, KEYS, layout)
            left = warpgroup_mma(weights, v_tiles.index(slot * 2), left, is_async=True)
            right = warpgroup_mma(weights, v_tiles.index(slot * 2 + 1), right, is_async=True)
            scores = warpgroup_mma_wait(2, deps=(scores,))
            last = _last_keys(next_count, next_earlier, next_tile, layout, GROUP, SECOND)
            wide, best, next_total, _ = _softmax(scores, last, 0, scale, nothing, zero, KEYS, True, layout)
            fresh = gl.convert_layout(wide.to(weights.dtype), weights_layout)
            behind = base + 1
            mbarrier.wait(full.index(behind % STAGES), (behind // STAGES) & 1, pred=more)
            left, right, weights, fresh, next_total = warpgroup_mma_wait(
                0, deps=(left, right, weights, fresh, next_total)
            )
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            _write(
                output, q, turn, left, right, total, start, count, tile, kv_head, HEADS, GROUP, SECOND, sums_layout
            )  # fmt: skip
            start, count, earlier, tile, kv_head = next_start, next_count, next_earlier, next_tile, next_head
            total, weights, turn = next_total, fresh, turn + 1
            left = gl.zeros([64, 64], gl.float32, sums_layout)
            right = gl.zeros([64, 64], gl.float32, sums_layout)
