"""Writes blocks into a folder until it is killed, and says on stdout which are kept. No PyTorch: it starts quickly."""

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


def main(folder: str, start: int) -> None:
    disk = DiskTier(Path(folder), 1 << 30)
    print("ready", flush=True)
    for number in range(start, start + 1_000_000):
        block, planes = block_of(number)
        if disk.put(block.name, (header(block, planes), planes), 0.0):
            print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
