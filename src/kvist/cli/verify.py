"""`kvist verify`: the proof that the cache changes nothing."""

import sys
from typing import Annotated

import typer

from kvist.cli.options import Activations, Dtype, Json, Kv, Merged, Model, Weights, print_json


def verify(
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens, cut to what the context allows.")] = 560,
    steps: Annotated[int, typer.Option(min=1, help="Tokens generated and recomputed.")] = 24,
    trials: Annotated[int, typer.Option(min=1, help="Random chunkings, rollbacks and forks.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the random prompts and choices.")] = 0,
    dtype: Dtype = None,
    kv: Kv = None,
    weights: Weights = None,
    activations: Activations = None,
    adapter: Merged = None,
    as_json: Json = False,
) -> None:
    """Compare runs with the cache to runs from nothing, bit for bit. Exits with 1 on any difference."""
    from rich.console import Console
    from rich.table import Table

    from kvist.evals.verify import Report, Verifier
    from kvist.service.loaded import open_model

    loaded = open_model(model, dtype=dtype, kv=kv, weights=weights, activations=activations, adapter=adapter)
    verifier = Verifier(loaded, tokens, steps, trials, seed)
    title = f"{loaded.name} · operators {loaded.backend.name} · weights {loaded.model.weights} · KV {loaded.layout.kv}"
    table = Table("check", "result", "compared", "evidence", title=title, title_justify="left")
    checks = []
    with Console(stderr=True).status("verifying", spinner="line") as status:
        for check in verifier.run():
            checks.append(check)
            status.update(f"verifying · {len(checks)} checks done, last: {check.name}")
            evidence = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in check.evidence.items())
            result = "[green]equal[/]" if check.passed else "[red]DIFFERS[/]"
            table.add_row(check.name, result, f"{check.compared:,}", evidence)
    report = Report(checks)
    if as_json:
        print_json(report.to_json())
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    if not report.passed:
        raise typer.Exit(1)


def _short(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
