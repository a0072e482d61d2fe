"""`kvist verify`: the proof that the cache changes nothing."""

from typing import Annotated

import typer

from kvist.cli.options import Activations, Dtype, Json, Kv, Merged, Model, Weights, note, print_json
from kvist.cli.process import Threads, prepare

# Exit codes: a bit differs; or none does, and our run is farther from plain attention than rounding takes it.
DIFFERS, FAR = 1, 3


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
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare runs with the cache to runs from nothing, bit for bit, and one with plain attention, nearly. Exits with 1
    where a bit differs, with 3 where only the nearly one is far."""
    prepare(threads)
    from rich.console import Console

    from kvist.base.tables import output, show
    from kvist.evals.verify import Report, Verifier
    from kvist.service.loaded import open_model

    loaded = open_model(model, dtype=dtype, kv=kv, weights=weights, activations=activations, adapter=adapter)
    verifier = Verifier(loaded, tokens, steps, trials, seed)
    checks = []
    with Console(stderr=True).status("verifying", spinner="line") as status:
        for check in verifier.run():
            checks.append(check)
            status.update(f"verifying · {len(checks)} checks done, last: {check.name}")
    report = Report(verifier.title, checks)
    if as_json:
        print_json(report.to_json())
    else:
        for table in report.tables():
            show(output(), table)
    if not report.exact:
        raise typer.Exit(DIFFERS)
    if not report.passed:
        note("no bit differs with the cache; but the run itself is farther from plain attention than rounding takes it")
        raise typer.Exit(FAR)
