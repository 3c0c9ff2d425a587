"""In what order the programs of ``hopper_grouped`` take tiles, and the warp that finds them and loads what they need.

A program takes every n-th tile: those of the shared experts first, then of each expert those of a band of rows, column
after column. The moving warp leaves a note of each tile for the groups that multiply, before the tile's first load: who
has waited for that load may read the note.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def expert_sizes(counts, tokens, ROUTED: gl.constexpr, SHARED: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr):
    """Each expert's rows, shared ones first; every warp for itself."""
    layout: gl.constexpr = gl.BlockedLayout([BLOCK // 32], [32], [WARPS], [0])
    expert = gl.arange(0, BLOCK, layout=layout)
    chosen = (expert >= SHARED) & (expert < SHARED + ROUTED)
    found = gl.load(counts + (expert - SHARED), mask=chosen, other=0)
    return expert, gl.where(expert < SHARED, tokens, found)


@gluon.jit
def _note(notes, turn, slot, column, both):
    """What the groups have to know of a tile, before its first load. The place of a note is written again after eight
    tiles: those that are being multiplied have fewer steps than that."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    word = slot << 11 | column << 1 | both.to(gl.int32)
    notes.index(turn % 8).store(gl.full([1], word, gl.int32, layout))
    gl.thread_barrier()


@gluon.jit
def noted(notes, turn):
    """A tile's first slot, its column, and whether it has two slots."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    word = gl.sum(notes.index(turn % 8).load(layout), 0)
    return word >> 11, word >> 1 & 1023, (word & 1) != 0


@gluon.jit
def move_slots(
    inputs, shared_inputs, weights, x_tiles, w_tiles, full, empty, notes, counts, tokens, width, depth,
    column_tiles, ROUTED: gl.constexpr, SHARED: gl.constexpr, PARTS: gl.constexpr, BLOCK: gl.constexpr,
    GATED: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr
):  # fmt: skip
    """The moving warp."""
    expert, sizes = expert_sizes(counts, tokens, ROUTED, SHARED, BLOCK, 1)
    slots, tiles = (sizes + 63) // 64, (sizes + 127) // 128
    ends = gl.associative_scan(tiles, 0, _add) * column_tiles
    token_slots, steps = (tokens + 63) // 64, (depth + 63) // 64
    lines = width * 2 if GATED else width
    position, turn = tokens * 0, tokens * 0
    for number in range(gl.program_id(0), gl.max(ends, 0), gl.num_programs(0)):
        before = ends <= number
        chosen = gl.sum(before.to(gl.int32), 0)
        inside = number - gl.sum(gl.where(before, tiles, 0), 0) * column_tiles
        size = gl.sum(gl.where(expert == chosen, sizes, 0), 0)
        first = inside // (BAND * column_tiles) * BAND
        height = gl.minimum((size + 127) // 128 - first, BAND)
        inside -= first * column_tiles
        tile, column = first + inside % height, inside // height
        slot = gl.sum(gl.where(before, slots, 0), 0) + tile * 2
        both = size > tile * 128 + 64
        _note(notes, turn, slot, column, both)

        # Shared experts are the last ones of the weight. Down sums over all of them: their rows and weights follow.
        is_shared = chosen < SHARED
        row = gl.where(is_shared, tile * 2, slot - SHARED * token_slots) * 64
        line = gl.where(is_shared, ROUTED + chosen, chosen - SHARED) * lines
        line += column * (128 if GATED else 256)
        for _part in range(0, gl.where(is_shared, PARTS, 1)):
            for step in range(0, steps):
                place = position % STAGES
                # The first waits, for what came before the barriers' first phase, end at once.
                mbarrier.wait(empty.index(place), position // STAGES & 1 ^ 1)
                ready = full.index(place)
                mbarrier.expect(ready, (2 * 64 + 2 * 128) * 128, pred=both)
                mbarrier.expect(ready, (64 + 2 * 128) * 128, pred=both == 0)
                for group in gl.static_range(2):
                    own, target = [row + group * 64, step * 64], x_tiles.index(place * 2 + group)
                    wanted = both | (group == 0)
                    tma.async_copy_global_to_shared(inputs, own, ready, target, pred=wanted & (is_shared == 0))
                    tma.async_copy_global_to_shared(shared_inputs, own, ready, target, pred=wanted & is_shared)
                tma.async_copy_global_to_shared(weights, [line, step * 64], ready, w_tiles.index(place * 2))
                second = line + (width if GATED else 128)
                tma.async_copy_global_to_shared(weights, [second, step * 64], ready, w_tiles.index(place * 2 + 1))
                position += 1
            row += token_slots * 64
            line += lines
        turn += 1
