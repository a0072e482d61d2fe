"""The blocks of layers that keep a window of tokens, beside those of layers that keep them all. No tensor.

A lease's table lists a block for every so many of its tokens. For each group of layers with a window it has a second
table, from a block's index to a block of that group's own pool, which holds only what the tokens to come can see. A
node of the prefix tree likewise has one block in each group, or has lost it: the tree forgets those of a group on their
own, the ones that nobody has read for longest first. A prefix can be gone on from where the last window before its end
is there in every group."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.cache.pool import BlockPool
from kvist.cache.spec import SLACK, Window
from kvist.cache.tree import Node

if TYPE_CHECKING:
    from kvist.cache.manager import Lease

Tables = list[dict[int, int]]


class WindowGroup:
    """One group's pool, and who holds what of it. `place`: its number, among the groups with windows."""

    def __init__(self, window: Window, pool: BlockPool, block_size: int, place: int) -> None:
        self.window = window
        self.pool = pool
        self.place = place
        self.losing: Callable[[Node], None] = lambda node: None  # told before a node loses its block
        self._size = block_size
        self._nodes: dict[int, Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Blocks that a reservation can have."""
        return self.pool.free + len(self._idle)

    def needed(self, length: int) -> list[int]:
        """Indices of the blocks that the tokens behind `length` tokens see of these."""
        end = -(-length // self._size)
        first = max(0, length - self.window.size + 1) // self._size
        sinks = min(-(-self.window.sinks // self._size), first)
        return [*range(sinks), *range(first, end)]

    def worth_holding(self, length: int) -> list[int]:
        """The same, and of the blocks that would be needed if a few of these tokens were cut off."""
        return sorted({*self.needed(max(0, length - SLACK)), *self.needed(length)})

    def is_complete(self, lease: "Lease", length: int) -> bool:
        """Whether the lease, cut to `length` tokens, could be gone on from."""
        table = lease.windows[self.place]
        return all(index in table for index in self.needed(length))

    def most_blocks(self, tokens: int) -> int:
        """The most blocks that a lease holds at once which comes to `tokens` tokens, in steps as short as need be."""
        # Those that any of the last tokens sees, one of them to be written, wherever the first falls in its block.
        seen = self.window.size + SLACK
        sinks = -(-self.window.sinks // self._size)
        return min(-(-tokens // self._size), sinks + (seen - 2) // self._size + 2)

    def needs(self, lease: "Lease", first: int, end: int) -> tuple[int, int]:
        """What a step takes that writes the blocks from `first` to `end`: new blocks, and copies of shared ones."""
        table = lease.windows[self.place]
        held = [table[index] for index in range(first, end) if index in table]
        return end - first - len(held), sum(self.pool.count(block) > 1 for block in held)

    def reserve(self, lease: "Lease", first: int, end: int) -> list[tuple[int, int]]:
        """Make these blocks the lease's own. Returns which blocks are to be copied to which, for what is written."""
        table, copies = lease.windows[self.place], []
        for index in range(first, end):
            held = table.get(index)
            if held is not None and self.pool.count(held) == 1:
                continue
            table[index] = self._take()
            if held is not None:
                if index * self._size < lease.length:
                    copies.append((held, table[index]))
                self.give_back(held)
        return copies

    def trim(self, lease: "Lease") -> None:
        """Give back what the tokens to come cannot see, even if the lease is cut by a few."""
        table = lease.windows[self.place]
        wanted = set(self.worth_holding(lease.length))
        end = -(-lease.length // self._size)
        for index in [index for index in table if index < end and index not in wanted]:
            self.give_back(table.pop(index))

    def cut(self, lease: "Lease", blocks: int) -> None:
        """The lease keeps nothing from block `blocks` on."""
        table = lease.windows[self.place]
        for index in sorted((index for index in table if index >= blocks), reverse=True):
            self.give_back(table.pop(index))

    def fits(self, lease: "Lease", start: int, nodes: Sequence[Node]) -> bool:
        """Whether a lease of `start` whole blocks and those of `nodes` behind them could be gone on from."""
        table = lease.windows[self.place]
        return all(
            index in table if index < start else nodes[index - start].windows[self.place] >= 0
            for index in self.needed((start + len(nodes)) * self._size)
        )

    def adopt(self, lease: "Lease", index: int, node: Node) -> None:
        """The lease takes the block of a node as its block `index`, if the node still has it."""
        block = node.windows[self.place]
        if block >= 0 and index not in lease.windows[self.place]:
            self._idle.pop(node, None)
            self.pool.share(block)
            lease.windows[self.place][index] = block

    def publish(self, lease: "Lease", index: int, node: Node) -> None:
        """A node stands for block `index` of a lease: whichever of the two has no block takes the other's; where both
        have one, which then have the same bits, the lease takes the node's."""
        table, theirs = lease.windows[self.place], node.windows[self.place]
        own = table.get(index)
        if own is None or own == theirs:
            return
        if theirs >= 0:
            del table[index]
            self.adopt(lease, index, node)
            self.give_back(own)
        elif own not in self._nodes:
            node.windows[self.place] = own
            self._nodes[own] = node
            self.pool.share(own)

    def forget(self, node: Node) -> None:
        """A node leaves the tree. What it says of its blocks stays readable."""
        block = node.windows[self.place]
        if block >= 0 and self._nodes.get(block) is node:
            del self._nodes[block]
            self._idle.pop(node, None)
            self.pool.give_back(block)

    def share(self, lease: "Lease", twin: "Lease") -> None:
        """`twin` holds what `lease` holds."""
        twin.windows[self.place] = dict(lease.windows[self.place])
        for block in twin.windows[self.place].values():
            self.pool.share(block)

    def give_back(self, block: int) -> None:
        """One holder less; the tree may be the only one left."""
        self.pool.give_back(block)
        node = self._nodes.get(block)
        if node is not None and self.pool.count(block) == 1:
            self._idle[node] = None

    def check(self, leases: Sequence["Lease"]) -> None:
        """Raises `InvariantError` unless counts equal holders, and leases hold what they need."""
        self.pool.check()
        holders = [0] * self.pool.capacity
        for block, node in self._nodes.items():
            holders[block] += 1
            if node.windows[self.place] != block:
                raise InvariantError(f"block {block} of a window is that of a node which says otherwise")
        for lease in leases:
            table, end = lease.windows[self.place], -(-(lease.length + lease.reserved) // self._size)
            if not self.is_complete(lease, lease.length) or any(index >= end for index in table):
                raise InvariantError(f"lease {lease.id} holds blocks {sorted(table)} of a window at {lease.length}")
            first = lease.length // self._size
            if lease.reserved and any(self.pool.count(table[index]) != 1 for index in range(first, end)):
                raise InvariantError(f"lease {lease.id} shares a block of a window that it is about to write")
            for block in table.values():
                holders[block] += 1
        for block, count in enumerate(holders):
            if self.pool.count(block) != count:
                raise InvariantError(f"block {block} of a window has count {self.pool.count(block)}, {count} holders")
        for node in self._nodes.values():
            if (self.pool.count(node.windows[self.place]) == 1) != (node in self._idle):
                raise InvariantError(f"block {node.windows[self.place]} of a window is idle when it is not")

    def _take(self) -> int:
        if not self.pool.free:
            if not self._idle:
                raise OutOfBlocks(1, 0)
            node = next(iter(self._idle))
            self.losing(node)
            del self._idle[node]
            block = node.windows[self.place]
            del self._nodes[block]
            node.windows[self.place] = -1
            self.pool.give_back(block)
        return self.pool.take(1)[0]
