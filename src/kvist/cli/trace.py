"""`kvist trace`: a walk through two steps."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvist.base.units import format_bytes, plural
from kvist.cli.options import Dtype, Json, Kv, Model, Weights, print_json
from kvist.cli.process import Threads, prepare


def trace(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to prefill.")],
    model: Model = None,
    dtype: Dtype = None,
    kv: Kv = None,
    weights: Weights = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show every tensor of one prefill and one decode step, and how the cache grows."""
    prepare(threads)
    from rich.table import Table

    from kvist.base.errors import RequestError
    from kvist.base.tables import output, show
    from kvist.evals.trace import trace as trace_steps
    from kvist.service.loaded import open_model

    loaded = open_model(model, dtype=dtype, kv=kv, weights=weights)
    ids = loaded.tokenizer().encode(prompt)
    if not 0 < len(ids) < loaded.config.max_positions:
        raise RequestError(
            f"a trace needs a prompt of 1 to {loaded.config.max_positions - 1:,} tokens, this one has {len(ids):,}"
        )
    steps = trace_steps(loaded, ids)
    if as_json:
        print_json({"model": loaded.name, "steps": [asdict(step) for step in steps]})
        return
    console = output(130)
    for step in steps:
        table = Table("tensor", "shape", "type", "meaning", title=step.title, title_justify="left")
        for row in step.tensors:
            table.add_row(row.name, " × ".join(map(str, row.shape)), row.dtype, row.meaning)
        show(console, table)
        for event in step.events:
            console.print(f"  {event}", style="dim")
        console.print(
            f"cache: {plural(step.tokens, 'token')} in {plural(step.blocks, 'block')} of {loaded.layout.block_size}, "
            f"{format_bytes(step.bytes)} in {plural(loaded.config.layers, 'layer')}\n"
        )
