"""The tensors of a GGUF file, or of several that make one model, as a checkpoint under the names of Hugging Face."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from kvist.base.errors import WeightsError
from kvist.weights.gguf_header import GgufHeader, GgufTensor

Kind = GGMLQuantizationType
_FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_NUMPY = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: np.uint16}
_WINDOW_BYTES = 8 << 20  # decoded at once
# Types whose blocks are groups of packed weights: bits, and numbers in a group.
GROUPS = {Kind.Q8_0: (8, 32), Kind.Q4_0: (4, 32)}


class Codes(Protocol):
    """A place for whole numbers and their scales: rows of a packed weight of `grouping` bits and columns."""

    grouping: tuple[int, int]

    def put_codes(self, codes: Tensor, scales: Tensor) -> None: ...


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor, or one matrix of a tensor of several, under its new name. `order`: in which its rows lie in the file,
    or its numbers, if it is a vector; None: in their own. `add`: what is added to all numbers."""

    tensor: GgufTensor
    order: np.ndarray | None = None
    transposed: bool = False
    add: float = 0.0
    matrix: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As it lies in the file."""
        return self.tensor.shape if self.matrix is None else self.tensor.shape[1:]

    @property
    def shape_there(self) -> tuple[int, ...]:
        """Of the tensor of the new name."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])


@dataclass(frozen=True, eq=False)
class Joined:
    """Matrices of as many columns whose rows, one's behind the other's, are one tensor under its new name."""

    parts: tuple[Part, ...]

    @property
    def shape_there(self) -> tuple[int, ...]:
        return sum(part.shape_there[0] for part in self.parts), self.parts[0].shape_there[1]


def woven_rows(rows: int, heads: int) -> np.ndarray:
    """Where each row stands when the two halves of each of `heads` heads are woven into each other, [rows]."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


class GgufCheckpoint:
    """`parts` by the names of Hugging Face. The interface is that of `Checkpoint`."""

    def __init__(self, header: GgufHeader, parts: Mapping[str, Part | Joined]) -> None:
        self.directory = header.path
        self._parts = dict(parts)
        self._data = {path: np.memmap(path, np.uint8, mode="r") for path in {t.path for t in header.tensors.values()}}

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`."""
        return self._find(name).shape_there

    def dtype(self, name: str) -> torch.dtype:
        """As stored; bfloat16 where it is quantized, or of several types."""
        kinds = self.kinds(name)
        return _FLOATS.get(next(iter(kinds)), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16

    def kinds(self, name: str) -> set[GGMLQuantizationType]:
        """The types in the file of what tensor `name` is made of."""
        return {part.tensor.kind for part in _pieces(self._find(name))}

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is."""
        return any(kind not in _FLOATS for name in self._parts for kind in self.kinds(name))

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `names`, one after another, as numbers."""
        for name in names:
            yield name, self._whole(self._find(name))

    def copy_into(self, targets: Mapping[str, Any]) -> None:
        """Copy each named tensor into its target, by rows, decoded; into packed weights whose groups are those of the
        file as they are. Raises `WeightsError`, before anything is copied, for a missing name or another shape."""
        for name, target in targets.items():
            if self.shape(name) != tuple(target.shape):
                raise WeightsError(
                    f"{self.directory}: tensor {name!r:.80} has shape {list(self.shape(name))} where the configuration "
                    f"expects {list(target.shape)}"
                )
        for name, target in targets.items():
            part = self._parts[name]
            if isinstance(part, Joined):
                target.copy_(self._whole(part))
                continue
            if part.transposed:
                target = target.T
            row_bytes = max(1, part.shape[-1] * 4)
            step = max(1, _WINDOW_BYTES // row_bytes)
            if len(part.shape) == 1:
                target.copy_(self._rows(part, 0, 1)[0])
                continue
            for first in range(0, part.rows, step):
                last = min(first + step, part.rows)
                place = target[first:last]
                if getattr(place, "grouping", None) == GROUPS.get(part.tensor.kind, ()):
                    place.put_codes(*self._codes(part, first, last))
                else:
                    place.copy_(self._rows(part, first, last))

    def _find(self, name: str) -> Part | Joined:
        if name not in self._parts:
            raise WeightsError(f"{self.directory}: the file holds no tensor for {name!r:.80}")
        return self._parts[name]

    def _whole(self, part: Part | Joined) -> Tensor:
        """All numbers, under the new name."""
        if isinstance(part, Joined):
            return torch.cat([self._whole(one) for one in part.parts])
        numbers = self._rows(part, 0, part.rows).view(part.shape)
        return numbers.T if part.transposed else numbers

    def _blocks(self, part: Part, first: int, last: int) -> np.ndarray:
        """Rows as they lie in the file, [last - first, bytes] uint8."""
        tensor = part.tensor
        data = self._data[tensor.path][tensor.start : tensor.start + tensor.nbytes]
        rows = data.reshape(prod(tensor.shape[:-1]), -1)
        if part.matrix is not None:
            rows = rows[part.matrix * part.rows : (part.matrix + 1) * part.rows]
        is_vector = len(part.shape) == 1
        return rows[first:last] if part.order is None or is_vector else rows[part.order[first:last]]

    def _rows(self, part: Part, first: int, last: int) -> Tensor:
        """Rows as numbers, [last - first, columns]."""
        raw, kind = np.ascontiguousarray(self._blocks(part, first, last)), part.tensor.kind
        if kind in _NUMPY:
            numbers = torch.from_numpy(raw.view(_NUMPY[kind]).copy()).view(_FLOATS[kind])
        else:
            try:
                with np.errstate(all="ignore"):  # damaged scales: what comes of them is not finite, and shows
                    numbers = torch.from_numpy(quants.dequantize(raw, kind))
            except NotImplementedError:
                raise WeightsError(f"{self.directory}: tensors of type {kind.name} cannot be decoded") from None
        if part.order is not None and len(part.shape) == 1:
            numbers = numbers[:, torch.from_numpy(part.order)]
        return numbers + part.add if part.add else numbers

    def _codes(self, part: Part, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows of Q8_0 or Q4_0 as codes [n, columns] int8 and scales [n, groups] float16."""
        nbytes = GGML_QUANT_SIZES[part.tensor.kind][1]
        blocks = np.ascontiguousarray(self._blocks(part, first, last)).reshape(last - first, -1, nbytes)
        scales = torch.from_numpy(blocks[:, :, :2].copy().view(np.float16)[:, :, 0])
        if part.tensor.kind is Kind.Q8_0:
            codes = torch.from_numpy(blocks[:, :, 2:].copy()).view(torch.int8)
        else:  # the first half of a block in the low halves of its bytes, the second in the high ones
            both = torch.from_numpy(blocks[:, :, 2:].copy())
            codes = torch.cat((both & 15, both >> 4), dim=2).to(torch.int8) - 8
        return codes.reshape(last - first, -1), scales


def _pieces(part: Part | Joined) -> tuple[Part, ...]:
    return part.parts if isinstance(part, Joined) else (part,)
