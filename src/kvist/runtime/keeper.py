"""Between the engine and the kept cache: what sequences bring back from the tiers, and what is handed over to them.

A block that was kept joins a lease as a computed one does: reserved, its bytes put in place, committed, published. All
of this is on the engine's thread; the tiers are only waited for when there is nothing else to do."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Protocol

from kvist.base.errors import OutOfBlocks
from kvist.cache.kept import STALL, KeptCache
from kvist.cache.keys import block_key, root_key
from kvist.cache.manager import PUBLIC, CacheManager
from kvist.cache.record import BlockId, Loss, block_name
from kvist.cache.tier import MEMORY, Buffer
from kvist.cache.tree import Node
from kvist.runtime.sequence import Sequence

_BESIDE_ANSWERS = 8  # blocks that are put in place in one step while somebody waits for the next token of an answer
_ALONE = 64
_DURABLE = 2 * 86_400.0  # seconds: longer than anything else is held, so that what must be written has room before it


class BlockStore(Protocol):
    """The bytes of blocks."""

    def read_block(self, blocks: List[int]) -> bytearray: ...

    def write_block(self, blocks: List[int], data: Buffer) -> None: ...


@dataclass(frozen=True)
class _Unwritten:
    block: BlockId
    until: float


class Keeper:
    """`now` gives seconds of the epoch, by which tiers say until when others go first."""

    def __init__(self, manager: CacheManager, store: BlockStore, kept: KeptCache, now: Callable[[], float]) -> None:
        self.kept = kept
        self._manager = manager
        self._store = store
        self._now = now
        # What the writers had no room for yet, while it is in the tree.
        self._unwritten: OrderedDict[Node, _Unwritten] = OrderedDict()
        manager.evicted = self._evicted
        manager.losing = self._losing

    def begin(self, sequence: Sequence) -> None:
        """A sequence has its lease: begin to fetch what is kept of it behind what the lease already holds."""
        lease, size = sequence.lease, self._manager.block_size
        assert lease is not None
        blocks = self._blocks_of(sequence)
        sequence.begun = self._now()
        self._hold(sequence)
        if self.kept.tiers:
            held = [block_name(lease.root(index).key, node.key) for index, node in enumerate(lease.path[1:])]
            self.kept.pin([*held, *(block.name for block in blocks)], _until(sequence))
            if sequence.request.durable:
                self._keep_again(sequence)
        if not blocks:
            return
        loss = self.kept.losses.of(blocks[0].name)
        sequence.note_loss(loss)
        if not self.kept.has(blocks[0]):
            rival = self._rival(sequence, blocks[0]) if not lease.length and loss is None else None
            if rival is not None:
                sequence.note_loss(Loss.NAMESPACE)
                self.kept.losses.add(blocks[0].name, Loss.NAMESPACE, rival)
            return
        start = len(lease.path) - 1
        if lease.length > start * size:
            # Part of that block was found in memory; the whole of it, and what follows, is better, if it is there.
            if not self.kept.is_kept(blocks[0]):
                return
            shared = lease.length - start * size
            self._manager.rollback(lease, start * size)
            sequence.count_cached(-shared, MEMORY)
        sequence.fetch = self.kept.fetch(blocks, start)

    def advance(self, running: List[Sequence]) -> None:
        """Put in place what has been read for these sequences. Those that have all of it are computed from then on."""
        loading = [sequence for sequence in running if sequence.fetch is not None]
        most = _ALONE if len(loading) == len(running) else _BESIDE_ANSWERS
        for sequence in loading:
            fetch = sequence.fetch
            assert fetch is not None
            for _ in range(most):
                if not fetch.ready:
                    break
                if not self._put_in_place(sequence):
                    self.drop(sequence)
                    break
            if sequence.fetch is not None and fetch.ended:
                sequence.note_loss(fetch.loss)
                sequence.fetch = None
            elif sequence.fetch is not None and not fetch.ready and time.monotonic() - fetch.moved > STALL:
                sequence.note_loss(Loss.UNREADABLE)
                self.kept.stalled(fetch.blocks[fetch.taken])
                self.drop(sequence)
        self.pump()

    def drop(self, sequence: Sequence) -> None:
        """A sequence gives up what is being read for it."""
        if sequence.fetch is not None:
            self.kept.cancel(sequence.fetch)
            sequence.fetch = None

    def wait(self, running: Iterable[Sequence], seconds: float) -> None:
        """Until something has been read for one of these sequences."""
        fetches = [sequence.fetch for sequence in running if sequence.fetch is not None]
        if fetches:
            self.kept.wait(fetches, seconds)

    def keep(self, sequence: Sequence, nodes: List[Node]) -> None:
        """These blocks of a sequence are new in the prefix tree: have them written."""
        assert sequence.lease is not None
        if not nodes:
            return
        self._hold(sequence)
        if not self.kept.tiers:
            return
        if not sequence.request.kept:
            for node in nodes:
                self.kept.losses.add(self._id(node).name, Loss.UNKEPT, MEMORY)
            return
        # All blocks of a sequence are as old as its beginning, the later ones older: they are given up first.
        until, end = _until(sequence), len(sequence.lease.path) - 1
        for place, node in enumerate(nodes, end - len(nodes)):
            self._unwritten[node] = _Unwritten(self._id(node), until - place * 1e-6)
        self.pump()

    def _keep_again(self, sequence: Sequence) -> None:
        """What a sequence found in memory may have left the tiers, or never have got there: have it written."""
        assert sequence.lease is not None
        for place, node in enumerate(sequence.lease.path[1:]):
            block = self._id(node)
            if not self.kept.is_kept(block):
                self.kept.losses.clear(block.name)
                self._unwritten[node] = _Unwritten(block, _until(sequence) - place * 1e-6)
        self.pump()

    def flush(self, seconds: float) -> bool:
        """Write what is not written yet, for at most `seconds`; whether all of it is."""
        for node in list(self._unwritten):
            self._hand_over(node)
        return self.kept.flush(seconds)

    def _put_in_place(self, sequence: Sequence) -> bool:
        """The next block that was read joins the lease. False when the lease cannot take it."""
        lease, fetch, manager = sequence.lease, sequence.fetch, self._manager
        assert lease is not None
        assert fetch is not None
        # Another sequence may have computed, or loaded, the same meanwhile.
        found = manager.adopt(lease, sequence.tokens[: sequence.reusable], partly=False)
        sequence.count_cached(found, MEMORY)
        position, size = (fetch.start + fetch.taken) * manager.block_size, manager.block_size
        fetched = self.kept.take(fetch)
        if position < lease.length:
            return True
        if position > lease.length or lease.tip.key != fetched.block.parent:
            return False
        try:
            manager.reserve(lease, size)
        except OutOfBlocks:
            return False
        try:
            self._store.write_block(manager.blocks_at(lease, position // size), fetched.payload)
        except BaseException:
            manager.rollback(lease, position)
            raise
        manager.commit(lease, size)
        manager.publish(lease, sequence.tokens)
        self._hold(sequence)
        sequence.count_cached(size, fetched.tier)
        return True

    def _hold(self, sequence: Sequence) -> None:
        if sequence.request.ttl and sequence.lease is not None:
            self._manager.hold_until(sequence.lease, sequence.begun + sequence.request.ttl)

    def _blocks_of(self, sequence: Sequence) -> list[BlockId]:
        """The blocks of a sequence behind those of its lease, as far as they may be read from the cache."""
        lease, size = sequence.lease, self._manager.block_size
        assert lease is not None
        parent, blocks = lease.tip.key, list[BlockId]()
        for start in range((len(lease.path) - 1) * size, sequence.reusable - size + 1, size):
            index = start // size
            if lease.branch is not None and index == lease.branch[0]:
                parent = lease.branch[1].key
            tokens = tuple(sequence.tokens[start : start + size])
            blocks.append(BlockId.after(lease.root(index).key, parent, tokens))
            parent = blocks[-1].key
        return blocks

    def _rival(self, sequence: Sequence, block: BlockId) -> str | None:
        """The tier that keeps the first block of a sequence as something else made it; None where there is none."""
        for identity in self.kept.rivals:
            assert sequence.lease is not None
            tenant = sequence.request.namespace if sequence.lease.branch is None else PUBLIC
            root = root_key(identity, tenant)
            name = block_name(root, block_key(root, block.tokens))
            if (found := next((tier.name for tier in self.kept.tiers if tier.contains(name)), None)) is not None:
                return found
        return None

    @property
    def pending(self) -> bool:
        """Whether there is something that the writers have had no room for."""
        return bool(self._unwritten)

    def pump(self) -> None:
        """Hand over what waits for that, as far as the writers have room."""
        while self._unwritten and self.kept.has_room:
            self._hand_over(next(iter(self._unwritten)))

    def _hand_over(self, node: Node) -> None:
        """Copy a block for the writers, unless it is kept already or has left the tree."""
        todo = self._unwritten.pop(node)
        if not self._manager.tree.holds(node):
            return
        if self.kept.is_kept(todo.block):
            self.kept.pin([todo.block.name], todo.until)
        else:
            self._save(node, todo)

    def _losing(self, node: Node) -> None:
        """A node is about to lose a block of a window: it is written now, if the writers have room, or never."""
        if node in self._unwritten and self.kept.has_room:
            self._hand_over(node)

    def _save(self, node: Node, todo: _Unwritten) -> None:
        if -1 in node.windows:  # a part of it is gone
            self.kept.losses.add(todo.block.name, Loss.UNWRITTEN, MEMORY)
        else:
            self.kept.save(todo.block, self._store.read_block([node.block, *node.windows]), todo.until)

    def _evicted(self, node: Node) -> None:
        """The tree has just forgotten a node. What was not written by now is, if the writers have room."""
        if len(node.tokens) < self._manager.block_size:
            return
        todo = self._unwritten.pop(node, None)
        block = todo.block if todo is not None else self._id(node)
        if todo is not None and self.kept.has_room:
            self._save(node, todo)
        elif not self.kept.is_kept(block):
            self.kept.losses.add(block.name, Loss.EVICTED if todo is None else Loss.UNWRITTEN, MEMORY)

    @staticmethod
    def _id(node: Node) -> BlockId:
        assert node.parent is not None
        root = node.parent
        while root.parent is not None:
            root = root.parent
        return BlockId(root.key, node.parent.key, node.tokens, node.key)


def _until(sequence: Sequence) -> float:
    """Before when others go first in the tiers: seconds of the epoch."""
    return sequence.begun + (_DURABLE if sequence.request.durable else sequence.request.ttl)
