"""Which implementation of the operators runs. A `Backend` is passed to whoever needs it."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from kvist.base.errors import BackendError
from kvist.ops import packing, reference, schema
from kvist.ops import reference_made as _made  # noqa: F401
from kvist.ops import reference_packed as _packed  # noqa: F401


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators, as callables; `kvist.ops.schema` says what each does."""

    name: str
    instruction_set: str
    write: Callable[..., None]
    attend: Callable[..., torch.Tensor]
    attend_own: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    seal: Callable[..., None]
    attend_coded: Callable[..., torch.Tensor]
    attend_made: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    silu_mul: Callable[..., torch.Tensor]
    gelu: Callable[..., torch.Tensor]
    packed_linear: Callable[..., torch.Tensor]
    packed_float: Callable[..., torch.Tensor]
    packed_rows: Callable[..., torch.Tensor]
    packed_project: Callable[..., torch.Tensor]
    packed_ending: Callable[..., torch.Tensor]
    packed_layers: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class _Wanted:
    """What a backend is asked to run."""

    device: str
    dtype: torch.dtype
    head_dim: int
    block_size: int


@dataclass(frozen=True)
class _Candidate:
    name: str
    namespace: str
    supports: Callable[[_Wanted], str | None]  # why it cannot run, or None
    unasked: str | None = None  # why it is passed over unless it is forced, or None


def select(device: str, dtype: torch.dtype, head_dim: int, block_size: int, force: str | None = None) -> Backend:
    """The first backend that runs planes of this kind on this device, or the one that `force` names.

    Without a compiler the reference runs, and one line on stderr says so. Raises `BackendError` when a forced backend
    cannot run, or none can.
    """
    wanted = _Wanted(device, dtype, head_dim, block_size)
    if force is not None:
        for candidate in _CANDIDATES:
            if candidate.name == force:
                return _forced(candidate, wanted)
        names = ", ".join(candidate.name for candidate in _CANDIDATES)
        raise BackendError(f"there is no backend {force!r}; choose one of {names}")
    refusals: list[str] = []
    for candidate in _CANDIDATES:
        reason = candidate.unasked or candidate.supports(wanted)
        if reason is None:
            if candidate.namespace == schema.REFERENCE and device == "cpu":
                _say_once(f"kvist: the slow reference operators run: {refusals[0]}")
            return _backend(candidate)
        refusals.append(reason)
    raise BackendError(f"no backend can run: {refusals[-1]}")


def explain(device: str, dtype: torch.dtype, head_dim: int, block_size: int) -> list[tuple[str, str | None]]:
    """Each backend in the order of preference, with the reason why `select` passes it over, or None."""
    wanted = _Wanted(device, dtype, head_dim, block_size)
    return [(candidate.name, candidate.unasked or candidate.supports(wanted)) for candidate in _CANDIDATES]


def _forced(candidate: _Candidate, wanted: _Wanted) -> Backend:
    if reason := candidate.supports(wanted):
        raise BackendError(f"the {candidate.name} backend cannot run: {reason}")
    return _backend(candidate)


def _backend(candidate: _Candidate) -> Backend:
    operators = getattr(torch.ops, candidate.namespace)
    return Backend(
        candidate.name,
        operators.instruction_set.default(),
        operators.write.default,
        operators.attend.default,
        operators.attend_own.default,
        operators.seal.default,
        operators.attend_coded.default,
        operators.attend_made.default,
        operators.silu_mul.default,
        operators.gelu.default,
        operators.packed_linear.default,
        operators.packed_float.default,
        operators.packed_rows.default,
        operators.packed_project.default,
        operators.packed_ending.default,
        operators.packed_layers.default,
    )


def _planes_exist(wanted: _Wanted) -> str | None:
    return packing.unsupported(wanted.dtype, wanted.head_dim, wanted.block_size)


def _cpu(wanted: _Wanted) -> str | None:
    return _kernels(wanted, schema.CPU, "NATIVE")


def _portable(wanted: _Wanted) -> str | None:
    return _kernels(wanted, schema.PORTABLE, "PORTABLE")


def _avx2(wanted: _Wanted) -> str | None:
    return _kernels(wanted, schema.AVX2, "AVX2")


def _kernels(wanted: _Wanted, namespace: str, variant: str) -> str | None:
    if reason := _planes_exist(wanted):
        return reason
    if torch.device(wanted.device).type != "cpu":
        return f"the C++ kernels run on the CPU, not on {wanted.device}"
    if os.name != "posix":
        return "the C++ kernels are built on Linux and macOS only"
    from kvist.ops.build import Variant, load_kernels  # locks files in the way of these systems

    return load_kernels(namespace, Variant[variant])


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


_UNASKED = "it runs only when forced: cpu is the same source, compiled for this processor"
_CANDIDATES = (
    _Candidate("cpu", schema.CPU, _cpu),
    _Candidate("portable", schema.PORTABLE, _portable, _UNASKED),
    _Candidate("avx2", schema.AVX2, _avx2, _UNASKED),
    _Candidate("reference", reference.NAMESPACE, _planes_exist),
)
