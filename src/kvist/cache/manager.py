"""Who holds which blocks: leases over a pool. Reserve, run, commit. No tensor.

A lease is one sequence's hold on the cache. Its block table lists block ids in the order of positions: token `i`
lives in `table[i // block_size]` at offset `i % block_size`. The tokens of a lease, in order:

    0 ............ length ............ length + reserved
    | committed    | reserved         |
    | readable     | the lease's own, to be written in this step, then committed or given back

The table is always exactly as long as these tokens need. A block with several holders is never written: `reserve`
replaces those that it would write by copies and says which bytes the store must copy before the step runs.

A cache with lossy codecs also has a pool of open blocks, which hold tokens in full precision; see `open_blocks`.
Without its open block a block can only be kept whole: a lease that is cut within one ends where that block begins, and
its owner computes the rest again.

A prefix tree lets leases share what is already computed. `adopt` lengthens a lease by what the tree holds of its
tokens, `publish` puts its full blocks there, `release` also its last, partly filled one. What the tree alone holds is
evicted when its blocks are needed: `room` counts it as free. Nor does what it shares with one lease keep that from
growing: such a block is copied where there is room for a copy, and otherwise the tree forgets it. So a sequence that is
alone comes to its end in as many blocks as its tokens fill."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvist.base.errors import InvariantError, OutOfBlocks
from kvist.base.events import Adopted, CacheEvent, Committed, Evicted, Listener, Released, Reserved, RolledBack
from kvist.cache.keys import chain_key
from kvist.cache.open_blocks import OpenBlocks
from kvist.cache.pool import BlockPool
from kvist.cache.spec import Window
from kvist.cache.tree import Node, PrefixTree
from kvist.cache.windows import Tables, WindowGroup

Room = tuple[int, ...]  # blocks of each pool: of the layers that keep everything, of each window, then open ones
PUBLIC = "\0public"  # part of the names of namespaces, which no tenant's has


@dataclass(eq=False)
class Lease:
    """What a sequence holds. Created, changed and ended by its `CacheManager` alone; others read.

    `path`: the root where it begins, then the nodes of its first blocks as far as they are in the prefix tree.
    `branch`: where it begins with what is public, the block from which on it stands behind a root of its own namespace.
    `windows`: of each group of layers with a window, which blocks it holds, by their index; see `cache.windows`.
    """

    id: int
    path: list[Node] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    length: int = 0
    reserved: int = 0
    released: bool = False
    open: dict[int, int] = field(default_factory=dict)
    branch: tuple[int, Node] | None = None
    windows: Tables = field(default_factory=list)

    @property
    def tip(self) -> Node:
        """The node behind which the first of its blocks stands that is not in the path."""
        depth = len(self.path) - 1
        return self.path[-1] if self.branch is None or self.branch[0] != depth else self.branch[1]

    def root(self, index: int) -> Node:
        """The root of the namespace of its block `index`."""
        return self.path[0] if self.branch is None or index < self.branch[0] else self.branch[1]


@dataclass(frozen=True)
class Copy:
    """The store must copy block `source` to block `target`, or open block to open block, before the step writes.
    `window`: they are of that group of layers with a window, and not of those that keep everything."""

    source: int
    target: int
    open: bool = False
    window: int | None = None


def fits(cost: Room, room: Room) -> bool:
    """Whether no pool has less room than this costs."""
    return all(needed <= left for needed, left in zip(cost, room, strict=True))


class CacheManager:
    """Leases over one pool of blocks of `block_size` tokens, and one of open blocks where codecs are lossy; the prefix
    tree over both. `open_tails`: whether the prefix tree keeps open blocks, for which that pool then needs room.
    `identity`: what made the KV, as bytes; see `keys`. `windows`: of the groups of layers that have one, each with its
    pool. `evicted` is told of each node that the tree has just forgotten, whose bytes are still there, and
    `losing` of each that is about to lose a block of a window."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        listener: Listener | None = None,
        open_pool: BlockPool | None = None,
        open_tails: bool = True,
        identity: bytes = b"",
        windows: Sequence[tuple[Window, BlockPool]] = (),
    ) -> None:
        self.pool = pool
        self.open_pool = open_pool
        self.block_size = block_size
        self._open_tails = open_tails
        self.tree = PrefixTree(pool, block_size, open_pool, identity)
        self._opened = None if open_pool is None else OpenBlocks(open_pool, self.tree, block_size, self._tell_evicted)
        self.evicted: Callable[[Node], None] = lambda node: None
        self.losing: Callable[[Node], None] = lambda node: None
        self.windows = [WindowGroup(*group, block_size, place) for place, group in enumerate(windows)]
        for group in self.windows:
            group.losing = lambda node: self.losing(node)
        self.tree.removed = self._forget_windows
        self._listener = listener
        self._leases: dict[int, Lease] = {}
        self._next_id = 0
        self._public: list[tuple[int, ...]] = []

    @property
    def leases(self) -> Iterator[Lease]:
        """The live leases, oldest first."""
        return iter(self._leases.values())

    @property
    def available(self) -> int:
        """Blocks that a reservation can have: the free ones, and those that nobody but the prefix tree holds."""
        return self.pool.free + self.tree.idle

    @property
    def room(self) -> Room:
        """The same, of each pool."""
        opened = () if self._opened is None else (self._opened.available,)
        return (self.available, *(group.available for group in self.windows), *opened)

    def make_public(self, tokens: Sequence[int]) -> None:
        """From now on all namespaces share the whole blocks of `tokens`, for leases that begin with all of them."""
        whole = tuple(tokens[: len(tokens) // self.block_size * self.block_size])
        if whole:
            self._public.append(whole)

    def begins_public(self, tokens: Sequence[int]) -> bool:
        """Whether leases of these tokens share their first ones with all namespaces."""
        return any(tuple(tokens[: len(public)]) == public for public in self._public)

    def roots(self, namespace: str) -> list[Node]:
        """All roots that are of this namespace alone: its own, and one behind each public beginning."""
        return [self.tree.root(namespace), *(self._branch(namespace, public) for public in self._public)]

    def open(self, namespace: str = "", tokens: Sequence[int] = ()) -> Lease:
        """A lease that holds nothing yet. It shares with leases of its namespace only, but for what is public.
        `tokens`: the first ones of its sequence."""
        lease = Lease(self._next_id, [self.tree.root(namespace)], windows=[{} for _ in self.windows])
        for public in self._public:
            if tuple(tokens[: len(public)]) == public:
                branch = len(public) // self.block_size, self._branch(namespace, public)
                lease.path, lease.branch = [self.tree.root(PUBLIC)], branch
                break
        self._next_id += 1
        self._leases[lease.id] = lease
        return lease

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def most_blocks(self, tokens: int) -> Room:
        """The most blocks of each pool that a lease holds at once which comes to `tokens` tokens, in steps as short as
        need be."""
        opened = () if self._opened is None else (self._opened.most_blocks(tokens),)
        return (self.blocks_for(tokens), *(group.most_blocks(tokens) for group in self.windows), *opened)

    @property
    def capacities(self) -> Room:
        """All blocks of each pool."""
        opened = () if self.open_pool is None else (self.open_pool.capacity,)
        return (self.pool.capacity, *(group.pool.capacity for group in self.windows), *opened)

    def cost(self, lease: Lease, tokens: int) -> Room:
        """How much less `room` there is once `tokens` more tokens are reserved: new blocks, and copies of those that
        other leases hold, too. A copy of what the prefix tree alone holds, too, costs nothing."""
        first, end = lease.length // self.block_size, self.blocks_for(lease.length + tokens)
        copies = self._lent(lease) is None
        return tuple(fresh + copies * shared for fresh, shared in self._needs(lease, first, end))

    def can_grow(self, growth: Mapping[Lease, int]) -> bool:
        """Whether all leases of `growth` can grow by so many tokens beside each other. Nobody else may hold any."""
        if sum(self.cost(lease, tokens)[0] for lease, tokens in growth.items()) > self.available:
            return False
        # Of these pools leases give back blocks while they grow.
        most = [self.most_blocks(lease.length + tokens)[1:] for lease, tokens in growth.items()]
        return all(
            sum(own) <= capacity for own, capacity in zip(zip(*most, strict=True), self.capacities[1:], strict=True)
        )

    def reserve(self, lease: Lease, tokens: int) -> list[Copy]:
        """Make `tokens` positions after `lease.length` writable. Returns the copies to make first.

        Raises `OutOfBlocks`, taking nothing, when even without all idle blocks of the prefix tree too few are free.
        """
        self._require_live(lease)
        if tokens < 1:
            raise ValueError(f"a reservation is for at least one token, got {tokens}")
        if lease.reserved:
            raise InvariantError(f"lease {lease.id} already has {lease.reserved} tokens reserved")
        first = lease.length // self.block_size
        end = self.blocks_for(lease.length + tokens)
        for group in self.windows:
            group.trim(lease)
        room, node = self.room, self._lent(lease)
        for needed, left in zip(self.cost(lease, tokens), room, strict=True):
            if needed > left:
                raise OutOfBlocks(needed, left)
        # A copy takes a block more until its original is let go.
        if node is not None and not fits(tuple(map(sum, self._needs(lease, first, end))), room):
            for gone in self.tree.forget(node):
                self._tell_evicted(gone)
        shared = self._shared(lease, first, end)
        missing = max(0, end - len(lease.table))
        opened = self._opened.reserve(lease, first, end) if self._opened is not None else []
        copies = [Copy(*pair, open=True) for pair in opened]
        for group in self.windows:
            copies += [Copy(*pair, window=group.place) for pair in group.reserve(lease, first, end)]
        taken = iter(self._take(missing + len(shared)))
        for index, fresh in zip(shared, taken, strict=False):
            # Only committed tokens are worth copying: a shared block wholly beyond them is merely replaced.
            if index * self.block_size < lease.length:
                copies.append(Copy(lease.table[index], fresh))
            self._give_back(lease.table[index])
            lease.table[index] = fresh
        lease.table.extend(taken)
        lease.reserved = tokens
        self._emit(lambda: Reserved(lease.id, tokens, missing + len(shared), len(copies)))
        return copies

    def adopt(self, lease: Lease, tokens: Sequence[int], partly: bool = True) -> int:
        """Lengthen the lease by what the prefix tree holds of `tokens`, the first tokens of its sequence; returns by
        how many. Does nothing where the lease ends within a block.

        Full blocks are shared for good. One that agrees only in part is shared up to there, unless `partly` is False,
        and copied by the reservation that writes behind it.
        """
        self._require_live(lease)
        size, before = self.block_size, lease.length
        if lease.reserved or before != (len(lease.path) - 1) * size:
            return 0
        for found in self._found(lease, tokens):
            self.tree.hold(found)
            lease.table.append(found.block)
            lease.length += size
        rest = tuple(tokens[lease.length : lease.length + size])
        node, shared = self.tree.partial(lease.tip, rest) if partly else (None, 0)
        if node is not None and all(block >= 0 for block in node.windows):
            for group in self.windows:
                group.adopt(lease, len(lease.table), node)
            self.tree.hold(node)
            if node.open is not None:
                lease.open[len(lease.table)] = node.open
            lease.table.append(node.block)
            lease.length += shared
        for group in self.windows:
            group.trim(lease)
        if lease.length > before:
            self._emit(lambda: Adopted(lease.id, lease.length - before, lease.length))
        return lease.length - before

    def publish(self, lease: Lease, tokens: Sequence[int]) -> list[Node]:
        """Put the lease's committed full blocks into the prefix tree; returns those that it did not have. `tokens`: the
        lease's sequence, at least as long.

        Where the tree already holds such a block, computed by another, the lease takes that one and gives back its own:
        the two have the same bits.
        """
        self._require_live(lease)
        size, fresh = self.block_size, []
        for index in range(len(lease.path) - 1, lease.length // size):
            window, own = tuple(tokens[index * size : (index + 1) * size]), lease.table[index]
            node = self.tree.child(lease.tip, window)
            if node is None:
                node = self._insert(lease.tip, window, own)
                fresh.append(node)
            elif node.block != own:
                self.tree.hold(node)
                lease.table[index] = node.block
                self._give_back(own)
            for group in self.windows:
                group.publish(lease, index, node)
            lease.path.append(node)
        for group in self.windows:
            group.trim(lease)
        return fresh

    def blocks_at(self, lease: Lease, index: int) -> list[int]:
        """The block `index` of a lease in each group: of the layers that keep everything, then of those with windows,
        -1 where it is gone."""
        return [lease.table[index], *(table.get(index, -1) for table in lease.windows)]

    def hold_until(self, lease: Lease, until: float) -> None:
        """Others are evicted before the blocks of the lease's path until then: seconds of the epoch."""
        for node in lease.path[1:]:
            node.until = max(node.until, until)

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
        twin.path, twin.branch = lease.path.copy(), lease.branch
        twin.table = lease.table.copy()
        twin.length = lease.length
        for block in twin.table:
            self.pool.share(block)
        for group in self.windows:
            group.share(lease, twin)
        if self._opened is not None:
            self._opened.share(lease, twin)
        return twin

    def release(self, lease: Lease, tokens: Sequence[int] | None = None) -> None:
        """End the lease; everything it held goes back. Ending it again does nothing.

        `tokens`: its sequence, at least as long as the lease; then its blocks stay in the prefix tree, the last one
        too."""
        if lease.released:
            return
        self._require_live(lease)
        if tokens is not None:
            lease.reserved = 0
            self.publish(lease, tokens)
            self._publish_tail(lease, tokens)
        given = self._keep(lease, 0)
        lease.released = True
        del self._leases[lease.id]
        self._emit(lambda: Released(lease.id, given))

    def check(self) -> None:
        """Raises `InvariantError` unless counts equal table entries and no block that may be written is shared."""
        self.pool.check()
        holders = [0] * self.pool.capacity
        if self._opened is not None:
            self._opened.check(list(self._leases.values()))
        for group in self.windows:
            group.check(list(self._leases.values()))
        self.tree.check()
        for node in self.tree.nodes():
            holders[node.block] += 1
        for lease in self._leases.values():
            if lease.released or min(lease.length, lease.reserved) < 0:
                raise InvariantError(f"lease {lease.id} is in an impossible state: {lease}")
            if len(lease.table) != self.blocks_for(lease.length + lease.reserved):
                raise InvariantError(f"lease {lease.id} has {len(lease.table)} blocks for {lease}")
            if len(set(lease.table)) != len(lease.table):
                raise InvariantError(f"lease {lease.id} holds a block twice: {lease.table}")
            for block in lease.table:
                holders[block] += 1
            path = lease.path[1:]
            parents = [
                lease.branch[1] if lease.branch is not None and index == lease.branch[0] else before
                for index, before in enumerate(lease.path)
            ]
            if len(path) > lease.length // self.block_size or any(
                node.block != block or node.parent is not parent
                for node, block, parent in zip(path, lease.table, parents, strict=False)
            ):
                raise InvariantError(f"lease {lease.id} does not hold the blocks of its path in the prefix tree")
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
        if self._opened is not None:
            if partial is not None and partial not in lease.open:
                length, partial = partial * self.block_size, None
            self._opened.cut(lease, partial)
        if not all(group.is_complete(lease, length) for group in self.windows):
            return self._keep(lease, 0)
        kept = self.blocks_for(length)
        for group in self.windows:
            group.cut(lease, kept)
        given = len(lease.table) - kept
        for block in reversed(lease.table[kept:]):
            self._give_back(block)
        del lease.table[kept:]
        del lease.path[length // self.block_size + 1 :]
        lease.length, lease.reserved = length, 0
        return given

    def _found(self, lease: Lease, tokens: Sequence[int]) -> list[Node]:
        """The nodes behind a lease that hold what follows of `tokens`, in the lease's path from now on: as many as it
        can go on from, since of groups with windows the last one must be there."""
        size, start, nodes = self.block_size, len(lease.path) - 1, list[Node]()
        while (position := (start + len(nodes)) * size) + size <= len(tokens):
            node = self.tree.child(lease.tip, tuple(tokens[position : position + size]))
            if node is None:
                break
            nodes.append(node)
            lease.path.append(node)
        while nodes and not all(group.fits(lease, start, nodes) for group in self.windows):
            nodes.pop()
            lease.path.pop()
        for group in self.windows if nodes else ():
            for index in group.worth_holding((start + len(nodes)) * size):
                if index >= start:
                    group.adopt(lease, index, nodes[index - start])
        return nodes

    def _insert(self, parent: Node, tokens: tuple[int, ...], block: int, open_block: int | None = None) -> Node:
        node = self.tree.insert(parent, tokens, block, open_block)
        node.windows = [-1] * len(self.windows)
        return node

    def _forget_windows(self, node: Node) -> None:
        for group in self.windows:
            group.forget(node)

    def _branch(self, namespace: str, public: tuple[int, ...]) -> Node:
        """The root of what stands behind a public beginning in a namespace."""
        key = chain_key(self.tree.root(PUBLIC).key, public, self.block_size)
        return self.tree.root(f"{namespace}{PUBLIC}{key.hex()}")

    def _shared(self, lease: Lease, first: int, end: int) -> list[int]:
        """Indices of the lease's blocks from `first` to `end` that it shares, and would write."""
        return [index for index in range(first, min(end, len(lease.table))) if self.pool.count(lease.table[index]) > 1]

    def _lent(self, lease: Lease) -> Node | None:
        """The node over the block that the lease writes next, where nobody but the prefix tree holds that, too."""
        index = lease.length // self.block_size
        if index >= len(lease.table) or self.pool.count(lease.table[index]) != 2:
            return None
        return self.tree.over(lease.table[index])

    def _needs(self, lease: Lease, first: int, end: int) -> list[tuple[int, int]]:
        """What a step takes of each pool that writes blocks `first` to `end`: new blocks, and copies of shared ones."""
        needs = [(max(0, end - len(lease.table)), len(self._shared(lease, first, end)))]
        needs += [group.needs(lease, first, end) for group in self.windows]
        return needs if self._opened is None else [*needs, self._opened.needs(lease, first, end)]

    def _take(self, number: int) -> list[int]:
        """`number` blocks, at the cost of what the prefix tree has not used for longest."""
        while self.pool.free < number:
            self._tell_evicted(self.tree.evict())
        return self.pool.take(number)

    def _give_back(self, block: int) -> None:
        self.pool.give_back(block)
        self.tree.let_go(block)

    def _publish_tail(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Put the lease's last, partly filled block into the prefix tree, unless something there already serves."""
        index, filled = divmod(lease.length, self.block_size)
        tail = tuple(tokens[lease.length - filled : lease.length])
        if not filled or (self._opened is not None and not (self._open_tails and index in lease.open)):
            return
        if self.tree.partial(lease.tip, tail)[1] < filled:
            node = self._insert(lease.tip, tail, lease.table[index], lease.open.get(index))
            for group in self.windows:
                group.publish(lease, index, node)

    def _require_live(self, lease: Lease) -> None:
        if self._leases.get(lease.id) is not lease:
            raise InvariantError(f"lease {lease.id} is not a live lease of this manager")

    def _tell_evicted(self, node: Node) -> None:
        self.evicted(node)
        self._emit(lambda: Evicted(node.block))

    def _emit(self, event: Callable[[], CacheEvent]) -> None:
        if self._listener is not None:
            self._listener(event())
