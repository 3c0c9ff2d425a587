"""KV blocks as plain integers: who refers to a block, and which finished blocks can be found again by their content.

A block is in exactly one of three places:

    used     one or more live rows refer to it
    cached   nobody refers to it, but its hash is findable; reused in LRU order when nothing is free
    free     nobody refers to it and nothing worth keeping is in it

Why a block may be given away the moment its last reference is dropped, even with two steps in flight: every step of
an engine runs on one stream, in launch order. Whatever a launched step still writes to or reads from the block
happens before the first write of its new owner, which can only be in a plan that is made later. Within one plan no
block changes hands, because a row is never preempted after it was planned.

Why a findable block holds what its hash says: it is committed after the plan that writes its last token was made, so
a row that matches it runs in a later step. From then on nobody writes it: rows only append, and the one token that may
be written late or twice, the last settled one, lies in a block that is not committed yet (``Residents.commit``).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def root_hash(fingerprint: str, salt: str) -> bytes:
    """Parent of a sequence's first block. The fingerprint covers model and KV dtype; the salt keeps tenants apart."""
    digest = blake2b(digest_size=32)
    for part in (fingerprint.encode(), salt.encode("utf-8", "surrogatepass")):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full block: all tokens before it (through ``parent``) and its own."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=32).digest()


class BlockPool:
    """Block ids 0 .. total-1 with reference counts and the index of findable blocks. Only the step loop calls it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._references = [0] * total
        self._hashes: list[bytes | None] = [None] * total
        self._findable: dict[bytes, int] = {}
        self._free = list(range(total - 1, -1, -1))
        # An ordered dict is a linked list with an index: taking a block out of its middle is O(1).
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that a live row refers to."""
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Blocks that can be found, and are free to reuse."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that ``reserve`` could give out now."""
        return len(self._free) + len(self._cached)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest findable prefix. Changes nothing: ``reserve`` them before any other call."""
        blocks = []
        for digest in hashes:
            block = self._findable.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reserve(self, matched: Sequence[int], count: int, keep: int = 0) -> list[int] | None:
        """Refer to the matched blocks and to ``count`` blank ones, and return the blank ones.

        Returns None, and changes nothing, where fewer than ``keep`` blocks would stay available.
        """
        if not self.can_reserve(matched, count, keep):
            return None
        for block in matched:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        return [self._take() for _ in range(count)]

    def can_reserve(self, matched: Sequence[int], count: int, keep: int = 0) -> bool:
        """``reserve`` would give blocks."""
        unused = sum(1 for block in matched if self._references[block] == 0)
        return self.available - unused - count >= keep

    def commit(self, block: int, digest: bytes) -> None:
        """Make a used block findable, once. Where equal content is findable already, nothing changes."""
        if digest not in self._findable:
            self._hashes[block] = digest
            self._findable[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a row, given in sequence order."""
        # Last block first: a block is of no use without those before it, so it must be the first to be reused.
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def integrity(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Recount everything from the rows' block tables; one text for each contradiction."""
        errors = []
        counted: Counter[int] = Counter()
        for row in rows:
            counted.update(row)
        places = Counter(self._free)
        places.update(list(self._cached))  # a mapping would be taken for counts
        for block in range(self.total):
            held = counted[block]
            if self._references[block] != held:
                errors.append(f"block {block} has {self._references[block]} references, rows hold {held}")
            if places[block] != (0 if held else 1):
                errors.append(f"block {block} is listed {places[block]} times as unused, rows hold {held}")
            if block in self._cached and self._hashes[block] is None:
                errors.append(f"block {block} is cached without a hash")
        if {h: b for b, h in enumerate(self._hashes) if h is not None} != self._findable:
            errors.append("the index of findable blocks differs from the blocks' hashes")
        if foreign := [block for block in (*counted, *places) if not 0 <= block < self.total]:
            errors.append(f"blocks {foreign} do not exist")
        return errors

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            digest = self._hashes[block]
            assert digest is not None
            del self._findable[digest]
            self._hashes[block] = None
        self._references[block] = 1
        return block
