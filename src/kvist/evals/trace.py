"""Each tensor of one prefill and one decode step, by name, shape and meaning, and how the cache grows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from kvist.base.errors import RequestError
from kvist.base.events import CacheEvent
from kvist.cache.step import Tie
from kvist.cache.streams import StreamView
from kvist.cache.view import LayerView, OpenView, PagedView
from kvist.models.linear import weights_of
from kvist.ops import packed
from kvist.runtime.batch import Work
from kvist.service.loaded import Loaded

# By the end of a module's name within the decoder; only the first block is walked, the others repeat it.
_MODULES = {
    "embed": "one vector per token, looked up",
    "positions": "one learned vector per position, added to the embedding",
    "blocks.0.attention_norm": "the residual stream, scaled for attention",
    "blocks.0.attention.qkv": "queries, keys and values of every head, side by side, from one product",
    "blocks.0.attention.q_norm": "queries, normed per head",
    "blocks.0.attention.k_norm": "keys, normed per head",
    "blocks.0.attention.out": "heads mixed back into the residual stream",
    "blocks.0.mlp_norm": "the residual stream, scaled for the MLP",
    "blocks.0.gate_up": "the MLP's gate and its input, side by side",
    "blocks.0.up": "the MLP's inner vector",
    "blocks.0.down": "the MLP's answer, added to the residual stream",
    "norm": "after the last block, scaled for the head",
}


@dataclass(frozen=True)
class TensorRow:
    """One tensor as the step saw it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True)
class StepTrace:
    """One step: its tensors in order, the cache's events, and what the sequence holds afterwards."""

    title: str
    tensors: list[TensorRow]
    events: list[CacheEvent]
    tokens: int
    blocks: int
    bytes: int


class _RecordingView:
    """Passes everything on to the first layer's view and notes what goes through."""

    def __init__(self, view: LayerView, rows: list[TensorRow]) -> None:
        self._view = view
        self._rows = rows

    def write(self, k: Tensor | None, v: Tensor) -> None:
        if k is not None:
            self._rows.append(_row("k", k, "keys, positions rotated in: one row per token goes into the cache"))
        self._rows.append(_row("v", v, "values: likewise"))
        self._view.write(k, v)

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        self._rows.append(_row("q", q, "queries: each sees the cache up to its own token"))
        out = self._view.attend(q, scale, tie)
        self._rows.append(_row("attention", out, "values weighted by softmax(q · k * scale), head by head"))
        return out


def trace(loaded: Loaded, prompt: Sequence[int]) -> list[StepTrace]:
    """Prefill `prompt` (at most one step's worth of its last tokens is shown) and decode one token greedily."""
    events: list[CacheEvent] = []
    engine = loaded.engine(loaded.room(len(prompt) + 1), listener=events.append)
    runner = engine.runner
    lease = runner.manager.open()
    most = runner.widths.most
    for start in range(0, len(prompt) - most, most):
        runner.run([Work(lease, prompt[start : start + most], 0)])
    tokens = list(prompt[lease.length :])
    steps = []
    for title in ("prefill", "decode"):
        rows: list[TensorRow] = []
        events.clear()
        with _recording(loaded.model, rows):
            logits = runner.run([Work(lease, tokens)])[0]
        rows.append(_row("logits", logits, "a score per vocabulary entry, only for the row that is continued"))
        blocks = len(lease.table)
        size = blocks * loaded.layout.block_bytes
        name = f"{title}: {len(tokens)} token{'s' if len(tokens) > 1 else ''}"
        steps.append(StepTrace(name, rows, list(events), lease.length, blocks, size))
        tokens = [int(logits[0].argmax())]
    runner.manager.release(lease)
    return steps


_VIEWS = (PagedView, OpenView, StreamView)


def _recording(model: nn.Module, rows: list[TensorRow]) -> ExitStack:
    """Hooks that note inputs and outputs, removed when the stack closes."""

    def before_model(
        _: nn.Module, args: tuple[Tensor, Tensor, Sequence[LayerView]]
    ) -> tuple[Tensor, Tensor, list[LayerView]]:
        tokens, positions, layers = args
        view = layers[0]
        assert isinstance(view, _VIEWS)
        step, group = view.step, view.group
        rows.append(_row("tokens", tokens, "token ids, padded to a width that keeps every bit"))
        rows.append(_row("positions", positions, "where each token stands in its sequence"))
        rows.append(
            _row("slots", step.slots[group], "block * block_size + offset of each row; -1: padding, not written")
        )
        rows.append(_row("tables", step.tables[group], "the sequence's block ids, in order of position"))
        rows.append(_row("starts", step.starts, "the first row of each sequence, and the end"))
        rows.append(_row("lengths", step.lengths, "tokens of each sequence in the cache, these included"))
        if isinstance(view, PagedView):
            rows.append(_row("keys plane", view.keys, "the first layer's keys, all blocks, as the kernel reads them"))
            rows.append(_row("values plane", view.values, "the first layer's values, all blocks"))
        else:
            planes = view.planes if isinstance(view, StreamView) else (*view.keys, *view.values)
            for described, plane in zip(view.layout.planes, planes, strict=True):
                rows.append(_row(f"plane {described.name}", plane, "of the first layer, all blocks"))
        return tokens, positions, list(layers)  # one by one, not all in one operator

    def before_block(_: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(_RecordingView(one, rows) if isinstance(one, _VIEWS) else one for one in args)

    stack = ExitStack()
    named = dict(model.named_modules())
    if "blocks.0" not in named:
        raise RequestError("kvist trace shows what our own families compute, and this model runs as transformers' code")
    stack.enter_context(_apart(named["blocks.0"]))
    handles = [
        model.register_forward_pre_hook(before_model),
        named["blocks.0"].register_forward_pre_hook(before_block),
    ]
    for name, meaning in _MODULES.items():
        if name in named:
            handles.append(named[name].register_forward_hook(_recorder(name, meaning, rows)))
    for handle in handles:
        stack.callback(handle.remove)
    return stack


@contextmanager
def _apart(block: nn.Module) -> Iterator[None]:
    """Within it gates and ups that are packed side by side lie as other packed matrices do, so that no fused operator
    takes the block: each product is a module's, where a hook sees it."""
    held = {weight: (weight.codes, weight.form) for weight in weights_of(block).values() if weight.is_paired}
    for weight, (codes, form) in held.items():
        assert codes is not None
        assert form is not None
        weight.form = replace(form, paired=False)
        weight.codes = packed.empty(weight.form)
        packed.put_codes(weight.codes, weight.form, 0, *packed.get_codes(codes, form))
    try:
        yield
    finally:
        for weight, (codes, form) in held.items():
            weight.codes, weight.form = codes, form


def _recorder(
    name: str, meaning: str, rows: list[TensorRow]
) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
    def after(_: nn.Module, __: tuple[object, ...], output: Tensor) -> None:
        rows.append(_row(name, output, meaning))

    return after


def _row(name: str, tensor: Tensor, meaning: str) -> TensorRow:
    return TensorRow(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), meaning)
