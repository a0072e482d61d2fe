"""What every decoder offers to the runtime, the loader and the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from kvist.cache.view import LayerView
from kvist.models.config import ModelConfig
from kvist.models.experts import Experts
from kvist.models.linear import Embedding, Grouping, Linear, PackedOperators, weights_of


class Activations(Protocol):
    """The element-wise operators of a backend whose bits do not depend on a row's place."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2 I]` → silu(first half) * second half, `[T, I]`."""
        ...

    def gelu(self, x: Tensor, tanh: bool) -> Tensor:
        """Gaussian error linear unit of `x`, exact or by its tanh approximation."""
        ...


@dataclass(frozen=True)
class Slot:
    """Where one tensor of a checkpoint, or a part of one, goes: rows `start .. start + rows` of a parameter.

    `transposed`: the checkpoint stores `[in, out]` where the parameter is `[out, in]`. `part`: of the rows of a tensor
    of shape `whole`, those from the one to the other; or which of its matrices. `shape` is then that of the part.
    """

    name: str
    parameter: str
    start: int
    shape: tuple[int, ...]
    transposed: bool = False
    part: tuple[int, int] | int | None = None
    whole: tuple[int, ...] = ()

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor."""
        return self.whole or self.shape

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the checkpoint's tensor that goes there."""
        if self.part is None:
            return tensor
        return tensor[self.part] if isinstance(self.part, int) else tensor[self.part[0] : self.part[1]]


def linear_slots(name: str, parameter: str, start: int, shape: tuple[int, int], bias: bool) -> list[Slot]:
    """Of a product: its weight and, where it has one, its bias."""
    weight = Slot(f"{name}.weight", f"{parameter}.weight", start, shape)
    return [weight, Slot(f"{name}.bias", f"{parameter}.bias", start, shape[:1])] if bias else [weight]


Product = tuple[Tensor, Tensor | None]  # a weight [out, in] and its bias [out]


class RowAdapters(Protocol):
    """What requests may have added to the products of their rows; see `kvist.models.lora`."""

    ids: list[str]
    fit: Callable[[int], int]

    def assign(self, names: Sequence[str]) -> None: ...

    def products(self) -> list[Product]: ...


class Decoder(nn.Module, ABC):
    """Token ids in, logits out. A row is one token; rows of many sequences stand in one step."""

    def __init__(self, config: ModelConfig, blocks: Iterable[nn.Module], norm: nn.Module) -> None:
        """`blocks` and the last `norm` are the family's; the embedding and the head are everybody's."""
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.packing_loss = 0.0  # what packing changed of its matrices, relative, in squares
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, config.head_bias)

    @abstractmethod
    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        """`tokens`, `positions` `[T]` int64 → the last hidden states `[T, hidden_size]`, normed."""

    @abstractmethod
    def slots(self) -> list[Slot]:
        """Every tensor of a Hugging Face checkpoint of this family, and where it goes. Covers each parameter."""

    adapters: RowAdapters | None = None  # attached to it
    # Beginnings of tensors' names: those that some checkpoints have instead of the first of a pair; and those of
    # tensors that are no part of the decoder.
    renamed: Sequence[tuple[str, str]] = ()
    ignored: Sequence[str] = ()

    def allocated(self) -> None:
        """Called once its parameters have their memory."""

    def logits(self, hidden: Tensor) -> Tensor:
        """`[R, hidden_size]` → `[R, vocab_size]` float32."""
        return (self.embed.unembed(hidden) if self.head is None else self.head(hidden)).float()

    def head_weight(self) -> Tensor | None:
        """`[vocab_size, hidden_size]`: the embedding itself where the two are tied; None where it is packed."""
        return self.embed.weight if self.head is None else self.head.weight

    def linears(self) -> list[Product]:
        """Every matrix product of a step but the head's, packed ones left out: what the width probe tests."""
        linears = [part for part in self.modules() if isinstance(part, Linear) and part is not self.head]
        own = [(part.weight, part.bias) for part in linears if part.weight is not None]
        return own if self.adapters is None else own + self.adapters.products()

    def head_products(self) -> list[Product]:
        """The head's, unless it is packed."""
        weight = self.head_weight()
        return [] if weight is None else [(weight, None if self.head is None else self.head.bias)]

    def pad_rows(self, fit: Callable[[int], int]) -> None:
        """From now on products of some of a step's rows are of `fit(rows)` rows: widths that agree with each other."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.fit = fit
        if self.adapters is not None:
            self.adapters.fit = fit

    def pack(self, grouping: Grouping, operators: PackedOperators) -> None:
        """Have all matrices packed; `grouping` says how. What else there is has to be in float32."""
        for name, weight in weights_of(self).items():
            weight.pack(*grouping(f"{name}.weight", weight.columns), operators)

    def keep_rows(self) -> None:
        """Before `pack`: have packed products take rows rounded to bfloat16 instead of whole numbers of 8 bits."""
        self.unpair()
        for weight in weights_of(self).values():
            weight.whole_rows = False

    def unpair(self) -> None:
        """Before `pack`: leave every product on its own, so that something can be added to its outputs."""
        for weight in weights_of(self).values():
            weight.paired = False

    def zero_packed(self) -> None:
        """Have all packed weights hold zeros, as when they are allocated."""
        for weight in weights_of(self).values():
            if weight.codes is not None:
                weight.codes.zero_()

    @property
    def is_packed(self) -> bool:
        return self.embed.is_packed

    @property
    def weights(self) -> str:
        """The type of its matrices, as people write it: "bfloat16", or "int8"."""
        forms = [weight.form for weight in weights_of(self).values() if weight.form is not None]
        if forms:
            return "+".join(f"int{bits}" for bits in sorted({form.bits for form in forms}, reverse=True))
        assert self.embed.weight is not None
        return str(self.embed.weight.dtype).removeprefix("torch.")
