"""`kvist plan`: what a model will take, before anything of it is loaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.units import format_bytes, plural
from kvist.cli.options import Json, Model, numbers, print_json
from kvist.cli.process import starting

if TYPE_CHECKING:
    from kvist.service.plan import Plan


def plan(
    model: Model = None,
    kv: Annotated[
        list[str] | None,
        typer.Option("--kv", metavar="CODECS", help="As turbo4 or k=int8,v=turbo4; several times."),
    ] = None,
    context: Annotated[str, typer.Option(metavar="N,...", help="Tokens of a sequence.")] = "4096,32768,131072",
    as_json: Json = False,
) -> None:
    """What a model keeps per layer, the bytes of its KV at growing contexts under each codec beside a naive cache, and
    those of its weights. Of a model on the hub only the config is fetched, or its GGUF file."""
    with starting():
        from kvist.service.loaded import BUNDLED, find_gguf, plain_name
    from kvist.service.plan import KVS, plan_model
    from kvist.weights.hub import resolve

    contexts = numbers(context, "--context", "4096,32768")
    source = BUNDLED if model is None else find_gguf(model) or resolve(model, progress=True, weights=False)
    found = plan_model("kvist-shakespeare" if model is None else plain_name(model), source, kv or KVS, contexts)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found, contexts)


def _print(found: "Plan", contexts: list[int]) -> None:
    from rich.table import Table

    from kvist.base.tables import output, show

    console = output()
    console.print(f"{found.model} · {found.family}")
    for kind in found.kinds:
        kept = f"of the last {kind.tokens:,} tokens" if kind.tokens else "of every token"
        if kind.numbers:
            console.print(f"  {plural(kind.layers, 'layer')} · {kind.what} · {kind.numbers:,} numbers {kept}")
        else:
            console.print(f"  {plural(kind.layers, 'layer')} · {kind.what}")
    console.print("  weights · " + " · ".join(f"{name} {format_bytes(size)}" for name, size in found.weights.items()))
    table = Table(title="KV of one sequence, and how many times smaller than a naive one", title_justify="left")
    table.add_column("KV")
    for tokens in contexts:
        table.add_column(f"{tokens:,} tokens", justify="right")
    naive = {row.context: row.naive_bytes for row in found.rows}
    if naive:
        table.add_row("naive bf16", *(format_bytes(naive[tokens]) for tokens in contexts))
    for kv in dict.fromkeys(row.kv for row in found.rows):
        own = {row.context: row for row in found.rows if row.kv == kv}
        table.add_row(kv, *(f"{format_bytes(own[n].nbytes)} · {own[n].times_smaller:.1f}x" for n in contexts))
    if found.rows:
        show(console, table)
    for kv, why in found.left_out.items():
        console.print(f"left out: {why}" if kv in why else f"left out: {kv}: {why}", highlight=False, markup=False)
