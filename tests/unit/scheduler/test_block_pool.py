from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.scheduler.block_pool import BlockPool, block_hash, root_hash


def names(count: int, salt: str = "") -> list[bytes]:
    """Hashes of a sequence of ``count`` blocks of two tokens."""
    hashes = [root_hash("model", salt)]
    for index in range(count):
        hashes.append(block_hash(hashes[-1], [index, index]))
    return hashes[1:]


def reserve(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.reserve((), count)
    assert blocks is not None
    return blocks


def cached_row(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Blocks that were written, committed and released."""
    blocks = reserve(pool, len(hashes))
    for block, digest in zip(blocks, hashes, strict=True):
        pool.commit(block, digest)
    pool.release(blocks)
    return blocks


def test_a_hash_names_model_salt_history_and_tokens() -> None:
    root = root_hash("model", "salt")
    assert root == root_hash("model", "salt")
    others = [root_hash("modelsalt", ""), root_hash("model", "other"), root_hash("", "modelsalt")]
    block = block_hash(root, [1, 2])
    others += [
        block_hash(root, [2, 1]),
        block_hash(root, [1]),
        block_hash(block, [1, 2]),
        block_hash(others[0], [1, 2]),
    ]
    assert len({root, block, *others}) == 2 + len(others)


def test_counts_follow_a_block_through_its_life() -> None:
    pool = BlockPool(4)
    assert (pool.used, pool.cached, pool.available) == (0, 0, 4)
    blocks = reserve(pool, 3)
    pool.commit(blocks[0], names(1)[0])
    assert (pool.used, pool.cached, pool.available) == (3, 0, 1)
    pool.release(blocks)
    assert (pool.used, pool.cached, pool.available) == (0, 1, 4)
    matched = pool.match(names(1))
    assert matched == blocks[:1]
    assert pool.reserve(matched, 0) == []
    assert (pool.used, pool.cached, pool.available) == (1, 0, 3)


def test_match_ends_at_the_first_unknown_block_and_changes_nothing() -> None:
    pool = BlockPool(8)
    blocks = cached_row(pool, names(3))
    other_branch = [*names(1), block_hash(names(1)[0], [9, 9]), *names(3)[2:]]
    assert pool.match(names(5)) == blocks
    assert pool.match(other_branch) == blocks[:1]
    assert pool.match(names(3, "other salt")) == []
    assert (pool.used, pool.cached) == (0, 3)


def test_a_shared_block_is_free_only_after_its_last_row() -> None:
    pool = BlockPool(4)
    first = reserve(pool, 1)
    pool.commit(first[0], names(1)[0])
    matched = pool.match(names(1))
    blank = pool.reserve(matched, 1)
    assert blank is not None
    pool.release(first)
    assert (pool.used, pool.cached) == (2, 0)
    pool.release(matched + blank)
    assert (pool.used, pool.cached) == (0, 1)


def test_reserve_keeps_what_it_has_to_and_changes_nothing_when_short() -> None:
    pool = BlockPool(5)
    cached = cached_row(pool, names(2))
    assert pool.reserve((), 6) is None
    assert pool.reserve((), 3, keep=3) is None
    # Matched blocks stop being available too.
    assert pool.reserve(cached, 2, keep=2) is None
    assert (pool.used, pool.cached, pool.available) == (0, 2, 5)
    assert pool.match(names(2)) == cached
    blank = pool.reserve(cached, 2, keep=1)
    assert blank is not None
    assert not set(blank) & set(cached)
    assert pool.integrity([cached + blank]) == []


def test_reuse_takes_blank_blocks_first_then_the_longest_unused_from_its_end() -> None:
    pool = BlockPool(5)
    old = cached_row(pool, names(2, "old"))
    new = cached_row(pool, names(2, "new"))
    blank = reserve(pool, 1)
    assert not set(blank) & {*old, *new}
    assert reserve(pool, 1) == old[1:]
    assert pool.match(names(2, "old")) == old[:1]
    # A hit makes the old prefix the most recently used.
    assert pool.reserve(old[:1], 0) == []
    pool.release(old[:1])
    assert reserve(pool, 3) == [new[1], new[0], old[0]]
    assert pool.cached == 0


def test_equal_content_stays_findable_in_its_first_block() -> None:
    pool = BlockPool(4)
    blocks = reserve(pool, 2)
    pool.commit(blocks[0], names(1)[0])
    pool.commit(blocks[1], names(1)[0])
    assert pool.match(names(1)) == blocks[:1]
    pool.release(blocks[1:])
    assert (pool.cached, pool.available) == (0, 3)
    assert pool.integrity([blocks[:1]]) == []


@pytest.mark.parametrize("held", [[], [0], [0, 0, 1], [0, 1, 2], [0, 1, 7]])
def test_integrity_finds_references_that_no_row_holds(held: list[int]) -> None:
    pool = BlockPool(4)
    assert sorted(reserve(pool, 2)) == [0, 1]
    assert pool.integrity([[0], [1]]) == []
    assert pool.integrity([held]) != []


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls, compared with rows that remember what they hold."""

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.rows: list[tuple[list[int], list[bytes]]] = []

    @rule(length=st.integers(1, 6), branch=st.integers(0, 2), keep=st.integers(0, 2))
    def admit(self, length: int, branch: int, keep: int) -> None:
        hashes = names(length, str(branch))
        matched = self.pool.match(hashes)
        before = self.pool.available
        blank = self.pool.reserve(matched, length - len(matched), keep)
        if blank is None:
            assert self.pool.available == before < length + keep
        else:
            assert self.pool.available >= keep
            self.rows.append((matched + blank, hashes))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        blocks, hashes = data.draw(st.sampled_from(self.rows))
        for block, digest in zip(blocks, hashes, strict=True):
            self.pool.commit(block, digest)
        assert len(self.pool.match(hashes)) == len(hashes)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks, _ = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        self.pool.release(blocks)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.integrity(blocks for blocks, _ in self.rows) == []
            assert self.pool.used == len({block for blocks, _ in self.rows for block in blocks})


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
