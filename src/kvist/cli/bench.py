"""`kvist bench`: measurements beside others, in one run on one machine."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError, install
from kvist.cli.options import Json, Kv, Model, Weights, note, numbers, print_json
from kvist.cli.process import Threads, prepare

if TYPE_CHECKING:
    from kvist.bench.report import Report

app = typer.Typer(help="Measure, beside others, in one run on one machine.", no_args_is_help=True)

ATTENTION_SHAPES = "smollm2-135m,qwen2.5-0.5b,llama-3.2-1b,llama-3.1-8b"
DECODE_SHAPES = "smollm2-135m,llama-3.2-1b"
CACHE_SHAPES = "nanogpt-0.2m,smollm2-135m"
SERVE_SHAPE = "smollm2-135m"
SERVE_PARTS = "agent,throughput,structured"

Shapes = Annotated[str, typer.Option("--shape", metavar="NAME,...", help="Standard shapes.")]
Contexts = Annotated[str, typer.Option("--context", metavar="N,...", help="Tokens in the cache.")]

Kvs = Annotated[
    list[str] | None,
    typer.Option("--kv", metavar="CODECS", help="May be given several times; by default bf16, turbo4."),
]
PEERS = Path("build/peers")
Folder = Annotated[
    Path, typer.Option("--peers", metavar="DIR", help="Where make bench-peers has built the other engines.")
]
KVS = ("bf16", "turbo4")


@app.command()
def attention(
    shape: Shapes = ATTENTION_SHAPES,
    context: Contexts = "32768",
    kv: Kvs = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each.")] = 11,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Decode and prefill attention over each KV codec beside PyTorch's, and the memory's read bandwidth."""
    prepare(threads)
    import os

    from kvist.bench.attention import run

    report = run(
        shape.split(","),
        numbers(context, "--context", "1024,4096"),
        kv or KVS,
        rounds,
        os.environ.get("KVIST_OPS") or None,
    )
    _print(report, as_json)


@app.command()
def decode(
    shape: Shapes = DECODE_SHAPES,
    context: Contexts = "4096,32768",
    kv: Kvs = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each.")] = 7,
    dtype: Annotated[str, typer.Option(metavar="fp32|bf16|fp16", help="Of the random weights.")] = "bf16",
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="int8|int4", help="Packed weights instead; may be given several times."),
    ] = None,
    peer: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Beside these: llama.cpp, openvino, transformers.")
    ] = None,
    peers: Folder = PEERS,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Whole decode steps and prefills at growing depths over each KV codec, random weights in standard shapes; or steps
    alone, beside another engine."""
    prepare(threads)
    from rich.console import Console

    if peer is not None:
        _beside("decode", peer, peers, shape, weights, numbers(context, "--context", "0,4096", 0), kv, rounds, as_json)
        return

    from kvist.bench import decode as bench
    from kvist.bench.models import random_model

    models = [
        (name if how is None else f"{name} {how}", random_model(name, dtype, weights=how))
        for name in shape.split(",")
        for how in weights or [None]
    ]
    with Console(stderr=True).status("measuring", spinner="line") as status:
        observe = lambda what: status.update(f"measuring {what}")  # noqa: E731
        report = bench.run(models, numbers(context, "--context", "1024,4096"), kv or KVS, rounds, observe)
    _print(report, as_json)


@app.command()
def library(
    model: Model = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens behind each.")] = 64,
    kv: Kv = None,
    weights: Weights = None,
    rounds: Annotated[int, typer.Option(min=3, help="Measurements of each, in turns.")] = 11,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode through `kvist.LLM`, beside `kvist run`: the same prompts and tokens, in turns."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import library as bench
    from kvist.service.loaded import Opening

    with Console(stderr=True).status("measuring", spinner="line") as status:
        observe = lambda what: status.update(f"measuring {what}")  # noqa: E731
        report = bench.run(Opening(model, kv=kv, weights=weights), prompt, tokens, rounds, observe)
    _print(report, as_json)


@app.command()
def prefill(
    shape: Shapes = DECODE_SHAPES,
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens of whole prompts.")] = "512,4096",
    kv: Kvs = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each.")] = 3,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="int8|int4|bf16", help="May be given several times; by default int8."),
    ] = None,
    peer: Annotated[
        str, typer.Option(metavar="NAME,...", help="The others: llama.cpp, openvino, transformers.")
    ] = "llama.cpp",
    peers: Folder = PEERS,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Whole prompts beside other engines, random weights in standard shapes."""
    prepare(threads)
    _beside("prefill", peer, peers, shape, weights, numbers(tokens, "--tokens", "512,4096"), kv, rounds, as_json)


@app.command()
def neighbours(
    shape: Annotated[str, typer.Option(metavar="NAME", help="A standard shape.")] = SERVE_SHAPE,
    context: Annotated[int, typer.Option(min=0, help="Tokens in the cache.")] = 0,
    kv: Kv = None,
    weights: Annotated[str, typer.Option(metavar="int8|int4|bf16", help="Of the random weights.")] = "int8",
    busy: Annotated[int, typer.Option(min=1, help="Processes that spin.")] = 1,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each.")] = 11,
    peers: Folder = PEERS,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Decoding alone and beside busy processes, and llama.cpp in the same turns where it is built."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import neighbours as bench
    from kvist.bench.peers.engines import LLAMA_CPP, PeerError, python_of

    try:
        python = python_of(LLAMA_CPP, peers)
    except PeerError as error:
        note(f"without {LLAMA_CPP}: {error}")
        python = None
    with Console(stderr=True).status("measuring", spinner="line") as status:
        observe = lambda text: status.update(f"measuring · {text}")  # noqa: E731
        report = bench.run(shape, weights, kv or "turbo4", context, busy, rounds, python, observe)
    _print(report, as_json)


def _beside(
    what: str,
    peer: str,
    peers: Path,
    shape: str,
    weights: list[str] | None,
    lengths: list[int],
    kv: list[str] | None,
    rounds: int,
    as_json: bool,
) -> None:
    from rich.console import Console

    from kvist.bench import beside
    from kvist.bench.peers import engines

    names = peer.split(",")
    if unknown := next((name for name in names if name not in engines.SETTINGS), None):
        raise KvistError(f"--peer {unknown} is not known; choose among {', '.join(engines.SETTINGS)}")
    if unknown := next((name for name in weights or () if name not in ("int8", "int4", "bf16")), None):
        raise KvistError(f"--weights {unknown} is not compared; choose among int8, int4, bf16")
    pythons, shapes = {name: engines.python_of(name, peers) for name in names}, shape.split(",")
    with Console(stderr=True).status("measuring", spinner="line") as status:
        observe = lambda text: status.update(f"measuring · {text}")  # noqa: E731
        kvs, bits = kv or ("turbo4",), weights or ["int8"]
        report = beside.run(beside.What(what), shapes, bits, lengths, kvs, rounds, pythons, observe)
    _print(report, as_json)


@app.command()
def cache(
    model: Model = None,
    shape: Shapes = CACHE_SHAPES,
    context: Contexts = "64,256,1024,4096,16384",
    plot: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("cache.png"),
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Tokens per second with and without the cache, for a MODEL or for standard shapes with random weights."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import cache as bench
    from kvist.bench.models import random_model
    from kvist.service.loaded import open_model

    if model is not None:
        loaded = open_model(model)
        models = [(loaded.name, loaded)]
    else:
        models = [
            (name, random_model(name, "fp32" if name.startswith("nanogpt") else "bf16")) for name in shape.split(",")
        ]
    with Console(stderr=True).status("measuring", spinner="line") as status:
        report = bench.run(
            models, numbers(context, "--context", "1024,4096"), observe=lambda what: status.update(f"measuring {what}")
        )
    _print(report, as_json)
    if importlib.util.find_spec("matplotlib") is None:
        note(f"no picture: matplotlib is missing; {install('plots')} brings it")
        return
    bench.plot(report, plot)
    note(f"picture: {plot}")


@app.command()
def serve(
    model: Model = None,
    shape: Annotated[
        str, typer.Option(metavar="NAME", help="A standard shape, where no MODEL is named.")
    ] = SERVE_SHAPE,
    kv: Kv = None,
    part: Annotated[str, typer.Option(metavar="NAME,...", help="Of agent, throughput, structured.")] = SERVE_PARTS,
    prefix: Annotated[
        int, typer.Option(min=64, help="Tokens of the agent's instructions; 27000 for a coding agent's.")
    ] = 3000,
    turns: Annotated[int, typer.Option(min=1, help="Turns of the agent's main thread.")] = 12,
    unshared: Annotated[int, typer.Option(min=1, help="Turns that are also run without sharing.")] = 3,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each throughput.")] = 5,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also replay a trace in Mooncake's format.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first requests of the trace.")] = None,
    scale: Annotated[float, typer.Option(min=0.001, max=1.0, help="Shorten the trace's requests to this part.")] = 1.0,
    speed: Annotated[float, typer.Option(min=0.001, help="Replay the trace so many times as fast.")] = 1.0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """A server measured from outside: an agent's session with and without sharing, many streams, structured output."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import serve as bench
    from kvist.bench.models import random_model
    from kvist.service.loaded import open_model

    parts = part.split(",") if part else []
    if unknown := next((name for name in parts if name not in bench.PARTS), None):
        raise KvistError(f"there is no part {unknown!r}; choose among {', '.join(bench.PARTS)}")
    loaded = random_model(shape, "bf16", kv) if model is None else open_model(model, kv=kv)
    with Console(stderr=True).status("measuring", spinner="line") as status:
        report = bench.run(
            shape if model is None else loaded.name,
            loaded,
            parts,
            prefix=prefix,
            turns=turns,
            unshared=unshared,
            rounds=rounds,
            trace=trace,
            limit=limit,
            scale=scale,
            speed=speed,
            watch=lambda what: status.update(f"measuring · {what}"),
        )
    _print(report, as_json, wide=160)


@app.command()
def restart(
    shape: Annotated[str, typer.Option(metavar="NAME", help="A standard shape.")] = SERVE_SHAPE,
    kv: Kv = None,
    part: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of restart, writing, isolation.")
    ] = "restart,writing,isolation",
    prefix: Annotated[int, typer.Option(min=128, help="Tokens of the prompt; 27000 for a coding agent's.")] = 3000,
    tokens: Annotated[int, typer.Option(min=64, help="New tokens of each stream that is written behind.")] = 192,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of writing behind.")] = 7,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """A prompt computed, then found on disk by a new process: the time to its first token, and the same logits."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import restart as bench

    parts = part.split(",")
    if unknown := next((name for name in parts if name not in bench.PARTS), None):
        raise KvistError(f"there is no part {unknown!r}; choose among {', '.join(bench.PARTS)}")
    with Console(stderr=True).status("measuring", spinner="line") as status:
        report = bench.run(shape, kv, parts, prefix, tokens, rounds, lambda what: status.update(f"measuring · {what}"))
    _print(report, as_json, wide=160)


@app.command()
def vectors(
    data: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Sets of vectors; by default all that there are.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Vector search over 4 and 2 bits a number: recall, time to index and to search, beside faiss at equal bytes."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import vectors as bench

    if not bench.has_faiss():
        note(f"nothing to compare with: faiss is missing; {install('bench')} brings it")
    names = list(bench.DATA) if data is None else data.split(",")
    with Console(stderr=True).status("measuring", spinner="line") as status:
        report = bench.run(names, observe=lambda what: status.update(f"measuring {what}"))
    _print(report, as_json)


@app.command()
def products(
    shape: Shapes = DECODE_SHAPES,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each.")] = 7,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Products over packed weights: one row against the memory's read bandwidth, more rows beside oneDNN's."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import products as bench

    with Console(stderr=True).status("measuring", spinner="line") as status:
        report = bench.run(shape.split(","), rounds, lambda what: status.update(f"measuring {what}"))
    _print(report, as_json)


@app.command()
def start(
    shape: Shapes = SERVE_SHAPE,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="int8|int4|bf16", help="May be given several times; by default bf16, int8."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each.")] = 7,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """From starting kvist run to its first token, beside a bare import of torch."""
    prepare(threads)
    from rich.console import Console

    from kvist.bench import start as bench

    with Console(stderr=True).status("measuring", spinner="line") as status:
        observe = lambda what: status.update(f"measuring · {what}")  # noqa: E731
        report = bench.run(shape.split(","), weights or ["bf16", "int8"], rounds, observe)
    _print(report, as_json)


def _print(report: "Report", as_json: bool, wide: int = 140) -> None:
    from kvist.base.tables import output

    if as_json:
        print_json(report.to_json())
    else:
        report.print(output(wide))
