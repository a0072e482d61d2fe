"""A checkpoint directory in safetensors form: one file, or shards with an index. Read in bounded memory.

The safetensors library maps a file into memory, and every page that was touched stays resident until the file
is unmapped. Copying all tensors of one mapping would hold the weights twice, so a file is mapped anew after
each `WINDOW_BYTES` read.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvist.base.errors import KvistError, WeightsError, brief
from kvist.base.files import atomic_file, read_json
from kvist.weights.parts import parts_beside

WINDOW_BYTES = 8 << 20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Stamp = tuple[tuple[str, int, int, int, int], ...]
# Ticks of file systems' clocks, ns: of a kernel's, with room; and of those that count whole seconds, or two.
_FINE, _COARSE = 20_000_000, 2_000_000_000
_SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors")  # no separator: a shard lies beside its index
_SAID = 160  # characters of what a library says
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies and what its header says. `kind` is the format's own dtype code, such as `BF16`."""

    file: Path
    shape: tuple[int, ...]
    kind: str


class Checkpoint:
    """The tensors of a checkpoint directory, by name. Opening it reads and checks every header, no weights.

    Raises `WeightsError` when no safetensors file is there, when one is missing, truncated or corrupt, when
    index and shards disagree, or when a tensor is stored twice.
    """

    def __init__(self, directory: Path, single: str = SINGLE_FILE) -> None:
        """`single`: the name of the file where there is one."""
        self.directory = directory
        if (directory / single).is_file():
            self._stored = _read_header(directory / single)
        elif (directory / INDEX_FILE).is_file():
            self._stored = _read_shards(directory / INDEX_FILE)
        else:
            raise _nothing_to_read(directory)

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`. Raises `WeightsError` when there is none of that name."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """float32, bfloat16 or float16. Raises `WeightsError` for a missing tensor or any other dtype."""
        stored = self._find(name)
        if stored.kind not in _DTYPES:
            raise WeightsError(
                f"{stored.file}: tensor {brief(name)} is of dtype {stored.kind}, which is not supported "
                f"({', '.join(_DTYPES)} are); convert the checkpoint to BF16"
            )
        return _DTYPES[stored.kind]

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `names` in file order, each in its stored dtype.

        Each is a view of the mapped file: copy it, and let go of it before asking for the next. Memory above
        the copies is then `WINDOW_BYTES` and the largest tensor. Raises `WeightsError`, before the first
        tensor, for a missing name or an unsupported dtype.
        """
        pieces = self._pieces(self._in_file_order(names), None)
        return ((name, tensor) for name, _, tensor in pieces)

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        """Copy each named tensor into its target, which may be a view and of another floating dtype.

        Tensors larger than `WINDOW_BYTES` are copied by rows, so memory above the targets stays below two
        windows. Raises `WeightsError`, before anything is copied, for a missing name, an unsupported dtype or
        a shape that differs from the target's.
        """
        ordered = self._in_file_order(targets)
        for name in ordered:
            stored = self._stored[name]
            expected = tuple(targets[name].shape)
            if stored.shape != expected:
                raise WeightsError(
                    f"{stored.file}: tensor {brief(name)} has shape {brief(list(stored.shape))} where the "
                    f"configuration expects {list(expected)}"
                )
        with torch.no_grad():
            for name, first_row, rows in self._pieces(ordered, WINDOW_BYTES):
                target = targets[name]
                if rows.dim():
                    target = target[first_row : first_row + len(rows)]
                target.copy_(rows)

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise WeightsError(f"{self.directory}: the weights hold no tensor {brief(name)}")
        return self._stored[name]

    def _in_file_order(self, names: Iterable[str]) -> list[str]:
        wanted = set(names)
        if missing := sorted(wanted - set(self._stored)):
            shown = ", ".join(map(brief, missing[:3])) + (", ..." if len(missing) > 3 else "")
            raise WeightsError(f"{self.directory} lacks {len(missing)} of {len(wanted)} tensors: {shown}")
        for name in wanted:
            self.dtype(name)
        return [name for name in self._stored if name in wanted]

    def _pieces(self, names: list[str], most_bytes: int | None) -> Iterator[tuple[str, int, Tensor]]:
        """Yields name, first row, rows: a tensor whole, or by rows where it is larger than `most_bytes`."""
        path, file, touched = None, None, 0
        for name in names:
            stored = self._stored[name]
            row_bytes = prod(stored.shape[1:]) * _DTYPES[stored.kind].itemsize
            rows = stored.shape[0] if stored.shape else 1
            # One without numbers is read at once, however many rows it says that it has.
            step = max(rows, 1) if most_bytes is None or not row_bytes else max(most_bytes // row_bytes, 1)
            for first in range(0, max(rows, 1), step):
                with _reading(stored.file):
                    if file is None or stored.file != path or touched >= WINDOW_BYTES:
                        path, file, touched = stored.file, safe_open(stored.file, framework="pt"), 0
                    whole = rows <= step
                    piece = file.get_tensor(name) if whole else file.get_slice(name)[first : first + step]
                touched += piece.nbytes
                yield name, first, piece


def stamp_of(source: Path) -> Stamp:
    """Name, size, times and inode of each weight file of a directory, or of one file and the parts that belong to it:
    as long as they are the same, so are the weights."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else parts_beside(source)
    stats = [(path.name, path.stat()) for path in files]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats)


def settled_stamp(source: Path) -> tuple[Stamp, bool]:
    """The stamp of weight files, and whether every later change of them will show in it. A file that was written just
    now may be written again within the same tick of its file system's clock: that tick is waited for."""
    stamp, now = stamp_of(source), time.time_ns()
    if 0 < (wait := _settled(stamp) - now) <= _COARSE:
        time.sleep(wait / 1e9)
        stamp, now = stamp_of(source), time.time_ns()
    return stamp, _settled(stamp) <= now


def _settled(stamp: Stamp) -> int:
    """From when on, in ns of the epoch, a change gives another stamp: no change sets a file's time of change back."""
    changed = [changed for *_, changed, _ in stamp]
    return max((at + (_FINE if at % 10**9 else _COARSE) for at in changed), default=0)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to the safetensors file `path`: whole, or not at all.

    Tensors that share memory are written once each. `metadata` is added to `{"format": "pt"}`, which
    transformers asks for. Raises `WeightsError` when the file cannot be written; an older file at `path` is
    then unchanged.
    """
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        whole[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        with atomic_file(path) as temporary:
            save_file(whole, temporary, {"format": "pt"} | dict(metadata or {}))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot write {path}: {_one_line(error)}") from error
    except KvistError as error:
        raise WeightsError(str(error)) from error


def _read_header(path: Path) -> dict[str, _Stored]:
    """What the file's header says, in the order of the bytes. Raises `WeightsError` naming the file."""
    with _reading(path):
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.offset_keys():
                entry = file.get_slice(name)
                found[name] = _Stored(path, tuple(entry.get_shape()), entry.get_dtype())
        with path.open("rb") as raw:
            header = raw.read(int.from_bytes(raw.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=_unique)
    except KeyError as error:
        raise WeightsError(f"{path}: the header names {brief(error.args[0])} twice") from None
    return found


def _read_shards(index: Path) -> dict[str, _Stored]:
    """The tensors of all shards that the index names, in the shards' order."""
    try:
        weight_map = read_json(index).get("weight_map")
    except KvistError as error:
        raise WeightsError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: 'weight_map' should be an object from tensor names to file names")
    for file in weight_map.values():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise WeightsError(f"{index}: {brief(file)} is not the plain name of a .safetensors file beside it")
    found: dict[str, _Stored] = {}
    for file in sorted(set(weight_map.values())):
        shard = index.parent / file
        if not shard.is_file():
            raise WeightsError(f"{shard} is missing; download the checkpoint again")
        for name, stored in _read_header(shard).items():
            if name in found:
                raise WeightsError(f"tensor {brief(name)} is stored twice: in {found[name].file} and in {shard}")
            found[name] = stored
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise WeightsError(f"{index.parent / file} lacks tensor {brief(name)}, which its index places there")
    return found


def _nothing_to_read(directory: Path) -> WeightsError:
    if not directory.is_dir():
        return WeightsError(f"{directory} is not a directory")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        return WeightsError(
            f"{directory} holds {pickles[0]} and no {SINGLE_FILE}; pickled weights can run code when read: "
            "convert to safetensors (with transformers: save_pretrained)"
        )
    return WeightsError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the library and the system say about `path` into one line."""
    try:
        yield
    except SafetensorError as error:
        with path.open("rb") as raw:
            if raw.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise WeightsError(f"{path} is a Git LFS pointer; run `git lfs pull`") from error
        reason = _one_line(error)
        raise WeightsError(f"{path} is truncated or corrupt ({reason}); download it again") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {_one_line(error)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `KeyError` with the first key that stands in it twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= _SAID else f"{said[: _SAID - 3]}..."
