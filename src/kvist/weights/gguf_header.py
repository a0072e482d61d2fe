"""What a GGUF file says of itself: metadata, and where its tensors lie. Nothing of it is believed before it is checked.

The format: magic, version, numbers of tensors and of keys; keys with typed values; names, dimensions, types and offsets
of the tensors; then their bytes, each at a multiple of the alignment. Little endian, versions 2 and 3."""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kvist.base.errors import WeightsError
from kvist.weights.parts import part_name, part_names

_MAGIC = b"GGUF"
_MOST_KEYS = _MOST_TENSORS = 1 << 16
_MOST_NAME = 1 << 12  # bytes
_MOST_TEXT = 16 << 20
_MOST_ITEMS = 1 << 23  # of an array
_MOST_DIMS, _MOST_SIZE = 4, 1 << 40
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """`shape` as PyTorch has it, outermost first; `start`: its first byte in the file at `path`."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class GgufHeader:
    """`path`: of the file, or of the first one where a model is split into several."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Raises `WeightsError` where it is not said."""
        return self.get("general.architecture", str)

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A value of the metadata. Raises `WeightsError` for one that is missing without a default, or of another
        kind."""
        value = self.metadata.get(key)
        if value is None:
            if default is ...:
                raise WeightsError(f"{self.path}: the key {key!r} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise WeightsError(f"{self.path}: {key} should be of type {kind.__name__}, got {value!r:.80}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts. Raises `WeightsError`."""
        return self._items(key, str)

    def numbers(self, key: str, kind: type) -> list[Any]:
        """A list of int or float. Raises `WeightsError`."""
        return self._items(key, kind)

    def _items(self, key: str, kind: type) -> list[Any]:
        value = self.get(key, list)
        if not all(type(item) is kind for item in value):
            raise WeightsError(f"{self.path}: {key} should be a list of {kind.__name__}")
        return list(value)


def read_header(path: Path) -> GgufHeader:
    """Reads and checks all but the tensors' bytes, of all files of a model that is split. Raises `WeightsError` naming
    the file and what is wrong with it."""
    header = _read_file(path)
    count = header.get("split.count", int, 1)
    if count <= 1:
        return header
    number, names = header.get("split.no", int), part_names(path.name)
    if number != 0:
        first = part_name(path.name, 0, count)
        raise WeightsError(f"{path} is part {number + 1} of {count} of a model; name the first one, {first}")
    if len(names) != count or names[0] != path.name:
        wanted = part_name(path.name, 0, count)
        raise WeightsError(f"{path} is the first of {count} parts; they are found by their names, so call it {wanted}")
    tensors = dict(header.tensors)
    for index, name in enumerate(names[1:], start=1):
        part = _read_part(path.with_name(name), index, count)
        if twice := tensors.keys() & part.tensors.keys():
            raise WeightsError(f"{part.path}: tensor {min(twice)!r:.80} stands in another part, too")
        tensors |= part.tensors
    wanted = header.get("split.tensors.count", int, len(tensors))
    if wanted != len(tensors):
        raise WeightsError(f"{path}: its {count} parts hold {len(tensors):,} tensors, and it says {wanted:,}")
    return GgufHeader(path, header.metadata, tensors)


def _read_part(path: Path, index: int, count: int) -> GgufHeader:
    if not path.is_file():
        raise WeightsError(f"{path} is missing: part {index + 1} of a model of {count} files, which lie in one folder")
    part = _read_file(path)
    said = part.get("split.no", int) + 1, part.get("split.count", int)
    if said != (index + 1, count):
        raise WeightsError(f"{path} says that it is part {said[0]} of {said[1]}, and its name {index + 1} of {count}")
    return part


def _read_file(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise WeightsError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Reader(path, view).read()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from None


class _Reader:
    """Reads on from `at`; never beyond the end of the file."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._at = 0

    def read(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise WeightsError(f"{self._path} is no GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            raise WeightsError(f"{self._path} has version {version} of GGUF; 2 and 3, little endian, are read")
        tensors, keys = self._count(_MOST_TENSORS, "tensors"), self._count(_MOST_KEYS, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text(_MOST_NAME, "a key")
            if key in metadata:
                raise WeightsError(f"{self._path}: the key {key!r:.80} stands there twice")
            metadata[key] = self._value(self._number("I"), f"{key!r:.80}")
        infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(tensors):
            name = self._text(_MOST_NAME, "a tensor's name")
            if name in infos:
                raise WeightsError(f"{self._path}: tensor {name!r:.80} stands there twice")
            infos[name] = self._info(name)
        return GgufHeader(self._path, metadata, self._placed(infos, metadata))

    def _info(self, name: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        count = self._number("I")
        if not 1 <= count <= _MOST_DIMS:
            raise WeightsError(f"{self._path}: tensor {name!r:.80} has {count} dimensions")
        shape = tuple(self._number("Q") for _ in range(count))[::-1]
        if not all(1 <= size <= _MOST_SIZE for size in shape) or prod(shape) > _MOST_SIZE:
            raise WeightsError(f"{self._path}: tensor {name!r:.80} has an impossible shape, {list(shape)}")
        kind = self._number("I")
        try:
            found = GGMLQuantizationType(kind)
        except ValueError:
            raise WeightsError(f"{self._path}: tensor {name!r:.80} is of type {kind}, which is not known") from None
        return shape, found, self._number("Q")

    def _placed(
        self, infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]], metadata: dict[str, Any]
    ) -> dict[str, GgufTensor]:
        """The tensors at their places, which lie within the file and do not overlap."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise WeightsError(f"{self._path}: general.alignment should be a power of two, got {alignment!r:.80}")
        start, end, placed = -(-self._at // alignment) * alignment, len(self._view), {}
        for name, (shape, kind, offset) in infos.items():
            size, nbytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % size:
                raise WeightsError(
                    f"{self._path}: tensor {name!r:.80} has rows of {shape[-1]} numbers, and {kind.name} has blocks of "
                    f"{size}"
                )
            nbytes *= prod(shape) // size
            if offset % alignment or offset + nbytes > end - start:
                raise WeightsError(
                    f"{self._path} is truncated or damaged: tensor {name!r:.80} should lie at {start + offset:,} and "
                    f"take {nbytes:,} bytes of {end:,}"
                )
            placed[name] = GgufTensor(shape, kind, start + offset, nbytes, self._path)
        last = 0
        for name, tensor in sorted(placed.items(), key=lambda item: item[1].start):
            if tensor.start < last:
                raise WeightsError(f"{self._path} is damaged: tensor {name!r:.80} overlaps the one before it")
            last = tensor.start + tensor.nbytes
        return placed

    def _value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self._text(_MOST_TEXT, what)
        if kind == _ARRAY:
            inner, count = self._number("I"), self._count(_MOST_ITEMS, what)
            if inner == _STRING:
                return [self._text(_MOST_TEXT, what) for _ in range(count)]
            if inner not in _NUMBERS:
                raise WeightsError(f"{self._path}: {what} is a list of type {inner}, which is not read")
            size = struct.calcsize(f"<{_NUMBERS[inner]}")
            return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self._take(size * count)))
        if kind not in _NUMBERS:
            raise WeightsError(f"{self._path}: {what} is of type {kind}, which is not known")
        number = self._number(_NUMBERS[kind])
        # 1e-5 was meant, and not what float32 makes of it.
        return float(str(np.float32(number))) if _NUMBERS[kind] == "f" else number

    def _text(self, most: int, what: str) -> str:
        length = self._number("Q")
        if length > most:
            raise WeightsError(f"{self._path} is damaged: {what} has {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise WeightsError(f"{self._path} is damaged: {what} is no UTF-8") from None

    def _count(self, most: int, what: str) -> int:
        count = self._number("Q")
        if count > most:
            raise WeightsError(f"{self._path} is damaged: it claims {count:,} of {what}")
        return int(count)

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        if count > len(self._view) - self._at:
            raise WeightsError(f"{self._path} is truncated within its header")
        self._at += count
        return self._view[self._at - count : self._at]
