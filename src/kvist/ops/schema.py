"""The operators: one schema each, in one namespace per implementation, and what they give for shapes alone.

| operator | does |
|---|---|
| `write` | stores k and v [T, H, D] in the planes at `slots` [T] int64 = block * block_size + offset; -1 is padding |
| `attend` | causal attention of ragged batches of queries over paged keys and values |
| `attend_own` | `attend` with a float32 result, and what is needed to merge it with other keys |
| `attend_made` | attention whose keys are made of the values, dense or coded |
| `seal` | codes whole blocks of one stream |
| `attend_coded` | attention over the coded blocks before each query's own, merged with what `attend_own` gave |
| `silu_mul` | gate_up [..., 2I] → silu(gate) * up [..., I] |
| `gelu` | exact GELU, or its tanh form |
| `packed_linear` | x [T, K] float32, normed where there is a norm, times a packed weight |
| `packed_float` | x [T, K] float32 times a packed weight, its rows left as they are |
| `packed_rows` | rows of a packed weight [T, K] float32, by their numbers: an embedding |
| `packed_project` | what stands before attention: norm, q, k and v in one product, norms of heads, rotary positions |
| `packed_ending` | what stands behind it: product, residual, norm, gated MLP, residual |
| `packed_layers` | whole layers: these two, and the writing and the attention between them |

`attend(q, keys, values, tables, starts, lengths, scale, window, softcap)`: q [T, Hq, D] holds the queries of S
sequences one after another; sequence s owns rows starts[s] to starts[s+1] (starts [S+1] int32), which are its newest
tokens: it has lengths[s] tokens in the cache (lengths [S] int32), these included. tables [S, max_blocks] int32 names
its blocks in order. The query at absolute position p sees keys 0..p, of these the last `window` where that is not 0;
blocks that no query sees are not read, and their ids may be anything. Query head h uses KV head h // (Hq / H). Scores s
= scale * q.k become softcap * tanh(s / softcap) where `softcap` is not 0. Rows from starts[S] on are padding and come
out as zeros. Result [T, Hq, D] in q's dtype.

A row's bits depend on its own q, on the keys and values it sees, on scale, window and softcap: never on the other rows
or sequences of the call, on where its blocks lie or how large they are, nor on the number of threads. So decoding,
prefilling and any cut of a prompt into chunks agree to the bit. Every implementation gives this; different ones agree
only closely.

Coded streams (`kvist.ops.coding` says how vectors are coded). Where a cache is lossy, a query sees its own block (of
`block_size` tokens, at multiples of it) in full precision and every earlier block through the codec, so what it sees
depends on its position alone. Each block that a step touches is then a sequence of its own for `attend_own`, whose
planes are those of `attend`: it gives `own` [T, Hq, D] float32 and `lse` [T, Hq] float32, the binary logarithm of the
sum of exp(scale * q.k) over the keys that the row sees; padding rows have zeros and -inf.

`attend_coded(q, own, lse, key_planes, key_coding, key_frame, value_planes, value_coding, value_frame, tables, starts,
lengths, block_size, scale, window, softcap)`: q, tables, starts, lengths as in `attend`. The query at position p sees
the first p // block_size blocks of its sequence through their codes; the result [T, Hq, D] in q's dtype is attention
over these and its own block together. A stream's planes are [codes, scales] with `Coding.flat` and `Frame.tensors`
behind them, or, not coded, one plane as `attend` has it with two empty lists. Coded keys have lost their mean, so a
row's scores lack q.mean: its own keys are weighed as if they did, too. Where scores are capped the mean has to be zero.

`attend_made(q, own, behind_planes, behind_coding, behind_frame, value_planes, value_coding, value_frame, tie, tables,
starts, lengths, block_size, scale, window)`: the streams as `attend_coded` has them, coded or not; means are added
back. A token's key is its value [D] and, behind it, its vector of the stream `behind`, q being [T, Hq, D + that one's];
or, where `tie` is [weight [D], cos, sin [positions / 16, pairs, 16] float32, offsets [S] int32], its value times weight
with dimension i < pairs rotated with i + D / 2 by its position, which is its place in the sequence plus the sequence's
offset, a multiple of 16. `own`: nothing, and a query sees what it sees in `attend`; or what this operator gave for own
blocks, and it sees those and the first p // block_size blocks. The result [T, Hq, D] float32 and its lse [T, Hq] are of
all that the query sees.

`seal(open, planes, coding, frame, keys, sources, targets)`: codes block sources[i] of the plane `open` (as `write`
fills it) into block targets[i] of `planes` ([N] int64 each), as keys or as values; without a coding it is copied into
the plane, rounded to its type.

Packed weights (`kvist.ops.packed` says how a weight is packed) are a tensor of bytes and `PackedForm.flat`. Their rows
are float32; each is cut into the weight's groups of columns, and a group into whole numbers from -127 to 127 and a
scale. A group's sum is exact, whatever computes it; groups are added one after another in float32. So a row's bits
depend on the row and the weight. `packed_float` leaves its rows as they are: products and sums are in float32, column
after column within a group and group after group. Every tensor beside the packed ones is float32 and dense. `eps` is
that of all norms; a norm that is None is left out.

`packed_project(x, norm, eps, data, form, bias, heads, query_norm, key_norm, cos, sin)`: norm(x) times the weight, plus
bias, [T, rows]. `heads`: query heads, KV heads, head dim; the first so many heads of a row are q, then k, each normed
by its norm [D] and rotated by cos and sin [T, 1, R], dimension i with i + R / 2; what stands behind them (v) is left
alone.

`packed_ending(x, attended, out..., out_norm, norm, eps, gate_up..., down..., down_norm, gelu)`: h = x + out_norm(out *
attended + out_bias), then h + down_norm(down * (gate(g) * u)) where g, u = gate_up * norm(h), the weight being paired
and the gate SiLU, or GELU in its tanh form.

`packed_layers`: layer after layer `packed_project`, `write` (and `seal`), the attention and `packed_ending`, with the
same bits. `weights`: of each layer those of q, k and v; out; gates and ups; down. `forms`: of these four, the same in
every layer. `extras`: of each layer norm, bias of q, k and v, query norm, key norm, bias of out, its norm, norm of the
MLP, norm of what it adds. `step`: slots, tables, starts, lengths. `open`: nothing where the planes are written in
place; else the planes of open keys and of open values of all layers, and of the open blocks slots [L, T], tables
[L, N, 1], starts, lengths, sources [L, M], targets. Planes and frames: of each layer as the other operators have them.
"""

import torch
from torch import Tensor
from torch.library import Library

SCHEMAS = {
    "write": "(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor slots) -> ()",
    "attend": (
        "(Tensor q, Tensor keys, Tensor values, Tensor tables, Tensor starts, Tensor lengths, float scale, "
        "int window=0, float softcap=0.0) -> Tensor"
    ),
    "attend_own": (
        "(Tensor q, Tensor keys, Tensor values, Tensor tables, Tensor starts, Tensor lengths, float scale, "
        "int window=0, float softcap=0.0) -> (Tensor, Tensor)"
    ),
    "seal": (
        "(Tensor open, Tensor(a!)[] planes, int[] coding, Tensor[] frame, bool keys, Tensor sources, Tensor targets) "
        "-> ()"
    ),
    "attend_coded": (
        "(Tensor q, Tensor own, Tensor lse, Tensor[] key_planes, int[] key_coding, Tensor[] key_frame, "
        "Tensor[] value_planes, int[] value_coding, Tensor[] value_frame, Tensor tables, Tensor starts, "
        "Tensor lengths, int block_size, float scale, int window=0, float softcap=0.0) -> Tensor"
    ),
    "attend_made": (
        "(Tensor q, Tensor[] own, Tensor[] behind_planes, int[] behind_coding, Tensor[] behind_frame, "
        "Tensor[] value_planes, int[] value_coding, Tensor[] value_frame, Tensor[] tie, Tensor tables, Tensor starts, "
        "Tensor lengths, int block_size, float scale, int window=0) -> (Tensor, Tensor)"
    ),
    "silu_mul": "(Tensor gate_up) -> Tensor",
    "gelu": "(Tensor x, bool tanh) -> Tensor",
    "packed_linear": "(Tensor x, Tensor? norm, float eps, Tensor data, int[] form, Tensor? bias) -> Tensor",
    "packed_float": "(Tensor x, Tensor data, int[] form, Tensor? bias) -> Tensor",
    "packed_rows": "(Tensor data, int[] form, Tensor ids) -> Tensor",
    "packed_project": (
        "(Tensor x, Tensor? norm, float eps, Tensor data, int[] form, Tensor? bias, int[] heads, Tensor? query_norm, "
        "Tensor? key_norm, Tensor? cos, Tensor? sin) -> Tensor"
    ),
    "packed_ending": (
        "(Tensor x, Tensor attended, Tensor out_data, int[] out_form, Tensor? out_bias, Tensor? out_norm, Tensor norm, "
        "float eps, Tensor gate_up_data, int[] gate_up_form, Tensor down_data, int[] down_form, Tensor? down_norm, "
        "bool gelu) -> Tensor"
    ),
    "packed_layers": (
        "(Tensor x, Tensor[] weights, int[] forms, Tensor?[] extras, int[] heads, float eps, float scale, bool gelu, "
        "Tensor? cos, Tensor? sin, Tensor[] step, Tensor(a!)[] open, Tensor(b!)[] key_planes, int[] key_coding, "
        "Tensor[] key_frames, Tensor(c!)[] value_planes, int[] value_coding, Tensor[] value_frames, int block_size, "
        "int window=0) "
        "-> Tensor"
    ),
    "instruction_set": "() -> str",
}
REFERENCE, CPU, PORTABLE, AVX2 = "kvist_reference", "kvist_cpu", "kvist_portable", "kvist_avx2"


def _fake_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    pass


def _fake_attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_attend_own(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_seal(
    open: Tensor,
    planes: list[Tensor],
    coding: list[int],
    frame: list[Tensor],
    keys: bool,
    sources: Tensor,
    targets: Tensor,
) -> None:
    pass


def _fake_attend_coded(
    q: Tensor,
    own: Tensor,
    lse: Tensor,
    key_planes: list[Tensor],
    key_coding: list[int],
    key_frame: list[Tensor],
    value_planes: list[Tensor],
    value_coding: list[int],
    value_frame: list[Tensor],
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_attend_made(
    q: Tensor,
    own: list[Tensor],
    behind_planes: list[Tensor],
    behind_coding: list[int],
    behind_frame: list[Tensor],
    value_planes: list[Tensor],
    value_coding: list[int],
    value_frame: list[Tensor],
    tie: list[Tensor],
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    behind = behind_frame[0].shape[1] if behind_coding else _dim_of_keys(behind_planes)
    shape = *q.shape[:2], q.shape[2] - behind
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)


def _dim_of_keys(planes: list[Tensor]) -> int:
    return planes[0].shape[3] * (planes[0].shape[5] if planes[0].dim() == 6 else 1) if planes else 0


def _fake_silu_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_gelu(x: Tensor, tanh: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_packed_linear(
    x: Tensor, norm: Tensor | None, eps: float, data: Tensor, form: list[int], bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], form[0]))


def _fake_packed_float(x: Tensor, data: Tensor, form: list[int], bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], form[0]))


def _fake_packed_rows(data: Tensor, form: list[int], ids: Tensor) -> Tensor:
    return data.new_empty((ids.shape[0], form[1]), dtype=torch.float32)


def _fake_packed_project(
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
    return x.new_empty((x.shape[0], form[0]))


def _fake_packed_ending(
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
    return torch.empty_like(x)


def _fake_packed_layers(
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
    return torch.empty_like(x)


def _define(namespace: str) -> Library:
    library = Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
    torch.library.register_fake(f"{namespace}::write", _fake_write, lib=library)
    torch.library.register_fake(f"{namespace}::attend", _fake_attend, lib=library)
    torch.library.register_fake(f"{namespace}::attend_own", _fake_attend_own, lib=library)
    torch.library.register_fake(f"{namespace}::seal", _fake_seal, lib=library)
    torch.library.register_fake(f"{namespace}::attend_coded", _fake_attend_coded, lib=library)
    torch.library.register_fake(f"{namespace}::attend_made", _fake_attend_made, lib=library)
    torch.library.register_fake(f"{namespace}::silu_mul", _fake_silu_mul, lib=library)
    torch.library.register_fake(f"{namespace}::gelu", _fake_gelu, lib=library)
    torch.library.register_fake(f"{namespace}::packed_linear", _fake_packed_linear, lib=library)
    torch.library.register_fake(f"{namespace}::packed_float", _fake_packed_float, lib=library)
    torch.library.register_fake(f"{namespace}::packed_rows", _fake_packed_rows, lib=library)
    torch.library.register_fake(f"{namespace}::packed_project", _fake_packed_project, lib=library)
    torch.library.register_fake(f"{namespace}::packed_ending", _fake_packed_ending, lib=library)
    torch.library.register_fake(f"{namespace}::packed_layers", _fake_packed_layers, lib=library)
    return library


# The definitions last as long as these objects. Implementations register themselves under the same names.
LIBRARIES = {namespace: _define(namespace) for namespace in (REFERENCE, CPU, PORTABLE, AVX2)}
