"""A decoder that is transformers' own code: its attention is ours, through the interface that transformers has for it,
and so are its element-wise functions, whose bits must not depend on a row's place."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvist.base.errors import ConfigError
from kvist.cache.spec import window_of
from kvist.cache.view import LayerView
from kvist.hf.config import HfConfig
from kvist.models.decoder import Activations, Decoder, Slot
from kvist.models.linear import Linear, weights_of
from kvist.models.plain import plain_views

_NAME = "kvist"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    kvist_step: "_Step | None" = None,
    **more: Any,  # what interfaces of other attentions take; what would change the mathematics is looked at
) -> tuple[Tensor, None]:
    """Called by transformers' attention modules: `query`, `key`, `value` [1, heads, T, D] → [1, T, heads, D]."""
    if kvist_step is None:
        raise ConfigError("this model does not pass on to its attention what it is called with, so no cache reaches it")
    index = kvist_step.check(module, attention_mask, more)
    view = kvist_step.layers[index]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    view.write(k, v)
    return view.attend(q, q.shape[-1] ** -0.5 if scaling is None else scaling)[None], None


class _Step:
    """What one call of the model hands to its attention: a view of each layer's cache."""

    def __init__(self, config: HfConfig, layers: Sequence[LayerView]) -> None:
        self.layers = layers
        self._specs = config.layer_specs()
        self.seen = 0

    def check(self, module: nn.Module, mask: Tensor | None, more: dict[str, Any]) -> int:
        """The layer that is asked for. Raises `ConfigError` for an attention that is not the cache's."""
        index = getattr(module, "layer_idx", None)
        if index != self.seen or index >= len(self._specs):
            raise ConfigError("this model does not run its layers in their order, each once")
        self.seen += 1
        spec = self._specs[index]
        window, cap = more.get("sliding_window") or 0, more.get("softcap") or 0.0
        wanted = window_of(spec.retention)
        if wanted and window != wanted:
            raise ConfigError(f"layer {index} has a window of {window} tokens where its config says {wanted}")
        if mask is not None or cap != spec.softcap or more.get("s_aux") is not None or more.get("dropout"):
            raise ConfigError(f"layer {index} has an attention that is not supported (a mask, a cap, or sinks)")
        if getattr(module, "is_causal", True) is False:
            raise ConfigError(f"layer {index} looks ahead, which a cache cannot")
        return int(index)


AttentionInterface.register(_NAME, _attend)


# Where element-wise functions come from.
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


class HfLinear(Linear):
    """As `Linear`, for rows of any leading shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2).contiguous()).unflatten(0, x.shape[:-1])


class _Function(nn.Module):
    """An element-wise function whose bits do not depend on where a number stands."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x.contiguous())


class _Given(nn.Module):
    """Stands where the model's body was, and gives what it is given: the head of the model over hidden states."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


class HfDecoder(Decoder):
    """See `Decoder`. `body`: the model without its head; `whole`: the head around hidden states, with what transformers
    does to logits."""

    config: HfConfig
    head = None  # it is `whole`'s

    def __init__(self, config: HfConfig, activations: Activations) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.packing_loss = 0.0
        with torch.device("cpu"), no_init_weights():  # parameters are memory that nobody has touched yet
            raw = AutoConfig.for_model(**json.loads(config.raw))
            raw._attn_implementation = _NAME
            try:
                whole = AutoModelForCausalLM.from_config(raw, attn_implementation=_NAME, dtype=torch.float32).eval()
            except (ValueError, KeyError):
                raise ConfigError(f"a model of type {config.family!r} does not run over a cache of ours") from None
        prefix = whole.base_model_prefix
        self._prefix = f"{prefix}."
        body = getattr(whole, prefix, None)
        head = whole.get_output_embeddings()
        if not isinstance(body, nn.Module) or not isinstance(head, nn.Linear):
            raise ConfigError(f"a model of type {config.family!r} is not built as a body with a head")
        self._head = next(name for name, part in whole.named_modules() if part is head)
        setattr(whole, prefix, _Given())
        self.body, self.whole = body, whole
        self._tied = config.tied
        _replace_linears(body)
        if not self._tied:
            _replace_linears(whole)
        _replace_functions(body, activations)
        self.requires_grad_(False)
        self._slots = self._named()

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        step = _Step(self.config, layers)
        found = self.body(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, kvist_step=step, return_dict=True
        )
        if step.seen != self.config.layers:
            raise ConfigError(f"{step.seen} of {self.config.layers} layers of this model have asked for their cache")
        hidden: Tensor = found.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.whole(inputs_embeds=hidden[None], use_cache=False).logits[0].float()
        return found

    def allocated(self) -> None:
        if self._tied:
            self._head_part.weight = self.body.get_input_embeddings().weight

    @property
    def _head_part(self) -> Any:
        return self.whole.get_submodule(self._head)

    def head_weight(self) -> Tensor | None:
        weight: Tensor | None = self._head_part.weight
        return weight

    def linears(self) -> list[tuple[Tensor, Tensor | None]]:
        parts = [part for part in self.body.modules() if isinstance(part, HfLinear)]
        own = [(part.weight, part.bias) for part in parts if part.weight is not None]
        return own if self.adapters is None else own + self.adapters.products()

    def head_products(self) -> list[tuple[Tensor, Tensor | None]]:
        head = self._head_part
        return [] if head.weight is None else [(head.weight, head.bias)]

    @property
    def is_packed(self) -> bool:
        return any(weight.is_packed for weight in weights_of(self).values())

    @property
    def weights(self) -> str:
        forms = {weight.form.bits for weight in weights_of(self).values() if weight.form is not None}
        if forms:
            return "+".join(f"int{bits}" for bits in sorted(forms, reverse=True))
        return str(next(self.parameters()).dtype).removeprefix("torch.")

    def slots(self) -> list[Slot]:
        return self._slots

    def _named(self) -> list[Slot]:
        """Of all parameters as they are at first, under the names that transformers' modules have."""
        slots = []
        for name, parameter in self.named_parameters():
            where, _, rest = name.partition(".")
            if self._tied and name == f"whole.{self._head}.weight":
                continue
            slots.append(Slot(f"{self._prefix if where == 'body' else ''}{rest}", name, 0, tuple(parameter.shape)))
        return slots

    def check(self) -> None:
        """Run two tokens without a cache. Raises `ConfigError` where the model cannot be run over one."""
        with torch.inference_mode():
            try:
                self.logits(self(torch.tensor([0, 1]), torch.tensor([0, 1]), plain_views(self.config)))
            except (TypeError, AttributeError, RuntimeError, IndexError, ValueError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(
                    f"a model of type {self.config.family!r} does not run over a cache: {reason}"
                ) from None


def _replace_linears(module: nn.Module) -> None:
    """Products that can be packed, and whose widths are probed."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            rows, columns = child.weight.shape
            ours = HfLinear(columns, rows, child.bias is not None)
            setattr(module, name, ours)
        else:
            _replace_linears(child)


def _replace_functions(module: nn.Module, activations: Activations) -> None:
    """The element-wise functions of MLPs. Raises `ConfigError` for one that is not known."""
    known = {
        "SiLUActivation": _silu,
        "SiLU": _silu,
        "GELUActivation": lambda x: activations.gelu(x, False),
        "GELU": lambda x: activations.gelu(x, False),
        "GELUTanh": lambda x: activations.gelu(x, True),
        "PytorchGELUTanh": lambda x: activations.gelu(x, True),
        "NewGELUActivation": lambda x: activations.gelu(x, True),
        "FastGELUActivation": lambda x: activations.gelu(x, True),
    }
    for name, child in list(module.named_children()):
        kind = type(child).__name__
        if kind in known:
            setattr(module, name, _Function(known[kind]))
        elif type(child).__module__ in _ACTIVATIONS and not isinstance(child, nn.ReLU):
            raise ConfigError(f"the activation {kind} is not supported")
        else:
            _replace_functions(child, activations)


def _silu(x: Tensor) -> Tensor:
    """In float32, rounded once; `F.silu` has other bits in the tail of its vector loop."""
    wide = x.float()
    return (wide / (1 + torch.exp(-wide))).to(x.dtype)
