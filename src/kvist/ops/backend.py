"""Which implementation of the operators runs. A `Backend` is passed to who needs it; nothing here is remembered."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvist.base.errors import BackendError
from kvist.ops import packing, reference, schema


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators, as callables; `kvist.ops.schema` says what each does."""

    name: str
    write: Callable[..., None]
    attend: Callable[..., torch.Tensor]
    silu_mul: Callable[..., torch.Tensor]
    gelu: Callable[..., torch.Tensor]


def select(
    device: str, dtype: torch.dtype, head_dim: int, block_size: int, force: str | None = None
) -> Backend:
    """The first backend that supports planes of this kind on this device."""
    if reason := packing.unsupported(dtype, head_dim, block_size):
        raise BackendError(f"the reference backend cannot run: {reason}")
    return _backend("reference", schema.REFERENCE)


def _backend(name: str, namespace: str) -> Backend:
    operators = getattr(torch.ops, namespace)
    return Backend(
        name,
        operators.write.default,
        operators.attend.default,
        operators.silu_mul.default,
        operators.gelu.default,
    )
