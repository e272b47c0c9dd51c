from __future__ import annotations

import pytest

from tenora.engine.blocks import BlockIntegrityError, BlockManager, chain_hash, root_hash


def fill(blocks: BlockManager, tokens: list[int], salt: str = "", digest: str = "") -> list[int]:
    """Allocate, and register as computed, the full blocks of `tokens`."""
    table: list[int] = []
    assert blocks.grow(table, len(tokens))
    for block, block_hash in zip(table, chain(blocks, tokens, salt, digest), strict=False):
        blocks.register(block, block_hash, digest, salt)
    return table


def chain(blocks: BlockManager, tokens: list[int], salt: str = "", digest: str = "") -> list[bytes]:
    hashes, parent = [], root_hash(salt, digest)
    for start in range(0, len(tokens) - blocks.block_size + 1, blocks.block_size):
        parent = chain_hash(parent, tokens[start : start + blocks.block_size])
        hashes.append(parent)
    return hashes


def test_grow_takes_all_or_nothing() -> None:
    blocks = BlockManager(3, 4)
    table: list[int] = []
    assert blocks.grow(table, 5)
    assert len(table) == 2
    assert not blocks.grow(table, 13)
    assert len(table) == 2
    assert blocks.num_free == 1
    assert blocks.grow(table, 12)
    blocks.check_integrity([table])
    blocks.free(table)
    assert table == []
    assert blocks.num_free == 3


def test_freed_blocks_stay_findable_until_they_are_given_out() -> None:
    blocks = BlockManager(4, 2)
    tokens = [1, 2, 3, 4, 5]
    table = fill(blocks, tokens)
    held = list(table)
    blocks.free(table)
    assert blocks.match(chain(blocks, tokens)) == held[:2]
    other: list[int] = []
    assert blocks.grow(other, 4)  # the two blocks that hold nothing are used first
    assert blocks.match(chain(blocks, tokens)) == held[:2]
    assert blocks.grow(other, 6)
    assert blocks.match(chain(blocks, tokens)) == held[:1]  # the tail went before the head
    assert blocks.grow(other, 8)
    assert blocks.match(chain(blocks, tokens)) == []
    blocks.check_integrity([other])


def test_shared_blocks_are_counted_and_survive_their_first_holder() -> None:
    blocks = BlockManager(4, 2)
    first = fill(blocks, [1, 2, 3, 4])
    second = blocks.take(blocks.match(chain(blocks, [1, 2, 3, 4])))
    blocks.check_integrity([first, second])
    blocks.free(first)
    assert blocks.num_used == 2
    blocks.check_integrity([second])
    blocks.free(second)
    assert blocks.num_used == 0


def test_of_a_forgotten_salt_nothing_is_found_and_of_others_everything() -> None:
    blocks = BlockManager(16, 4)
    ours = [("tenant-a", ""), ("tenant-a", "d1")]
    theirs = [("tenant-b", ""), ("tenant-b", "d1"), ("tenant-aa", "")]
    tables = [fill(blocks, [1, 2, 3, 4], salt, digest) for salt, digest in ours + theirs]
    blocks.forget_salt("tenant-a")
    assert [blocks.match(chain(blocks, [1, 2, 3, 4], *of)) for of in ours] == [[], []]
    assert [blocks.match(chain(blocks, [1, 2, 3, 4], *of)) for of in theirs] == tables[2:]
    blocks.free(tables[0])
    tables[0] = fill(blocks, [1, 2, 3, 4], "tenant-a")
    assert blocks.match(chain(blocks, [1, 2, 3, 4], "tenant-a")) == []
    blocks.check_integrity(tables)


@pytest.mark.parametrize(("salt", "digest"), [("tenant-b", "d1"), ("tenant-a", "d2"), ("tenant-ad", "1"), ("", "")])
def test_a_prefix_is_found_under_its_own_salt_and_adapter_only(salt: str, digest: str) -> None:
    blocks = BlockManager(4, 2)
    fill(blocks, [1, 2, 3, 4], "tenant-a", "d1")
    assert len(blocks.match(chain(blocks, [1, 2, 3, 4], "tenant-a", "d1"))) == 2
    assert blocks.match(chain(blocks, [1, 2, 3, 4], salt, digest)) == []


def test_a_block_matches_only_after_the_same_prefix() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, [1, 2, 3, 4])
    assert blocks.match(chain(blocks, [9, 9, 3, 4])) == []
    assert len(blocks.match(chain(blocks, [1, 2, 9, 9]))) == 1


def test_can_hold_counts_revived_blocks_as_taken() -> None:
    blocks = BlockManager(3, 2)
    table = fill(blocks, [1, 2, 3, 4])
    blocks.free(table)
    matched = blocks.match(chain(blocks, [1, 2, 3, 4]))
    assert blocks.can_hold(matched, 6)
    assert not blocks.can_hold(matched, 7)
    assert not blocks.can_hold(matched, 6, reserve=1)


def test_forget_drops_one_adapters_prefixes() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, [1, 2], digest="a")
    kept = fill(blocks, [1, 2], digest="b")
    blocks.forget("a")
    assert blocks.match(chain(blocks, [1, 2], digest="a")) == []
    assert blocks.match(chain(blocks, [1, 2], digest="b")) == kept


def test_integrity_finds_a_leak_and_a_double_free() -> None:
    blocks = BlockManager(4, 2)
    table: list[int] = []
    blocks.grow(table, 4)
    with pytest.raises(BlockIntegrityError, match="reference counts"):
        blocks.check_integrity([])
    with pytest.raises(BlockIntegrityError, match="reference counts"):
        blocks.check_integrity([table, table])
    blocks._free[table[0]] = None
    with pytest.raises(BlockIntegrityError, match="free list"):
        blocks.check_integrity([table])
