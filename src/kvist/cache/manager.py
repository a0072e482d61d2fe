"""Who holds which blocks: leases over a pool. Reserve, run, commit. No tensor.

A lease is one sequence's hold on the cache. Its block table lists block ids in the order of positions: token `i`
lives in `table[i // block_size]` at offset `i % block_size`. The tokens of a lease, in order:

    0 ............ length ............ length + reserved
    | committed    | reserved         |
    | readable     | the lease's own, to be written in this step, then committed or given back

The table is always exactly as long as these tokens need. A block with several holders is never written: `reserve`
replaces those that it would write by copies and says which bytes the store must copy before the step runs.

A cache with lossy codecs also has a pool of open blocks, which hold tokens in full precision. `open` maps a block's
index to its open block: between steps the one that is partly filled, during a step the first and the last that it
writes. Those in between are filled within the step and need none of their own. Without its open block a block can only
be kept whole: a lease that is cut within one ends where that block begins, and its owner computes the rest again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.base.events import CacheEvent, Committed, Listener, Released, Reserved, RolledBack
from kvist.cache.pool import BlockPool


@dataclass(eq=False)
class Lease:
    """What a sequence holds. Created, changed and ended by its `CacheManager` alone; others read."""

    id: int
    table: list[int] = field(default_factory=list)
    length: int = 0
    reserved: int = 0
    released: bool = False
    open: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """The store must copy block `source` to block `target`, or open block to open block, before the step writes."""

    source: int
    target: int
    open: bool = False


class CacheManager:
    """Leases over one pool of blocks of `block_size` tokens, and one of open blocks where codecs are lossy."""

    def __init__(
        self, pool: BlockPool, block_size: int, listener: Listener | None = None, open_pool: BlockPool | None = None
    ) -> None:
        self.pool = pool
        self.open_pool = open_pool
        self.block_size = block_size
        self._listener = listener
        self._leases: dict[int, Lease] = {}
        self._next_id = 0

    @property
    def leases(self) -> Iterator[Lease]:
        """The live leases, oldest first."""
        return iter(self._leases.values())

    def open(self) -> Lease:
        """A lease that holds nothing yet."""
        lease = Lease(self._next_id)
        self._next_id += 1
        self._leases[lease.id] = lease
        return lease

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def reserve(self, lease: Lease, tokens: int) -> list[Copy]:
        """Make `tokens` positions after `lease.length` writable. Returns the copies to make first.

        Raises `OutOfBlocks`, changing nothing, when the pool cannot give what is missing.
        """
        self._require_live(lease)
        if tokens < 1:
            raise ValueError(f"a reservation is for at least one token, got {tokens}")
        if lease.reserved:
            raise InvariantError(f"lease {lease.id} already has {lease.reserved} tokens reserved")
        first = lease.length // self.block_size
        end = self.blocks_for(lease.length + tokens)
        shared = [
            index for index in range(first, min(end, len(lease.table))) if self.pool.count(lease.table[index]) > 1
        ]
        missing = max(0, end - len(lease.table))
        self._require_open(lease, first, end)
        taken = iter(self.pool.take(missing + len(shared)))
        copies = self._open_blocks(lease, first, end)
        for index, fresh in zip(shared, taken, strict=False):
            # Only committed tokens are worth copying: a shared block wholly beyond them is merely replaced.
            if index * self.block_size < lease.length:
                copies.append(Copy(lease.table[index], fresh))
            self.pool.give_back(lease.table[index])
            lease.table[index] = fresh
        lease.table.extend(taken)
        lease.reserved = tokens
        self._emit(lambda: Reserved(lease.id, tokens, missing + len(shared), len(copies)))
        return copies

    def commit(self, lease: Lease, tokens: int) -> None:
        """The first `tokens` reserved positions are written and become readable; the rest is given back.

        With open blocks the cut must not fall within a block that was filled whole in the middle of the step.
        """
        self._require_live(lease)
        if not 0 <= tokens <= lease.reserved:
            raise InvariantError(f"lease {lease.id} commits {tokens} tokens and has {lease.reserved} reserved")
        length = lease.length + tokens
        self._keep(lease, length)
        if lease.length != length:
            raise InvariantError(f"lease {lease.id} was cut at {length}, within a block that is already coded")
        self._emit(lambda: Committed(lease.id, tokens, lease.length))

    def rollback(self, lease: Lease, length: int) -> None:
        """Cut the lease to its first `length` committed tokens; its reservation, if any, goes back too.

        Where the block that is cut has no open block any more, the lease ends where that block begins: see `length`.
        """
        self._require_live(lease)
        if not 0 <= length <= lease.length:
            raise ValueError(f"lease {lease.id} holds {lease.length} tokens and cannot be cut to {length}")
        given = self._keep(lease, length)
        self._emit(lambda: RolledBack(lease.id, lease.length, given))

    def fork(self, lease: Lease) -> Lease:
        """A second lease over the same tokens, all committed. Blocks are shared; the first write to one copies it."""
        self._require_live(lease)
        if lease.reserved:
            raise InvariantError(f"lease {lease.id} is forked in the middle of a step")
        twin = self.open()
        twin.table = lease.table.copy()
        twin.length = lease.length
        for block in twin.table:
            self.pool.share(block)
        if self.open_pool is not None:
            twin.open = lease.open.copy()
            for block in twin.open.values():
                self.open_pool.share(block)
        return twin

    def release(self, lease: Lease) -> None:
        """End the lease; everything it held goes back. Ending it again does nothing."""
        if lease.released:
            return
        self._require_live(lease)
        given = self._keep(lease, 0)
        lease.released = True
        del self._leases[lease.id]
        self._emit(lambda: Released(lease.id, given))

    def check(self) -> None:
        """Raises `InvariantError` unless counts equal table entries and no block that may be written is shared."""
        self.pool.check()
        holders = [0] * self.pool.capacity
        self._check_open()
        for lease in self._leases.values():
            if lease.released or min(lease.length, lease.reserved) < 0:
                raise InvariantError(f"lease {lease.id} is in an impossible state: {lease}")
            if len(lease.table) != self.blocks_for(lease.length + lease.reserved):
                raise InvariantError(f"lease {lease.id} has {len(lease.table)} blocks for {lease}")
            if len(set(lease.table)) != len(lease.table):
                raise InvariantError(f"lease {lease.id} holds a block twice: {lease.table}")
            for block in lease.table:
                holders[block] += 1
            to_be_written = lease.table[lease.length // self.block_size :] if lease.reserved else []
            if any(self.pool.count(block) != 1 for block in to_be_written):
                raise InvariantError(f"lease {lease.id} shares a block that it is about to write")
        for block, count in enumerate(holders):
            if self.pool.count(block) != count:
                raise InvariantError(f"block {block} has count {self.pool.count(block)} and {count} holders")

    def _keep(self, lease: Lease, length: int) -> int:
        """Make the lease exactly `length` committed tokens, or as many as can be kept. Returns how many blocks it gave
        back.

        Tail first: the free list is a stack, so it hands them out again in the order of positions.
        """
        partial = length // self.block_size if length % self.block_size else None
        if self.open_pool is not None:
            if partial is not None and partial not in lease.open:
                length, partial = partial * self.block_size, None
            for index in [index for index in lease.open if index != partial]:
                self.open_pool.give_back(lease.open.pop(index))
        kept = self.blocks_for(length)
        given = len(lease.table) - kept
        for block in reversed(lease.table[kept:]):
            self.pool.give_back(block)
        del lease.table[kept:]
        lease.length, lease.reserved = length, 0
        return given

    def _wanted_open(self, lease: Lease, first: int, end: int) -> tuple[list[int], list[int]]:
        """Indices of the blocks to open for a step that writes blocks `first` to `end`, and of the shared open ones."""
        assert self.open_pool is not None
        wanted = sorted({first, end - 1})
        held = [index for index in wanted if index in lease.open]
        return [index for index in wanted if index not in lease.open], [
            index for index in held if self.open_pool.count(lease.open[index]) > 1
        ]

    def _require_open(self, lease: Lease, first: int, end: int) -> None:
        """Raises `OutOfBlocks` when the open blocks of a step cannot be had."""
        if self.open_pool is None:
            return
        needed = sum(map(len, self._wanted_open(lease, first, end)))
        if needed > self.open_pool.free:
            raise OutOfBlocks(needed, self.open_pool.free)

    def _open_blocks(self, lease: Lease, first: int, end: int) -> list[Copy]:
        """Open what a step needs; returns the copies to make of open blocks that others hold too."""
        if self.open_pool is None:
            return []
        fresh, shared = self._wanted_open(lease, first, end)
        taken = iter(self.open_pool.take(len(fresh) + len(shared)))
        copies = []
        for index in shared:
            target = next(taken)
            copies.append(Copy(lease.open[index], target, open=True))
            self.open_pool.give_back(lease.open[index])
            lease.open[index] = target
        lease.open.update(zip(fresh, taken, strict=True))
        return copies

    def _check_open(self) -> None:
        if self.open_pool is None:
            return
        self.open_pool.check()
        holders = [0] * self.open_pool.capacity
        for lease in self._leases.values():
            first, end = lease.length // self.block_size, self.blocks_for(lease.length + lease.reserved)
            expected = {first, end - 1} if lease.reserved else {first} if lease.length % self.block_size else set()
            if set(lease.open) != expected:
                raise InvariantError(f"lease {lease.id} has blocks {sorted(lease.open)} open and needs {expected}")
            for block in lease.open.values():
                holders[block] += 1
                if lease.reserved and self.open_pool.count(block) != 1:
                    raise InvariantError(f"lease {lease.id} shares an open block that it is about to write")
        for block, count in enumerate(holders):
            if self.open_pool.count(block) != count:
                raise InvariantError(f"open block {block} has count {self.open_pool.count(block)}, {count} holders")

    def _require_live(self, lease: Lease) -> None:
        if self._leases.get(lease.id) is not lease:
            raise InvariantError(f"lease {lease.id} is not a live lease of this manager")

    def _emit(self, event: Callable[[], CacheEvent]) -> None:
        if self._listener is not None:
            self._listener(event())
