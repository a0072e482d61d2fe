"""Writes blocks into a folder until it is killed, and says on stdout which are kept. No PyTorch: it starts quickly.

With a number it writes at once. Without one it waits for numbers on stdin: for each it starts a process that begins
there, whose id is told first, and says "dead" once somebody has killed it. So a kill takes milliseconds."""

import os
import random
import sys
from pathlib import Path

from kvist.cache.disk import DiskTier
from kvist.cache.keys import root_key
from kvist.cache.record import BlockId, header

SIZE, PAYLOAD = 16, 20_000


def block_of(number: int) -> tuple[BlockId, bytes]:
    """A block and its planes, both told by its number."""
    root = root_key(b"writer", "")
    return BlockId.after(root, root, tuple(range(number, number + SIZE))), random.Random(number).randbytes(PAYLOAD)


def write(folder: Path, budget: int, start: int, most: int) -> None:
    """Write the blocks from `start` on, again and again after `most` of them, each younger than the last."""
    disk = DiskTier(folder, budget)
    for time in range(1_000_000):
        number = start + time % most
        block, planes = block_of(number)
        if disk.put(block.name, (header(block, planes), planes), float(time)):
            os.write(1, b"%d\n" % number)  # whole, even where the next instruction is the last


def serve(folder: Path, budget: int) -> None:
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os.write(1, b"%d\n" % os.getpid())
            write(folder, budget, int(line), 1_000_000)
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    place, size, *rest = sys.argv[1:]
    os.write(1, b"ready\n")
    if rest:
        write(Path(place), int(size), int(rest[0]), int(rest[1]))
    else:
        serve(Path(place), int(size))
