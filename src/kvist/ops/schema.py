"""The operators: one schema each, in one namespace per implementation, and what they give for shapes alone.

| operator | does |
|---|---|
| `write` | stores k and v [T, H, D] in the planes at `slots` [T] int64 = block * block_size + offset; -1 is padding |
| `attend` | causal attention of ragged batches of queries over paged keys and values |
| `silu_mul` | gate_up [..., 2I] → silu(gate) * up [..., I] |
| `gelu` | exact GELU, or its tanh form |

`attend(q, keys, values, tables, starts, lengths, scale)`: q [T, Hq, D] holds the queries of S sequences one after
another; sequence s owns rows starts[s] to starts[s+1] (starts [S+1] int32), which are its newest tokens: it has
lengths[s] tokens in the cache (lengths [S] int32), these included. tables [S, max_blocks] int32 names its blocks in
order. The query at absolute position p sees keys 0..p; query head h uses KV head h // (Hq / H). Rows from starts[S]
on are padding and come out as zeros. Result [T, Hq, D] in q's dtype.

A row's bits depend on its own q, on the keys and values it sees, and on scale: never on the other rows or sequences of
the call, on where its blocks lie or how large they are, nor on the number of threads. So decoding, prefilling and any
cut of a prompt into chunks agree to the bit. Every implementation gives this; different ones agree only closely.
"""

import torch
from torch import Tensor
from torch.library import Library

SCHEMAS = {
    "write": "(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor slots) -> ()",
    "attend": (
        "(Tensor q, Tensor keys, Tensor values, Tensor tables, Tensor starts, Tensor lengths, float scale) -> Tensor"
    ),
    "silu_mul": "(Tensor gate_up) -> Tensor",
    "gelu": "(Tensor x, bool tanh) -> Tensor",
    "instruction_set": "() -> str",
}
REFERENCE, CPU, PORTABLE = "kvist_reference", "kvist_cpu", "kvist_portable"


def _fake_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    pass


def _fake_attend(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_silu_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_gelu(x: Tensor, tanh: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _define(namespace: str) -> Library:
    library = Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
    torch.library.register_fake(f"{namespace}::write", _fake_write, lib=library)
    torch.library.register_fake(f"{namespace}::attend", _fake_attend, lib=library)
    torch.library.register_fake(f"{namespace}::silu_mul", _fake_silu_mul, lib=library)
    torch.library.register_fake(f"{namespace}::gelu", _fake_gelu, lib=library)
    return library


# The definitions last as long as these objects. Implementations register themselves under the same names.
LIBRARIES = {namespace: _define(namespace) for namespace in (REFERENCE, CPU, PORTABLE)}
