"""`kvist plan`: what a model will take, before anything of it is loaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.units import format_bytes
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
    contexts = numbers(context, "--context", "4096,32768")
    with starting():
        from kvist.evals import studies
    found = studies.plan(model, kv=kv or studies.KVS, contexts=contexts)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _print(found: "Plan") -> None:
    from kvist.base.tables import output, show

    console = output()
    console.print(f"{found.model} · {found.family}")
    for kind in found.kinds:
        console.print(f"  {kind}")
    console.print("  weights · " + " · ".join(f"{name} {format_bytes(size)}" for name, size in found.weights.items()))
    for table in found.tables():
        show(console, table)
    for kv, why in found.left_out.items():
        console.print(f"left out: {why}" if kv in why else f"left out: {kv}: {why}", highlight=False, markup=False)
