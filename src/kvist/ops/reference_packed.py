"""The operators over packed weights in plain PyTorch; see `kvist.ops.schema`.

Sums of whole numbers are taken in float64, where they are exact; a row's own steps follow in one order, row by row.
"""

from typing import Any

import torch
from torch import Tensor

from kvist.ops import reference
from kvist.ops.attention import sum_by_halves
from kvist.ops.packed import PackedForm, get_codes, get_rows
from kvist.ops.schema import LIBRARIES, REFERENCE


def packed_linear(
    x: Tensor, norm: Tensor | None, eps: float, data: Tensor, form: list[int], bias: Tensor | None
) -> Tensor:
    """norm(x) times a packed weight, plus `bias`. Raises `ValueError`."""
    shape = _check(data, form)
    if shape.paired or x.dim() != 2 or x.shape[1] != shape.columns or x.dtype is not torch.float32:
        raise ValueError(f"packed_linear takes x [T, {shape.columns}] float32 and a weight that is not paired")
    out = _multiply(x if norm is None else _rms_norm(x, norm, eps), data, shape)
    return out if bias is None else out + bias


def packed_float(x: Tensor, data: Tensor, form: list[int], bias: Tensor | None) -> Tensor:
    """x times a packed weight, row after row, plus `bias`. Raises `ValueError`."""
    shape = _check(data, form)
    if shape.paired or x.dim() != 2 or x.shape[1] != shape.columns or x.dtype is not torch.float32:
        raise ValueError(f"packed_float takes x [T, {shape.columns}] float32 and a weight that is not paired")
    weight = get_rows(data, shape)
    rows = [sum_by_halves(weight * row)[:, 0] for row in x]
    out = torch.stack(rows) if rows else x.new_empty(0, shape.rows)
    return out if bias is None else out + bias


def packed_rows(data: Tensor, form: list[int], ids: Tensor) -> Tensor:
    """Rows of a packed weight. Raises `ValueError` or `IndexError`."""
    shape = _check(data, form)
    if shape.paired or ids.dim() != 1 or ids.dtype is not torch.int64:
        raise ValueError("packed_rows takes ids [T] int64 and a weight that is not paired")
    if bool(((ids < 0) | (ids >= shape.rows)).any()):
        raise IndexError(f"ids must be in [0, {shape.rows})")
    found = [get_rows(data, shape, index, 1) for index in ids.tolist()]
    return torch.cat(found) if found else torch.empty(0, shape.columns)


def packed_project(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    data: Tensor,
    form: list[int],
    bias: Tensor | None,
    heads: list[int],
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """What stands before attention. Raises `ValueError`."""
    query_heads, key_heads, dim = heads
    out = packed_linear(x, norm, eps, data, form, bias).unflatten(1, (-1, dim)).clone()
    q, k = out[:, :query_heads], out[:, query_heads : query_heads + key_heads]
    for part, weight in ((q, query_norm), (k, key_norm)):
        if weight is not None:
            part.copy_(_rms_norm(part, weight, eps))
        if cos is not None and sin is not None:
            rotated = cos.shape[-1]
            first, second = part[..., :rotated].chunk(2, dim=-1)
            turned = part[..., :rotated] * cos + torch.cat((-second, first), dim=-1) * sin
            part[..., :rotated] = turned
    return out.flatten(1)


def packed_ending(
    x: Tensor,
    attended: Tensor,
    out_data: Tensor,
    out_form: list[int],
    out_bias: Tensor | None,
    out_norm: Tensor | None,
    norm: Tensor,
    eps: float,
    gate_up_data: Tensor,
    gate_up_form: list[int],
    down_data: Tensor,
    down_form: list[int],
    down_norm: Tensor | None,
    gelu: bool,
) -> Tensor:
    """What stands behind attention. Raises `ValueError`."""
    added = packed_linear(attended, None, eps, out_data, out_form, out_bias)
    hidden = x + (added if out_norm is None else _rms_norm(added, out_norm, eps))
    shape = _check(gate_up_data, gate_up_form)
    if not shape.paired:
        raise ValueError("the weight of gates and ups must be paired")
    gate, up = _multiply(_rms_norm(hidden, norm, eps), gate_up_data, shape).chunk(2, dim=1)
    opened = reference.gelu(gate.contiguous(), True) if gelu else gate / (1 + torch.exp(-gate))
    added = packed_linear(opened * up, None, eps, down_data, down_form, None)
    return hidden + (added if down_norm is None else _rms_norm(added, down_norm, eps))


def packed_layers(
    x: Tensor,
    weights: list[Tensor],
    forms: list[int],
    extras: list[Tensor | None],
    heads: list[int],
    eps: float,
    scale: float,
    gelu: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    step: list[Tensor],
    open: list[Tensor],
    key_planes: list[Tensor],
    key_coding: list[int],
    key_frames: list[Tensor],
    value_planes: list[Tensor],
    value_coding: list[int],
    value_frames: list[Tensor],
    block_size: int,
    window: int = 0,
) -> Tensor:
    """Whole layers. Raises `ValueError` or `IndexError`."""
    layers = len(weights) // 4
    x = x.clone()
    for layer in range(layers):

        def of(all_layers: list[Any], layer: int = layer) -> list[Any]:
            count = len(all_layers) // layers
            return all_layers[layer * count : (layer + 1) * count]

        qkv, out, gate_up, down = ((data, forms[5 * i : 5 * i + 5]) for i, data in enumerate(of(weights)))
        norm, qkv_bias, query_norm, key_norm, out_bias, out_norm, mlp_norm, down_norm = of(extras)
        projected = packed_project(x, norm, eps, *qkv, qkv_bias, heads, query_norm, key_norm, cos, sin)
        q, k, v = projected.unflatten(1, (-1, heads[2])).split((heads[0], heads[1], heads[1]), dim=1)
        keys = of(key_planes), key_coding, of(key_frames)
        values = of(value_planes), value_coding, of(value_frames)
        opened = [] if not open else [*open[:2], *(open[i][layer] for i in (2, 3)), *open[4:6], open[6][layer], open[7]]
        attended = _attend_layer(q, k, v, step, opened, keys, values, block_size, scale, window)
        if mlp_norm is None:
            raise ValueError("a layer's MLP has a norm")
        mlp = mlp_norm, eps, *gate_up, *down, down_norm, gelu
        x = packed_ending(x, attended.flatten(1), *out, out_bias, out_norm, *mlp)
    return x


def _attend_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: list[Tensor],
    open: list[Tensor],
    keys: tuple[list[Tensor], list[int], list[Tensor]],
    values: tuple[list[Tensor], list[int], list[Tensor]],
    block_size: int,
    scale: float,
    window: int,
) -> Tensor:
    slots, *where = step
    if not open:
        reference.write(keys[0][0], values[0][0], k, v, slots)
        return reference.attend(q, keys[0][0], values[0][0], *where, scale, window)
    open_keys, open_values, open_slots, tables, starts, lengths, sources, targets = open
    reference.write(open_keys, open_values, k, v, open_slots)
    reference.seal(open_keys, *keys, True, sources, targets)
    reference.seal(open_values, *values, False, sources, targets)
    own = reference.attend_own(q, open_keys, open_values, tables, starts, lengths, scale, window)
    return reference.attend_coded(q, *own, *keys, *values, *where, block_size, scale, window)


def code_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [T, K] float32 → whole numbers [T, groups, group] float64 and scales [T, groups] float32."""
    whole = torch.zeros(len(x), -(-x.shape[1] // group) * group)
    whole[:, : x.shape[1]] = x
    groups = whole.unflatten(1, (-1, group))
    peak = groups.nan_to_num(0, 0, 0).abs().amax(2)
    inverse = torch.where(peak > 0, 127 / peak, 0.0)
    codes = (groups * inverse[:, :, None]).nan_to_num(0, 0, 0).round().double()
    poison = torch.where(groups.isfinite().all(2), 0.0, torch.nan)
    return codes, peak / 127 + poison


def _multiply(x: Tensor, data: Tensor, form: PackedForm) -> Tensor:
    codes, scales = code_rows(x, form.group)
    weight, weight_scales = get_codes(data, form)
    weight = weight.double().unflatten(1, (form.groups, -1))
    total = torch.zeros(len(x), form.rows)
    for group in range(form.groups):
        exact = (codes[:, group] @ weight[:, group].T).float()
        total += exact * scales[:, group, None] * weight_scales[:, group].float()
    return total


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean = sum_by_halves(x * x) / x.shape[-1]
    return x * (1 / torch.sqrt(mean + eps)) * weight


def _check(data: Tensor, form: list[int]) -> PackedForm:
    shape = PackedForm.of(form)
    if data.dtype is not torch.uint8 or tuple(data.shape) != shape.shape:
        raise ValueError(f"a packed weight {shape} is uint8 {list(shape.shape)}, got {data.dtype} {list(data.shape)}")
    return shape


LIBRARIES[REFERENCE].impl("packed_linear", packed_linear, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("packed_float", packed_float, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("packed_rows", packed_rows, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("packed_project", packed_project, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("packed_ending", packed_ending, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("packed_layers", packed_layers, "CompositeExplicitAutograd")
