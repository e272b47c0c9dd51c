"""The KV cache's blocks: who holds them, which of them hold a known prefix, which one is given out next."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockHash = bytes


def root_hash(cache_salt: str, adapter_digest: str, length_class: int = 0) -> BlockHash:
    """Where a hash chain starts: SHA-256 of the namespace.

    Keys and values depend on the adapter, and timing tells a hit from a miss, so neither another adapter's nor another
    tenant's blocks may ever match. The salt's length goes first: ("ab", "c") and ("a", "bc") differ. With a RoPE
    scaling that depends on the length, keys also depend on `Rotary.length_class` of the prompt.
    """
    salt = cache_salt.encode()
    head = len(salt).to_bytes(8, "little") + length_class.to_bytes(8, "little")
    return hashlib.sha256(head + salt + adapter_digest.encode()).digest()


def chain_hash(parent: BlockHash, token_ids: Sequence[int], begins: tuple[str, int] | None = None) -> BlockHash:
    """Hash of a full block: what precedes it (`parent`) and its own tokens. A collision would leak, hence SHA-256.

    Args:
        parent: hash of the block before it, or `root_hash`.
        token_ids: of the block; fewer than others only where virtual tokens of the chain's adapter come first.
        begins: digest of the adapter that begins to act in this block, and at which of its tokens: where its invocation
            goes on in the next block, equal tokens may be the base's or the adapter's.
    """
    mark = b"" if begins is None else begins[1].to_bytes(8, "little") + begins[0].encode()
    return hashlib.sha256(parent + array("q", token_ids).tobytes() + mark).digest()


class BlockIntegrityError(RuntimeError):
    """The books of the block manager do not balance: a bug, found by `check_integrity`."""


class BlockManager:
    """Counts references to `num_blocks` blocks of `block_size` tokens and remembers what full blocks hold.

    A block with no holder is free; its content stays findable until the block is given out again, oldest first.
    A block is registered only after the forward pass that filled it has succeeded, so a hit is always real data.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._by_hash: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._forgotten: set[str] = set()  # cache salts
        self._owner_of: dict[int, tuple[str, str]] = {}  # block → adapter digest and cache salt

    @property
    def num_free(self) -> int:
        """Blocks without a holder, those with a remembered prefix included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Blocks of the longest known prefix of a hash chain. Nothing is taken: call `take` before anything else."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_hold(self, matched: Sequence[int], num_tokens: int, reserve: int = 0) -> bool:
        """Whether `num_tokens` fit when `matched` blocks are shared and `reserve` blocks stay free."""
        revived = sum(1 for block in matched if self._references[block] == 0)
        return self.blocks_for(num_tokens) - len(matched) + revived + reserve <= len(self._free)

    def take(self, matched: Iterable[int]) -> list[int]:
        """Add a reference to each matched block and return them as a new block table."""
        table = list(matched)
        for block in table:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        return table

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` in place until it holds `num_tokens`. False, and nothing taken, if too few blocks are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._drop_hash(block)
            self._references[block] = 1
            table.append(block)
        return True

    def register(self, block: int, block_hash: BlockHash, digest: str, cache_salt: str = "") -> None:
        """Remember what a full, computed block holds. The first block of equal content stays the findable one.

        `digest` and `cache_salt` are those of the chain's root.
        """
        if block in self._hash_of or block_hash in self._by_hash or cache_salt in self._forgotten:
            return
        self._by_hash[block_hash] = block
        self._hash_of[block] = block_hash
        self._owner_of[block] = (digest, cache_salt)

    def free(self, table: list[int]) -> None:
        """Give back a table's references and empty it. Tails are reused before heads, which more prompts share."""
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)  # holds nothing worth keeping: use it first
        table.clear()

    def adapters(self) -> set[str]:
        """Digests of the adapters that prefixes are remembered of; "" is the base."""
        return {digest for digest, _ in self._owner_of.values()}

    def forget(self, digest: str) -> None:
        """Drop every remembered prefix of one adapter (it was deleted)."""
        for block in [block for block, (of, _) in self._owner_of.items() if of == digest]:
            self._drop_hash(block)

    def forget_salt(self, cache_salt: str) -> None:
        """Drop every remembered prefix of one namespace, whatever the adapter, and remember none from now on.

        Its tenant was deleted, and sequences that were accepted before go on.
        """
        self._forgotten.add(cache_salt)
        for block in [block for block, (_, salt) in self._owner_of.items() if salt == cache_salt]:
            self._drop_hash(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise BlockIntegrityError unless the references are exactly those of `tables` (all live block tables)."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        if expected != self._references:
            wrong = [block for block in range(self.num_blocks) if expected[block] != self._references[block]]
            raise BlockIntegrityError(f"reference counts of blocks {wrong[:8]} differ from the live block tables")
        if set(self._free) != {block for block in range(self.num_blocks) if expected[block] == 0}:
            raise BlockIntegrityError("the free list is not the set of blocks without references")
        if {block: block_hash for block_hash, block in self._by_hash.items()} != self._hash_of:
            raise BlockIntegrityError("the prefix index and the blocks' hashes differ")
        if self._owner_of.keys() != self._hash_of.keys():
            raise BlockIntegrityError("a remembered block lacks its owner")

    def _drop_hash(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._by_hash[block_hash]
            del self._owner_of[block]
