"""The blocks that leases hold in full precision while they fill them, where codecs are lossy. No tensor.

`Lease.open` maps a block's index to its open block: between steps the one that is partly filled, during a step the
first and the last that it writes. Those in between are filled within the step and need none of their own."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvist.base.errors import InvariantError
from kvist.cache.pool import BlockPool
from kvist.cache.tree import Node, PrefixTree

if TYPE_CHECKING:
    from kvist.cache.manager import Lease


class OpenBlocks:
    """Their pool, and who holds what of it. What the prefix tree keeps open is evicted when it is needed; `evicted` is
    told of it."""

    def __init__(self, pool: BlockPool, tree: PrefixTree, block_size: int, evicted: Callable[[Node], None]) -> None:
        self._pool = pool
        self._tree = tree
        self._size = block_size
        self._evicted = evicted

    @property
    def available(self) -> int:
        """Blocks that a reservation can have."""
        return self._pool.free + self._tree.idle_open

    def most_blocks(self, tokens: int) -> int:
        """The most that a lease holds at once which comes to `tokens` tokens: the first and the last that it writes."""
        return min(2, -(-tokens // self._size))

    def needs(self, lease: "Lease", first: int, end: int) -> tuple[int, int]:
        """What a step takes that writes blocks `first` to `end`: new open blocks, and copies of shared ones."""
        fresh, shared = self._wanted(lease, first, end)
        return len(fresh), len(shared)

    def reserve(self, lease: "Lease", first: int, end: int) -> list[tuple[int, int]]:
        """Open what that step needs. Returns which open blocks, that others hold too, are to be copied to which."""
        fresh, shared = self._wanted(lease, first, end)
        while self._pool.free < len(fresh) + len(shared):
            self._evicted(self._tree.evict_open())
        taken = iter(self._pool.take(len(fresh) + len(shared)))
        copies = []
        for index in shared:
            target = next(taken)
            copies.append((lease.open[index], target))
            self._pool.give_back(lease.open[index])
            lease.open[index] = target
        lease.open.update(zip(fresh, taken, strict=True))
        return copies

    def cut(self, lease: "Lease", kept: int | None) -> None:
        """The lease keeps block `kept` open at most."""
        for index in [index for index in lease.open if index != kept]:
            self._pool.give_back(lease.open.pop(index))

    def share(self, lease: "Lease", twin: "Lease") -> None:
        """`twin` holds what `lease` holds."""
        twin.open = lease.open.copy()
        for block in twin.open.values():
            self._pool.share(block)

    def check(self, leases: Sequence["Lease"]) -> None:
        """Raises `InvariantError` unless counts equal holders, and leases have open what they need."""
        self._pool.check()
        holders = [0] * self._pool.capacity
        for lease in leases:
            first, end = lease.length // self._size, -(-(lease.length + lease.reserved) // self._size)
            expected = {first, end - 1} if lease.reserved else {first} if lease.length % self._size else set()
            if set(lease.open) != expected:
                raise InvariantError(f"lease {lease.id} has blocks {sorted(lease.open)} open and needs {expected}")
            for block in lease.open.values():
                holders[block] += 1
                if lease.reserved and self._pool.count(block) != 1:
                    raise InvariantError(f"lease {lease.id} shares an open block that it is about to write")
        for node in self._tree.nodes():
            if node.open is not None:
                holders[node.open] += 1
        for block, count in enumerate(holders):
            if self._pool.count(block) != count:
                raise InvariantError(f"open block {block} has count {self._pool.count(block)}, {count} holders")

    def _wanted(self, lease: "Lease", first: int, end: int) -> tuple[list[int], list[int]]:
        """Indices of the blocks to open for a step that writes blocks `first` to `end`, and of the shared open ones."""
        wanted = sorted({first, end - 1})
        held = [index for index in wanted if index in lease.open]
        shared = [index for index in held if self._pool.count(lease.open[index]) > 1]
        return [index for index in wanted if index not in lease.open], shared
