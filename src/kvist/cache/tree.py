"""Which blocks hold which tokens: a tree of blocks that any sequence may read. No tensor.

A node is one block and the tokens it holds, behind those of its parents up to a root. Full blocks branch; a block that
is only partly filled, the *tail* of a sequence that ended, is a leaf. Each namespace has a root of its own, and nothing
is ever found in another's.

The tree is one holder of every block in it. A node is *idle* when it is the only one; idle nodes may be evicted, those
whose turn of use ended first going first, but for nodes that are held for a while, which go last. A lease that reads a
node reads its parents too, and lets go of the last block first, so a node never becomes idle before its children, and
the one that goes first is always a leaf."""

import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from kvist.base.errors import InvariantError
from kvist.cache.keys import block_key, root_key
from kvist.cache.pool import BlockPool

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Node:
    """One block of the tree. `key`: see `keys`. `block`, `open`: its ids in the two pools; a root has neither.
    `children` are full blocks, `tails` partly filled ones, both in the order of their tokens. `until`: others go first
    until then, in seconds of the epoch; never later than its parent's. `windows`: its block in each group of layers
    with a window, -1 where that is gone; owned by the group."""

    key: bytes
    tokens: Tokens = ()
    parent: "Node | None" = None
    block: int = -1
    open: int | None = None
    until: float = 0.0
    windows: list[int] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)
    tails: list["Node"] = field(default_factory=list)


class PrefixTree:
    """Nodes over one pool of blocks of `block_size` tokens.

    With an `open_pool` codecs are lossy: a full block is sealed, so it can only be read whole, and a tail is readable,
    up to any of its tokens, because the tree also holds its open block."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        open_pool: BlockPool | None = None,
        identity: bytes = b"",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pool = pool
        self._open_pool = open_pool
        self._size = block_size
        self._identity = identity
        self._clock = clock
        self.removed: Callable[[Node], None] = lambda node: None  # told of each node that has left
        self._roots: dict[str, Node] = {}
        self._nodes: dict[int, Node] = {}  # by block
        # Least recently used first. The idle tails that hold an open block stand in both.
        self._idle: OrderedDict[Node, None] = OrderedDict()
        self._idle_open: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        """How many blocks it holds."""
        return len(self._nodes)

    @property
    def idle(self) -> int:
        """How many blocks nobody but the tree holds."""
        return len(self._idle)

    @property
    def idle_open(self) -> int:
        """How many open blocks nobody but the tree holds."""
        return len(self._idle_open)

    def root(self, namespace: str) -> Node:
        """Where all token sequences of `namespace` begin."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(root_key(self._identity, namespace))
        return root

    def roots(self) -> Iterator[tuple[str, Node]]:
        """All roots, each with its namespace."""
        return iter(self._roots.items())

    def is_idle(self, node: Node) -> bool:
        """Whether nobody but the tree holds its block."""
        return node in self._idle

    def child(self, node: Node, tokens: Tokens) -> Node | None:
        """The full block behind `node` that holds exactly `tokens`."""
        place = bisect_left(node.children, tokens, key=_tokens)
        found = node.children[place] if place < len(node.children) else None
        return found if found is not None and found.tokens == tokens else None

    def partial(self, node: Node, tokens: Tokens) -> tuple[Node | None, int]:
        """The block behind `node` that shares the most first tokens with `tokens` and can be read up to there, and how
        many these are, at least one."""
        best, longest = None, 0
        for siblings in (node.tails,) if self._open_pool is not None else (node.tails, node.children):
            # In sorted order what shares the most stands next to where the tokens would stand.
            place = bisect_left(siblings, tokens, key=_tokens)
            for candidate in siblings[max(0, place - 1) : place + 1]:
                shared = _shared(candidate.tokens, tokens)
                if shared > longest:
                    best, longest = candidate, shared
        return best, longest

    def insert(self, parent: Node, tokens: Tokens, block: int, open_block: int | None = None) -> Node:
        """A new node over a block that its lease goes on holding; the tree becomes one more holder of it.

        A tail that it makes superfluous goes: one over the same block, from which another lease was cut shorter, and
        one that nobody reads."""
        if block in self._nodes:
            self._remove(self._nodes[block])
        node = Node(block_key(parent.key, tokens), tokens, parent, block, open_block)
        tail = len(tokens) < self._size
        if tail != (open_block is not None) and self._open_pool is not None:
            raise InvariantError(f"a block of {len(tokens)} tokens, open: {open_block is not None}, joins the tree")
        self._pool.share(block)
        if open_block is not None and self._open_pool is not None:
            self._open_pool.share(open_block)
        insort(parent.tails if tail else parent.children, node, key=_tokens)
        self._nodes[block] = node
        if tail or self._open_pool is None:
            place = bisect_left(parent.tails, tokens, key=_tokens)
            before = parent.tails[place - 1] if place else None
            if before is not None and before in self._idle and tokens[: len(before.tokens)] == before.tokens:
                self._remove(before)
        return node

    def hold(self, node: Node) -> None:
        """A lease becomes a holder of the node's block, and of its open block."""
        self._idle.pop(node, None)
        self._idle_open.pop(node, None)
        self._pool.share(node.block)
        if node.open is not None and self._open_pool is not None:
            self._open_pool.share(node.open)

    def let_go(self, block: int) -> None:
        """A holder of `block` has given it back: its node, if it has one, may have become idle."""
        node = self._nodes.get(block)
        if node is not None and self._pool.count(block) == 1:
            self._idle[node] = None
            if node.open is not None:
                self._idle_open[node] = None

    def evict(self) -> Node:
        """Forget the idle block that was not used for longest. Its block is free from now on, and not yet changed."""
        now = self._clock()
        # Almost always the first one: few are held, and for minutes.
        return self._remove(next((node for node in self._idle if node.until <= now), next(iter(self._idle))))

    def evict_open(self) -> Node:
        """Forget, of the idle tails that hold an open block, the one not used for longest."""
        return self._remove(next(iter(self._idle_open)))

    def over(self, block: int) -> Node | None:
        """The node whose block this is."""
        return self._nodes.get(block)

    def forget(self, node: Node) -> list[Node]:
        """Forget a node, whoever else holds its block, and what stands behind it, which must be idle. Returns all of
        these, the last ones first."""
        found = [node]
        for one in found:
            found += [*one.children, *one.tails]
        return [self._remove(one) for one in reversed(found)]

    def clear(self) -> int:
        """Forget every idle block; returns how many there were."""
        count = len(self._idle)
        while self._idle:
            self.evict()
        return count

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots."""
        return iter(self._nodes.values())

    def check(self) -> None:
        """Raises `InvariantError` unless order, links, counts and idleness agree."""
        reached = 0
        places = {node: place for place, node in enumerate(self._idle)}
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            for siblings, full in ((node.children, True), (node.tails, False)):
                keys = [child.tokens for child in siblings]
                if any(a >= b for a, b in pairwise(keys)):
                    raise InvariantError("the blocks behind a node of the prefix tree are out of order")
                for child in siblings:
                    if child.parent is not node or self._nodes.get(child.block) is not child:
                        raise InvariantError(f"block {child.block} is not linked into the prefix tree as it should be")
                    if (len(child.tokens) == self._size) != full or not child.tokens:
                        raise InvariantError(f"block {child.block} holds {len(child.tokens)} tokens in a wrong place")
                    if child.until > node.until and node.parent is not None:
                        raise InvariantError(f"block {child.block} is held longer than block {node.block} before it")
                    if child in places and node in places and places[child] > places[node]:
                        raise InvariantError(f"block {node.block} would be evicted before what stands behind it")
                reached += len(siblings)
                stack += siblings
        if reached != len(self._nodes):
            raise InvariantError(f"the prefix tree knows {len(self._nodes)} blocks and reaches {reached}")
        for node in self._nodes.values():
            if (self._pool.count(node.block) == 1) != (node in self._idle):
                raise InvariantError(f"block {node.block} has count {self._pool.count(node.block)}: idle is wrong")
            if (node in self._idle and node.open is not None) != (node in self._idle_open):
                raise InvariantError(f"the open block of block {node.block} is idle when it is not, or the reverse")

    def holds(self, node: Node) -> bool:
        """Whether a node is still in the tree."""
        return self._nodes.get(node.block) is node

    def _remove(self, node: Node) -> Node:
        if node.children or node.tails or node.parent is None:
            raise InvariantError(f"block {node.block} is evicted before what stands behind it")
        siblings = node.parent.children if len(node.tokens) == self._size else node.parent.tails
        del siblings[bisect_left(siblings, node.tokens, key=_tokens)]
        del self._nodes[node.block]
        self._idle.pop(node, None)
        self._idle_open.pop(node, None)
        self._pool.give_back(node.block)
        if node.open is not None and self._open_pool is not None:
            self._open_pool.give_back(node.open)
        self.removed(node)
        return node


def _tokens(node: Node) -> Tokens:
    return node.tokens


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first elements are the same."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
