"""`kvist context`: named prefixes that are computed once and read from disk from then on."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvist.base.errors import KvistError
from kvist.base.progress import progress
from kvist.base.units import format_bytes, format_duration, parse_bytes, plural
from kvist.cli.options import CacheDir, CacheDisk, Dtype, Json, Kv, Weights, graceful_interrupt, note, print_json
from kvist.cli.process import Threads, prepare

if TYPE_CHECKING:
    from kvist.service.contexts import Context, Contexts
    from kvist.service.keeping import KeepSettings

app = typer.Typer(help="Named prefixes: computed once, read from disk from then on.", no_args_is_help=True)

INTERRUPTED = 130
Name = Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '.', '_' and '-'.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="A directory or a hub id; else the bundled model.")
]


@app.command()
def create(
    name: Name,
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Text, markdown, source, PDF, or folders.")],
    model: ModelOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="For chats: the text becomes the beginning of the system message.")
    ] = False,
    dtype: Dtype = None,
    kv: Kv = None,
    weights: Weights = None,
    cache_dir: CacheDir = None,
    cache_disk: CacheDisk = None,
    threads: Threads = None,
) -> None:
    """Compute a context from files, and keep it."""
    prepare(threads)
    from kvist.service.contexts import CHAT, TEXT, check_name
    from kvist.text.documents import read_documents

    check_name(name)
    reading = read_documents(files)
    if reading.skipped:
        note(f"{plural(reading.skipped, 'file')} without text that is known here left out")

    from kvist.service.context_making import make_context
    from kvist.service.keeping import open_kept
    from kvist.service.loaded import open_model

    loaded = open_model(model, dtype=dtype, kv=kv, weights=weights)
    sources = [document.name for document in reading.documents]
    started = time.perf_counter()
    settings, form, text = _settings(cache_dir, cache_disk), CHAT if chat else TEXT, reading.joined()
    watched = progress(f"computing {name}", "tokens")
    with open_kept(loaded, settings) as kept, watched as watch, graceful_interrupt() as interrupt:
        made = make_context(loaded, kept, name, form, text, sources, watch=watch, cancelled=interrupt)
    if made is None:
        note("interrupted; nothing was kept under that name")
        raise typer.Exit(INTERRUPTED)
    seconds = format_duration(time.perf_counter() - started)
    note(
        f"{name}: {plural(len(made.tokens), 'token')}, {format_bytes(made.nbytes)} of {made.identity.kv}, in {seconds}"
    )


@app.command("list")
def list_contexts(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """All contexts there are."""
    contexts = _contexts(cache_dir)
    rows = []
    for name in contexts.names():
        try:
            rows.append(_facts(contexts.get(name), contexts))
        except KvistError as error:
            rows.append({"name": name, "damaged": str(error)})
    if as_json:
        print_json(rows)
        return
    if not rows:
        note("there are no contexts; kvist context create makes one")
        return
    from rich.table import Table
    from rich.text import Text

    from kvist.base.tables import output
    from kvist.base.tables import show as show_table

    table = Table("name", "model", "form", box=None, pad_edge=False)
    for heading in ("tokens", "on disk"):
        table.add_column(heading, justify="right")
    table.add_column("codec")
    table.add_column("used")
    for row in rows:
        if "damaged" in row:
            table.add_row(row["name"], "damaged")
            continue
        used = f"{format_duration(max(time.time() - row['used'], 0))} ago"
        taken, codec = format_bytes(row["bytes"]), Text(_shown(row["kv"]))
        table.add_row(row["name"], Text(_shown(row["model"])), row["form"], f"{row['tokens']:,}", taken, codec, used)
    show_table(output(), table)


@app.command()
def show(name: Name, cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """What a context is, and how much of it is on disk."""
    from kvist.cache.disk import DiskTier
    from kvist.service.keeping import differs_today

    contexts, settings = _contexts(cache_dir), _settings(cache_dir, None)
    context = contexts.get(name)
    disk = DiskTier(settings.path, settings.budget())
    blocks = [block.name for block in context.blocks]
    facts = _facts(context, contexts) | {
        "blocks": len(blocks),
        "blocks_on_disk": sum(disk.contains(block) for block in blocks),
        "sources": list(context.sources),
        "elsewhere": context.elsewhere,
        "shared": not context.imported,
        "checked": context.checked,
        "differs": differs_today(settings.path, context.identity),
        "identity": context.identity.to_json(),
    }
    disk.close()
    if as_json:
        print_json(facts)
        return
    model = _shown(context.identity.model)
    print(f"{name}: {plural(len(context.tokens), 'token')} of {model}, for {context.form}s")
    there, total = facts["blocks_on_disk"], facts["blocks"]
    missing = "" if there == total else f", {total - there:,} are not there any more and will be computed again"
    print(f"{format_bytes(context.nbytes)} on disk, {context.identity.kv}; {there:,} of {total:,} blocks{missing}")
    print(f"made {_date(context.created)}, last used {_date(facts['used'])}")
    if context.elsewhere:
        print("computed on a machine with other arithmetic: answers may differ from those computed here in rare words")
    if context.imported or context.checked:
        print(_trusted(context))
    if facts["differs"]:
        print(f"of no use to {model} as it was last opened, whose {', '.join(facts['differs'])} differ: make it again")
    print("\n".join(f"  {_shown(source)}" for source in context.sources))


@app.command()
def rm(name: Name, cache_dir: CacheDir = None) -> None:
    """Forget a context. What it takes on disk is given up when room is needed."""
    from kvist.cache.disk import DiskTier

    settings = _settings(cache_dir, None)
    disk = DiskTier(settings.path, settings.budget())
    try:
        _contexts(cache_dir).remove(name, disk)
    finally:
        disk.close()


@app.command()
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where it goes.")],
    cache_dir: CacheDir = None,
) -> None:
    """Write a context to one file, which another machine with the same model can import."""
    from kvist.cache.disk import DiskTier
    from kvist.service.context_file import export_context

    context, settings = _contexts(cache_dir).get(name), _settings(cache_dir, None)
    disk = DiskTier(settings.path, settings.budget())
    try:
        with progress(f"writing {name}", "blocks") as watch:
            export_context(context, disk, file, watch)
    finally:
        disk.close()
    note(f"{file}: {format_bytes(file.stat().st_size)}")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What kvist context export has written.")],
    name: Annotated[str | None, typer.Option(help="Another name for it.")] = None,
    model: ModelOption = None,
    other_arithmetic: Annotated[
        bool, typer.Option("--other-arithmetic", help="Take it where the last bits may differ, too.")
    ] = False,
    check: Annotated[
        str, typer.Option(metavar="SHARE", help="Which blocks are computed again and compared: sample, or all.")
    ] = "sample",
    trust: Annotated[
        bool, typer.Option("--trust", help="Whoever made it is trusted: nothing is compared, and all prompts use it.")
    ] = False,
    dtype: Dtype = None,
    kv: Kv = None,
    weights: Weights = None,
    cache_dir: CacheDir = None,
    cache_disk: CacheDisk = None,
    threads: Threads = None,
) -> None:
    """Take over a context from a file. Blocks of it are computed again and must be alike to the bit. Only where that
    were all of them, or with --trust, prompts that do not name it use it, too."""
    if check not in ("sample", "all"):
        raise KvistError(f"--check is sample or all, not {check!r}")
    if trust and check == "all":
        raise KvistError("--check all compares everything, so that nobody needs to be trusted; leave out --trust")
    prepare(threads)
    from kvist.service.context_check import Check
    from kvist.service.context_file import import_context
    from kvist.service.contexts import Contexts
    from kvist.service.keeping import open_kept
    from kvist.service.loaded import open_model

    loaded = open_model(model, dtype=dtype, kv=kv, weights=weights)
    settings = _settings(cache_dir, cache_disk)
    with open_kept(loaded, settings) as kept, progress("importing", "steps") as watch:
        made = import_context(
            file,
            name,
            Contexts(settings.path),
            kept.disk,
            kept.identity,
            loaded,
            check=Check.TRUST if trust else Check(check),
            other_arithmetic=other_arithmetic,
            watch=watch,
        )
    note(f"{made.name}: {plural(len(made.tokens), 'token')}, {format_bytes(made.nbytes)} of {made.identity.kv}")
    note(_trusted(made))


def _settings(folder: Path | None, disk: str | None) -> "KeepSettings":
    from kvist.service.keeping import KeepSettings

    return KeepSettings(folder, None if disk is None else parse_bytes(disk, "--cache-disk"))


def _contexts(folder: Path | None) -> "Contexts":
    from kvist.service.contexts import Contexts

    return Contexts(_settings(folder, None).path)


def _facts(context: "Context", contexts: "Contexts") -> dict[str, Any]:
    return {
        "name": context.name,
        "model": context.identity.model,
        "form": context.form,
        "tokens": len(context.tokens),
        "bytes": context.nbytes,
        "kv": context.identity.kv,
        "created": context.created,
        "used": contexts.used(context.name),
    }


def _trusted(context: "Context") -> str:
    """What is known of an imported context's KV, and who reads it."""
    total = len(context.tokens) // context.block_size
    compared = f"{context.checked:,} of {plural(total, 'block')} were computed again and are alike"
    if not context.checked:
        compared = "nothing of it was computed again"
    if not context.imported:
        return f"{compared}; all prompts that begin with it use it"
    if context.elsewhere:
        return "it cannot be compared, as sums are rounded otherwise here; only prompts that name it use it"
    return f"{compared}; only prompts that name it use it (--check all, or --trust, has all of them use it)"


def _shown(text: str) -> str:
    """Text of a file that may be from elsewhere: whatever a terminal would obey left out."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
