"""The verbs and their options."""

import typer

from kvist.base.version import __version__
from kvist.cli import (
    bench,
    cache,
    calibrate,
    chat,
    context,
    convert,
    eval_codecs,
    evals,
    explain,
    fidelity,
    plan,
    run,
    serve,
    trace,
    train,
    verify,
)

app = typer.Typer(
    name="kvist",
    help="An inference engine for open-weights language models, built around an exact, paged KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvist {__version__}")
        raise typer.Exit


@app.callback()
def _kvist(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("explain")(explain.explain)
app.command("tax")(explain.tax)
app.command("verify")(verify.verify)
app.command("plan")(plan.plan)
app.command("fidelity")(fidelity.fidelity)
app.command("calibrate")(calibrate.calibrate)
app.command("trace")(trace.trace)
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.add_typer(context.app, name="context")
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
evals.app.command("codecs")(eval_codecs.codecs)
app.add_typer(evals.app, name="eval")
