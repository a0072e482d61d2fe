"""`kvist serve`: a model behind the APIs of OpenAI, Anthropic, Ollama and llama.cpp."""

import contextlib
import math
import re
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError
from kvist.base.units import parse_bytes
from kvist.cli.keys import KEY_VARIABLE, api_keys
from kvist.cli.options import Activations, CacheDir, CacheDisk, Dtype, Kv, Model, Weights, note
from kvist.cli.process import Threads, prepare
from kvist.cli.run import INTERRUPTED

if TYPE_CHECKING:
    from kvist.server.settings import ServerSettings
    from kvist.service.budget import KvBudget
    from kvist.service.keeping import KeepSettings, Kept
    from kvist.service.loaded import Loaded
    from kvist.service.serving import Serving


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Listen on this address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port; 0 takes any that is free.")] = 8000,
    kv: Kv = None,
    weights: Weights = None,
    activations: Activations = None,
    kv_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for the cache, as in 2GiB; by default half of the free.")
    ] = None,
    cache_dir: CacheDir = None,
    cache_disk: CacheDisk = None,
    cache_max_age: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Delete from the disk what was not used for so long, as in 12h or 30d."),
    ] = None,
    cache_remote: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Share the cache through a Redis, a Valkey or a plug-in, as in redis://host."),
    ] = None,
    dtype: Dtype = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A LoRA adapter that clients have as model NAME; may be given several times."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients; by default that of its folder or file.")
    ] = None,
    strict_model: Annotated[
        bool, typer.Option("--strict-model", help="Refuse requests for a model of another name.")
    ] = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A chat template instead of the model's own, or the name of one of its own."),
    ] = None,
    tools: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="Where a chat template has no place for tools: auto tells of them in words, template refuses them.",
        ),
    ] = "auto",
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help=f"Answer only who sends this key; may be given several times. Also {KEY_VARIABLE}."
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line, with names and limits.")
    ] = None,
    public_prompt: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A system prompt that all keys share in the cache; may be given several times."
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let the network ask without an API key.")] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages of this origin ask; '*' for all; may be given several times."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Answer under this host name, too; may be given several times."),
    ] = None,
    max_running: Annotated[int | None, typer.Option(min=1, help="The most answers under way at once.")] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="The most requests that wait; others get 429.")] = 256,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="The largest request.")] = "8MiB",
    timeout: Annotated[float, typer.Option(help="The most seconds that a request may take.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds that a shut-down waits for answers under way.")] = 30.0,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log in JSON; the default where stderr is no terminal.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Serve a model over the APIs of OpenAI, Anthropic, Ollama and llama.cpp. Ctrl-C ends it in an orderly way."""
    prepare(threads)
    if not 0 < timeout < float("inf") or not 0 <= grace < float("inf"):
        raise KvistError(f"--timeout and --grace take a number of seconds, got {timeout:g} and {grace:g}")
    if tools not in ("auto", "template"):
        raise KvistError(f"--tools takes auto or template, got {tools!r}")
    given = None if kv_memory is None else parse_bytes(kv_memory, "--kv-memory")
    body, keys = parse_bytes(max_body, "--max-body"), api_keys(api_key or [], api_key_file)
    adapters = adapter_folders(adapter or ())
    keep = keep_settings(cache_dir, cache_disk, cache_max_age, cache_remote)

    from kvist.server.logs import shown
    from kvist.server.run import is_loopback, listen
    from kvist.server.settings import ServerSettings
    from kvist.service.keeping import open_kept
    from kvist.service.loaded import open_model

    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(keys),
        tenants={key: tenant for key, tenant in keys.items() if tenant is not None},
        origins=tuple(allow_origin or ()),
        hosts=tuple(allow_host or ()),
        max_body_bytes=body,
        max_waiting=max_waiting,
        timeout=timeout,
        grace=grace,
    )
    # Before the model is read: whoever has the port keeps it, and it takes a moment to say so.
    with listen(host, port) as listening:
        if not keys and not insecure and not is_loopback(listening):
            raise KvistError(
                f"on {host} everybody on the network could ask; protect the server with --api-key, or give --insecure "
                "where something else does"
            )
        with shown(as_json=log_json or not sys.stderr.isatty()), contextlib.ExitStack() as stack:
            try:
                loaded = open_model(
                    model, dtype=dtype, kv=kv, weights=weights, activations=activations, adapters=adapters
                )
                budget = loaded.budget(given, max_running)
                kept = None if keep is None else stack.enter_context(open_kept(loaded, keep))
                serving = _serving(
                    loaded,
                    budget,
                    kept,
                    name,
                    strict_model,
                    chat_template,
                    tools == "auto",
                    settings,
                    public_prompt or [],
                )
            except KeyboardInterrupt:
                note("stopped")
                raise typer.Exit(INTERRUPTED) from None
            _run(serving, settings, listening)


def keep_settings(
    folder: Path | None, disk: str | None, max_age: str | None, remote: str | None
) -> "KeepSettings | None":
    """Where the cache is kept beyond memory; None where nothing says that it is. Raises `KvistError`."""
    from kvist.service.keeping import KeepSettings

    on_disk = folder is not None or disk is not None
    if not on_disk and max_age is not None:
        raise KvistError("--cache-max-age is for a cache on disk: give --cache-disk, as in 20GB")
    if not on_disk and remote is None:
        return None
    age = math.inf if max_age is None else duration(max_age, "--cache-max-age")
    return KeepSettings(folder, None if disk is None else parse_bytes(disk, "--cache-disk"), age, remote, on_disk)


def adapter_folders(given: Iterable[str]) -> dict[str, Path]:
    """Adapters by name, each given as NAME=DIR. Raises `KvistError`."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or name in found:
            raise KvistError(f"--adapter takes a new name and a folder, as in poems=adapters/poems; got {text!r}")
        found[name] = Path(folder).expanduser()
    return found


def duration(text: str, option: str) -> float:
    """Seconds: `90s`, `15m`, `12h`, `30d`. Raises `KvistError` that names the option."""
    found = re.fullmatch(r"(\d{1,9}) ?([smhd])", text.strip().lower())
    if found is None or int(found[1]) < 1:
        raise KvistError(f"{option} takes a time, as in 90s, 15m, 12h or 30d; got {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def _serving(
    loaded: "Loaded",
    budget: "KvBudget",
    kept: "Kept | None",
    name: str | None,
    strict_model: bool,
    template: Path | None,
    generic_tools: bool,
    settings: "ServerSettings",
    public: list[Path],
) -> "Serving":
    """The model and its engine; tells what the cache holds."""
    from kvist.server.run import log
    from kvist.service.serving import Serving
    from kvist.service.tenants import tenant_id
    from kvist.text.reading import read_text

    serving = Serving(
        loaded,
        loaded.engine(budget, kept),
        name=name,
        strict_model=strict_model,
        template=template,
        generic_tools=generic_tools,
        max_waiting=settings.max_waiting,
        timeout=settings.timeout,
        tenants=tuple(settings.tenants.values()),
        kept=kept,
    )
    for path in public:
        log.info("%s: %s tokens are shared by all tenants", path, f"{serving.make_public(read_text(path)):,}")
    if kept is not None:
        tenants = {key: settings.tenants.get(key) for key in settings.api_keys}
        limits = {tenant_id(key, tenant): tenant and tenant.disk for key, tenant in tenants.items()}
        kept.share(limits, serving.manager, loaded.adapters.values())
    log.info("%s · context of %s tokens", serving.name, f"{serving.context:,}")
    log.info("sampled with %s where a request says nothing", str(serving.proposed) or "temperature 1")
    log.info("%s", budget.describe(serving.context))
    for line in () if kept is None else kept.describe():
        log.info("%s", line)
    if serving.template is None:
        log.info("the model has no chat template: only completions are served; --chat-template gives it one")
    return serving


def _run(serving: "Serving", settings: "ServerSettings", listening: socket.socket) -> None:
    from kvist.server.app import create_app
    from kvist.server.run import log, serve, url_of

    def ready() -> None:
        url = url_of(listening)
        log.info("listening on %s · OpenAI: %s/v1 · Anthropic: %s", url, url, url, extra={"facts": {"url": url}})

    serve(create_app(serving, settings), serving.stop, settings, listening, ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it has ended well: one signal more changes nothing of that
    log.info("stopped")
