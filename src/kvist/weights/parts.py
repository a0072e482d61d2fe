"""The files of a GGUF model that is split, by their names alone: NAME-00001-of-00003.gguf and so on, as llama.cpp's
splitter calls them."""

import re
from pathlib import Path

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MOST = 4096


def part_name(name: str, number: int, count: int) -> str:
    """What part `number`, from 0, of `count` is called, by the name of any of them. Another name ends on that."""
    found = _PART.fullmatch(name)
    stem = name.removesuffix(".gguf") if found is None else found["stem"]
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def part_names(name: str) -> list[str]:
    """The names of all parts, in order, by the name of any of them. A name of another form stands alone."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]) <= _MOST:
        return [name]
    return [part_name(name, number, int(found["count"])) for number in range(int(found["count"]))]


def parts_beside(path: Path) -> list[Path]:
    """The files of the model that `path` is one of, as far as they are there; itself if it is no part."""
    found = [path.with_name(name) for name in part_names(path.name)]
    return [one for one in found if one == path or one.is_file()]
