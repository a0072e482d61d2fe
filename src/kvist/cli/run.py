"""`kvist run`: continue a prompt."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError
from kvist.base.units import format_bytes, plural
from kvist.cli.options import (
    Activations,
    CacheDir,
    Dtype,
    Json,
    Kv,
    Merged,
    Model,
    Weights,
    graceful_interrupt,
    note,
    print_json,
)
from kvist.cli.process import Threads, prepare

if TYPE_CHECKING:
    from kvist.runtime.request import Sampling
    from kvist.service.contexts import Context
    from kvist.service.generation import Opened, Result
    from kvist.service.loaded import Loaded, Opening

INTERRUPTED = 130
_TEMPERATURE = 0.8  # where neither the user nor the model says one


def run(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue; '-' reads stdin.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The most new tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; by default what the model proposes, or 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that together reach p.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out what is less likely than this part of the likeliest.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text; by default a new one.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    dtype: Dtype = None,
    kv: Kv = None,
    weights: Weights = None,
    activations: Activations = None,
    adapter: Merged = None,
    context: Annotated[
        str | None, typer.Option(metavar="NAME", help="Begin with this context, in the model that made it.")
    ] = None,
    cache_dir: CacheDir = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming; without --prompt, each line you type is a prompt of its own."""
    prepare(threads)
    import secrets

    from kvist.service.loaded import open_model
    from kvist.service.sampling import Proposed, read_proposed

    if prompt is None and as_json:
        raise KvistError("--json needs a prompt: give one with --prompt")
    if prompt == "-":
        prompt = _read_stdin()
    stated = Proposed(temperature, top_k, top_p, min_p)
    seed = secrets.randbits(32) if seed is None else seed
    stated.sampling(seed)  # refused before anything large is read
    found = None if context is None else _find_context(context, cache_dir)
    opening = None
    if found is not None and all(each is None for each in (model, dtype, kv, weights, activations, adapter)):
        opening = _opening_of(found, cache_dir)
    if opening is not None:
        loaded = opening.open()
    else:
        loaded = open_model(model, dtype=dtype, kv=kv, weights=weights, activations=activations, adapter=adapter)
    proposed = read_proposed(loaded.directory)
    sampling = stated.over(proposed).over(Proposed(_TEMPERATURE)).sampling(seed)
    if str(proposed) and not as_json:
        note(f"the model proposes {proposed}")
    stops = tuple(stop or ())
    with ExitStack() as stack:
        opened = None if found is None else _open_context(stack, loaded, found, cache_dir)
        if prompt is not None:
            _once(loaded, prompt, max_tokens, sampling, stops, as_json, opened)
            return
        while (line := _ask()) is not None:
            if line:
                try:
                    _once(loaded, line, max_tokens, sampling, stops, False, opened)
                except KvistError as error:
                    note(f"kvist: {error}")


def _find_context(name: str, folder: Path | None) -> "Context":
    """The context of that name. No model is read for one that there is not."""
    from kvist.service.contexts import TEXT, Contexts
    from kvist.service.keeping import KeepSettings

    found = Contexts(KeepSettings(folder).path).get(name)
    if found.form != TEXT:
        raise KvistError(f"the context {name!r} was made for chats; kvist serve answers with it")
    return found


def _opening_of(context: "Context", folder: Path | None) -> "Opening | None":
    """How the model was opened that made the context."""
    from kvist.service.keeping import KeepSettings
    from kvist.service.openings import find_opening

    return find_opening(KeepSettings(folder).path, context.identity)


def _open_context(stack: ExitStack, loaded: "Loaded", context: "Context", folder: Path | None) -> "Opened":
    """The context, and the kept cache that has it."""
    from kvist.service.context_making import usable
    from kvist.service.contexts import Contexts
    from kvist.service.generation import Opened
    from kvist.service.keeping import KeepSettings, open_kept

    settings = KeepSettings(folder)
    kept = stack.enter_context(open_kept(loaded, settings))
    opened = Opened(usable(context, kept), kept)
    Contexts(settings.path).touch(context.name)
    return opened


def _once(
    loaded: "Loaded",
    prompt: str,
    max_tokens: int,
    sampling: "Sampling",
    stops: tuple[str, ...],
    as_json: bool,
    opened: "Opened | None",
) -> None:
    """One prompt, streamed; raises `typer.Exit` when it was interrupted in one-shot use."""
    from kvist.runtime.request import FinishReason
    from kvist.service.generation import generate

    with graceful_interrupt() as interrupt:
        generation = generate(
            loaded, prompt, max_tokens=max_tokens, sampling=sampling, stops=stops, cancelled=interrupt, opened=opened
        )
        if not as_json:
            print(prompt, end="", flush=True)
        for piece in generation:
            if not as_json:
                print(piece, end="", flush=True)
    result = generation.result()
    if as_json:
        print_json(_as_json(loaded, result, sampling))
    else:
        print(flush=True)
        note(_summary(result, sampling))
        if opened is not None:
            note(_read_back(result, opened))
    if result.finish_reason is FinishReason.CANCELLED:
        raise typer.Exit(INTERRUPTED)


def _ask() -> str | None:
    """A line from the user; None at the end of input or on Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise KvistError(f"the prompt on stdin is not UTF-8: {error.reason} at byte {error.start}") from None


def _summary(result: "Result", sampling: "Sampling") -> str:
    read = " + ".join(f"{count:,} from {tier}" for tier, count in result.cached.items() if count)
    cached = f" ({read})" if read else ""
    seeded = f" · seed {sampling.seed}" if sampling.temperature else ""
    return (
        f"{plural(result.prompt_tokens, 'prompt token')}{cached} at {result.prefill_rate:,.0f}/s · "
        f"{len(result.tokens):,} new at {result.decode_rate:,.1f}/s · "
        f"KV {result.kv_codec}: {plural(result.kv_blocks, 'block')}, {format_bytes(result.kv_bytes)} "
        f"({format_bytes(result.kv_bytes_per_token)} a token){seeded}"
    )


def _read_back(result: "Result", opened: "Opened") -> str:
    """How much of the context did not have to be computed."""
    tokens = len(opened.context.tokens)
    read = min(sum(result.cached.values()), tokens)
    tiers = " and ".join(tier for tier, count in result.cached.items() if count) or "disk"
    return f"{read:,} of {plural(tokens, 'token')} of the context read from {tiers}"


def _as_json(loaded: "Loaded", result: "Result", sampling: "Sampling") -> dict[str, object]:
    return {
        "model": loaded.name,
        "prompt_tokens": result.prompt_tokens,
        "cached": {tier: count for tier, count in result.cached.items() if count},
        "tokens": result.tokens,
        "text": result.text,
        "finish_reason": result.finish_reason.value,
        "seed": sampling.seed,
        "timings": {
            "prefill_s": result.prefill_seconds,
            "decode_s": result.decode_seconds,
            "prefill_tokens_per_s": result.prefill_rate,
            "decode_tokens_per_s": result.decode_rate,
        },
        "kv": {
            "codec": result.kv_codec,
            "blocks": result.kv_blocks,
            "bytes": result.kv_bytes,
            "allocated_bytes": result.kv_allocated_bytes,
            "bytes_per_token": result.kv_bytes_per_token,
        },
    }
