"""What the cache holds at a moment, as plain values. Nothing here can change it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from kvist.base.tables import Tabular
from kvist.base.units import format_bytes
from kvist.cache.manager import PUBLIC
from kvist.cache.tier import MEMORY
from kvist.cache.tree import Node, PrefixTree
from kvist.runtime.engine import Engine


@dataclass(frozen=True)
class PrefixNode:
    """A block in the tree of prefixes: `tokens` behind those of whoever holds it as a child. `idle`: no sequence reads
    it now, so it goes when room is needed. `key`: its name in the tiers behind the memory, in hexadecimal."""

    tokens: tuple[int, ...]
    key: str
    idle: bool
    children: tuple["PrefixNode", ...]

    @property
    def blocks(self) -> int:
        """Of it and all behind it."""
        return 1 + sum(child.blocks for child in self.children)


@dataclass(frozen=True)
class CacheUsage(Tabular):
    """How much of what is there is in use.

    `kv`: the codecs, as they were chosen; `block_tokens`: tokens of a block; `capacity`, `used`, `idle`: blocks, and of
    the used ones those that only the tree of prefixes holds. `open_used`: blocks in full precision, where codecs are
    lossy. Bytes: `by_codec` of the used blocks in memory, `by_tenant` of what each one's prefixes hold there, `by_tier`
    of all that is kept."""

    kv: str
    block_tokens: int
    block_bytes: int
    capacity: int
    used: int
    idle: int
    open_used: int
    by_codec: Mapping[str, int]
    by_tenant: Mapping[str, int]
    by_tier: Mapping[str, int]

    def tables(self) -> list[Table]:
        table = Table("cache", "in use", box=None, pad_edge=False)
        table.add_row("blocks", f"{self.used:,} of {self.capacity:,}, {self.idle:,} of them idle")
        for title, parts in (("codec", self.by_codec), ("tenant", self.by_tenant), ("tier", self.by_tier)):
            for name, nbytes in parts.items():
                table.add_row(f"{title} {name or '(own)'}", format_bytes(nbytes))
        return [table]


def usage(engine: Engine, disk: int | None) -> CacheUsage:
    """On the engine's thread. `disk`: bytes that are kept there, if any may be."""
    manager, layout = engine.runner.manager, engine.runner.layout
    used, opened = manager.pool.used, 0 if manager.open_pool is None else manager.open_pool.used
    # Of layers with a window no more blocks are held than their own pools say.
    counts = [used, *(group.pool.used for group in manager.windows)]
    by_codec, by_tenant = Counter[str](), Counter[str]()
    for index, layer in enumerate(layout.layers):
        for stream in layer.streams:
            nbytes = sum(plane.nbytes for plane in stream.planes)
            by_codec[stream.codec.name] += counts[layout.group_of[index]] * nbytes
    if opened:
        by_codec[f"{layout.full.name}, open"] += opened * layout.open_bytes
    for namespace, root in manager.tree.roots():
        by_tenant[_tenant(namespace)] += (_count(root) - 1) * layout.block_bytes
    by_tier = {MEMORY: sum(by_codec.values())} | ({} if disk is None else {"disk": disk})
    return CacheUsage(
        layout.kv,
        layout.block_size,
        layout.block_bytes,
        manager.pool.capacity,
        used,
        manager.tree.idle,
        opened,
        dict(by_codec),
        {name: nbytes for name, nbytes in by_tenant.items() if nbytes},
        by_tier,
    )


def prefixes(engine: Engine) -> dict[str, tuple[PrefixNode, ...]]:
    """On the engine's thread: the tree of prefixes, by namespace."""
    tree = engine.runner.manager.tree
    return {namespace: found for namespace, root in tree.roots() if (found := _children(root, tree))}


def _children(root: Node, tree: PrefixTree) -> tuple[PrefixNode, ...]:
    """Built from the leaves up, as a long text is deeper than Python calls."""
    order = [root]
    for node in order:
        order += [*node.children, *node.tails]
    built: dict[int, PrefixNode] = {}

    def of(node: Node) -> tuple[PrefixNode, ...]:
        return tuple(built.pop(id(child)) for child in (*node.children, *node.tails))

    for node in reversed(order[1:]):
        built[id(node)] = PrefixNode(node.tokens, node.key.hex(), tree.is_idle(node), of(node))
    return of(root)


def _count(root: Node) -> int:
    order = [root]
    for node in order:
        order += [*node.children, *node.tails]
    return len(order)


def _tenant(namespace: str) -> str:
    """Whose a namespace is; what all share is nobody's."""
    return "public" if namespace == PUBLIC else namespace.split("\0")[0]
