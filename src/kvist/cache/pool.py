"""Block ids, their reference counts and the free list. No tensor, no device, no knowledge of tokens."""

from kvist.base.errors import InvariantError, OutOfBlocks


class BlockPool:
    """Owns the ids `0 .. capacity - 1`. An id is free, or held by as many holders as its count says.

    The free list is a stack: the block given back last is handed out first, while its memory is still warm.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a pool needs at least one block, got {capacity}")
        self._counts = [0] * capacity
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def capacity(self) -> int:
        return len(self._counts)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._counts) - len(self._free)

    def count(self, block: int) -> int:
        """How many holders `block` has; 0 when it is free."""
        return self._counts[block]

    def take(self, number: int) -> list[int]:
        """`number` free blocks, each held once. Raises `OutOfBlocks`, taking none, when there are fewer."""
        if number > len(self._free):
            raise OutOfBlocks(number, len(self._free))
        taken = [self._free.pop() for _ in range(number)]
        for block in taken:
            self._counts[block] = 1
        return taken

    def share(self, block: int) -> None:
        """One more holder of a block that is already held."""
        if self._counts[block] < 1:
            raise InvariantError(f"block {block} is free and cannot be shared")
        self._counts[block] += 1

    def give_back(self, block: int) -> None:
        """One holder less; the last one frees the block."""
        if self._counts[block] < 1:
            raise InvariantError(f"block {block} is given back but nobody holds it")
        self._counts[block] -= 1
        if self._counts[block] == 0:
            self._free.append(block)

    def check(self) -> None:
        """Raises `InvariantError` unless every id is exactly one of free and held."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise InvariantError("a block stands in the free list twice")
        for block, count in enumerate(self._counts):
            if count < 0 or (count == 0) != (block in free):
                raise InvariantError(f"block {block} has count {count} and is {'' if block in free else 'not '}free")
