"""`kvist cache`: what lies in the cache folder, and clearing it."""

from pathlib import Path
from typing import Annotated

import typer

from kvist.base.errors import KvistError
from kvist.base.units import format_bytes
from kvist.cli.options import Json, print_json

app = typer.Typer(help="What Kvist keeps in its cache folder, and clearing it.", no_args_is_help=True)


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """What lies in the cache folder, what it takes, and when something there was last written."""
    from rich.table import Table

    from kvist.base.tables import output, show
    from kvist.service.cache_folder import entries

    found = entries()
    if as_json:
        print_json([entry.to_json() for entry in found])
        return
    table = Table("name")
    table.add_column("size", justify="right")
    table.add_column("last written")
    table.add_column("what")
    for entry in found:
        table.add_row(entry.name, format_bytes(entry.size), entry.day, entry.what)
    show(output(), table)
    for entry in found:
        typer.echo(entry.path)


@app.command("clear")
def clear(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="As `kvist cache ls` names them.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete what can be made again: what is named, or all but `kv`, which holds contexts and goes only by name."""
    from kvist.service.cache_folder import KEPT, delete, entries, unused

    there = {entry.name: entry for entry in entries()}
    if unknown := [name for name in names or () if name not in there]:
        raise KvistError(f"there is no {unknown[0]!r} in the cache folder; `kvist cache ls` lists what there is")
    chosen = [there[name] for name in dict.fromkeys(names or [name for name in there if name != KEPT])]
    if not chosen:
        typer.echo("nothing to delete")
        return
    with unused(chosen):
        for entry in chosen:
            typer.echo(f"{entry.name}: {format_bytes(entry.size)} in {Path(entry.path)}")
        if not yes and not typer.confirm("Delete these?"):
            raise typer.Exit(1)
        for entry in chosen:
            delete(entry)
