"""In what order the programs of ``hopper_attention`` take tiles, and the warp that finds them and loads their keys.

Tiles are taken in the order of the keys that they attend to, most first: a tile's *level* is its place in a row's
context, cached tokens included, in tiles. A program's first tile has the program's number; its second one is as far
from the end of the next round, so that who began with most goes on with least, or has none; and from then on whoever
has begun a tile draws the number of its next one. So no program has much more to do than the others, whatever the rows'
lengths. Which program computes a tile changes nothing in it.

The moving warp leaves a note of each tile for the groups that multiply, before the second load of the tile before it:
who has waited for that load may read the note.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def levels(
    query_starts, context_lengths, first_row, rows, skip_single, GROUP: gl.constexpr, ROWS: gl.constexpr,
    WARPS: gl.constexpr
):  # fmt: skip
    """Each row's lowest level, its tiles, the level above all, and tiles of all rows."""
    layout: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [WARPS], [0])  # each warp for itself
    row = first_row + gl.arange(0, ROWS, layout=layout)
    start = gl.load(query_starts + row, mask=row < rows, other=0)
    count = gl.load(query_starts + row + 1, mask=row < rows, other=0) - start
    context = gl.load(context_lengths + row, mask=row < rows, other=0)
    tiles = gl.where((count == 1) & (skip_single != 0), 0, (count * GROUP + 127) // 128)
    lowest = (context - count) * GROUP // 128
    return lowest, tiles, gl.max(gl.where(tiles > 0, lowest + tiles, 0), 0), gl.sum(tiles, 0)


@gluon.jit
def _tiles_from(level, lowest, tiles):
    return gl.sum(gl.minimum(gl.maximum(lowest + tiles - level, 0), tiles), 0)


@gluon.jit
def find_tile(number, lowest, tiles, level, query_starts, context_lengths, first_row, rows, GROUP: gl.constexpr):
    """The tile of this number among those below ``level``: its row, the row's start and count and earlier tokens, its
    place in the row, its level."""
    low, high = number * 0, level
    while low + 1 < high:
        middle = (low + high) // 2
        enough = _tiles_from(middle, lowest, tiles) > number
        low = gl.where(enough, middle, low)
        high = gl.where(enough, high, middle)
    rank = number - _tiles_from(low + 1, lowest, tiles)
    here = (lowest <= low) & (low < lowest + tiles)
    row = first_row + gl.sum((gl.associative_scan(here.to(gl.int32), 0, _add) <= rank).to(gl.int32), 0)
    row = gl.minimum(row, rows - 1)
    start = gl.load(query_starts + row)
    count = gl.load(query_starts + row + 1) - start
    earlier = gl.load(context_lengths + row) - count
    return row, start, count, earlier, low - earlier * GROUP // 128, low


@gluon.jit
def keys_seen(count, earlier, tile, GROUP: gl.constexpr):
    """Keys that any line of the tile sees."""
    return earlier + gl.minimum(count, (tile * 128 + 127) // GROUP + 1)


@gluon.jit
def _load_blocks(
    position, keys, values, key_blocks, value_blocks, full, empty, ahead, ahead_step, ahead_last, ahead_column, behind,
    behind_step, behind_last, behind_column, some_keys, some_values, BLOCK: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr
):  # fmt: skip
    """Keys of one step, and values of the step before it, which may be of the tile before: they are needed together."""
    parts: gl.constexpr = KEYS // BLOCK
    slot = position % STAGES
    first, second = (), ()
    for part in gl.static_range(parts):
        first += (gl.load(ahead + gl.minimum(ahead_step * parts + part, ahead_last)) * BLOCK,)  # type: ignore[assignment]
        second += (gl.load(behind + gl.minimum(behind_step * parts + part, behind_last)) * BLOCK,)  # type: ignore[assignment]
    if position >= STAGES:
        mbarrier.wait(empty.index(slot), (position // STAGES - 1) & 1)
    both = some_keys & some_values
    mbarrier.expect(full.index(slot), 2 * KEYS * 256, pred=both)
    mbarrier.expect(full.index(slot), KEYS * 256, pred=both == 0)
    for part in gl.static_range(parts):
        for half in gl.static_range(2):
            place = (slot * 2 + half) * parts + part
            tma.async_copy_global_to_shared(
                keys, [first[part], ahead_column + half * 64], full.index(slot), key_blocks.index(place),
                pred=some_keys
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                values, [second[part], behind_column + half * 64], full.index(slot), value_blocks.index(place),
                pred=some_values
            )  # fmt: skip


@gluon.jit
def _note(notes, turn, field: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    notes.index(turn % 8 * 8 + field).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _note_tile(notes, turn, start, count, earlier, tile, kv_head, more):
    """With ``more`` == 0 behind the program's last tile: the note is of some tile, for addresses that exist."""
    _note(notes, turn, 0, start)
    _note(notes, turn, 1, count)
    _note(notes, turn, 2, earlier)
    _note(notes, turn, 3, tile)
    _note(notes, turn, 4, kv_head)
    _note(notes, turn, 5, more.to(gl.int32))
    gl.thread_barrier()


@gluon.jit
def noted(notes, turn, field: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(notes.index(turn % 8 * 8 + field).load(layout), 0)


@gluon.jit
def _draw(drawn, draws):
    """In the first lane the number of draws before this one. Who does not look at it yet does not wait for it."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    return gl.atomic_add(drawn + lane, (lane == 0).to(gl.int32), mask=(lane == 0) & draws, sem="relaxed")


@gluon.jit
def _first(lanes):
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    return gl.sum(gl.where(lane == 0, lanes, 0), 0)


@gluon.jit
def _table(block_tables, table_rows, table_stride, row, TABLE_ROWS: gl.constexpr):
    line = row
    if TABLE_ROWS:
        line = gl.load(table_rows + row)
    return block_tables + line.to(gl.int64) * table_stride


@gluon.jit
def move_tiles(
    keys, values, key_blocks, value_blocks, full, empty, notes, drawn, query_starts, context_lengths, block_tables,
    table_rows, rows, first_row, table_stride, skip_single, row, count, earlier, tile, level, more,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, TABLE_ROWS: gl.constexpr
):  # fmt: skip
    """The moving warp, from the program's first tile on. A note's place is written again after eight tiles: of those
    before it at most STAGES have steps that have not been multiplied."""
    programs, unit = gl.num_programs(0), gl.program_id(0)
    lowest, tiles, _, total = levels(
        query_starts, context_lengths, first_row, rows, skip_single, GROUP, ROWS, 1
    )  # fmt: skip
    units = total * KV_HEADS
    position, turn = unit * 0, unit * 0
    table = _table(block_tables, table_rows, table_stride, row, TABLE_ROWS)
    behind, behind_step, behind_last, behind_column = block_tables, unit * 0, unit * 0, unit * 0
    while more:
        asked = _draw(drawn, turn > 0)
        last_block = (earlier + count - 1) // BLOCK
        column = unit % KV_HEADS * 128
        steps = (keys_seen(count, earlier, tile, GROUP) + KEYS - 1) // KEYS
        _load_blocks(
            position, keys, values, key_blocks, value_blocks, full, empty, table, 0, last_block, column, behind,
            behind_step, behind_last, behind_column, turn >= 0, turn > 0, BLOCK, KEYS, STAGES
        )  # fmt: skip

        number = 2 * programs + gl.where(turn > 0, _first(asked), -1 - gl.program_id(0))
        # Who has a second tile draws until there is none: as often in all as there are tiles behind the first round.
        # The last sets the counter back.
        if number == units + programs - 1:
            gl.store(drawn, 0)
        more = number < units
        # Behind the program's last tile the last of all, which is fetched in vain.
        unit = gl.minimum(number, units - 1)
        row, start, count, earlier, tile, level = find_tile(
            unit // KV_HEADS, lowest, tiles, level + 1, query_starts, context_lengths, first_row, rows, GROUP
        )
        next_table = _table(block_tables, table_rows, table_stride, row, TABLE_ROWS)
        _note_tile(notes, turn + 1, start, count, earlier, tile, unit % KV_HEADS, more)

        for step in range(1, steps):
            _load_blocks(
                position + step, keys, values, key_blocks, value_blocks, full, empty, table, step, last_block, column,
                table, step - 1, last_block, column, step > 0, step > 0, BLOCK, KEYS, STAGES
            )  # fmt: skip
        behind, behind_step, behind_last, behind_column = table, steps - 1, last_block, column
        position, turn, table = position + steps, turn + 1, next_table
    if turn > 0:
        _load_blocks(
            position, keys, values, key_blocks, value_blocks, full, empty, behind, behind_step, behind_last,
            behind_column, behind, behind_step, behind_last, behind_column, turn < 0, turn > 0, BLOCK, KEYS, STAGES
        )  # fmt: skip
