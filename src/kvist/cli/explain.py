"""`kvist explain` and `kvist tax`: ask a running server why a prompt was computed, and what a session pays."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

import typer

from kvist.base.errors import KvistError
from kvist.base.units import format_duration, plural
from kvist.cli.keys import KEY_VARIABLE
from kvist.cli.options import Json, print_json

DEFAULT_URL = "http://127.0.0.1:8000"
_PARTS = 20

Url = Annotated[str, typer.Option(metavar="URL", help=f"The server; its key, if it has any, in {KEY_VARIABLE}.")]


def explain(
    id: Annotated[str, typer.Argument(metavar="ID", help="Of an answer (chatcmpl-..., msg_...) or its request.")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Why was this prompt computed again? What was read from where, and what differs from the nearest earlier one."""
    found = _ask(url, f"v1/cache/explain/{quote(id, safe='')}", {})
    if as_json:
        print_json(found)
        return
    _show_explanation(found)


def tax(
    session: Annotated[
        str | None, typer.Option(metavar="KEY", help="A prompt_cache_key; by default the last request's session.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """What a session pays for its prompts: what stays, what changes, what each tool costs, what breaks the cache."""
    found = _ask(url, "v1/cache/tax", {} if session is None else {"session": session})
    if as_json:
        print_json(found)
        return
    _show_tax(found)


def _ask(url: str, path: str, query: Mapping[str, str]) -> dict[str, Any]:
    import httpx

    key = os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    try:
        response = httpx.get(f"{base}/{path}", params=dict(query), headers=headers, timeout=30)
        value = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise KvistError(f"cannot ask {base}: {error or type(error).__name__}; is kvist serve running?") from None
    except ValueError:
        raise KvistError(f"{base} does not answer as kvist serve does") from None
    if response.status_code != 200:
        reason = value.get("error", {}).get("message") if isinstance(value, dict) else None
        raise KvistError(reason or f"the server answers {response.status_code}")
    if not isinstance(value, dict):
        raise KvistError(f"{base} does not answer as kvist serve does")
    return value


def _show_explanation(found: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from kvist.base.tables import output, show

    console = output()
    say = partial(console.print, markup=False, highlight=False)  # much of it is from clients
    cached = " + ".join(f"{count:,} from {tier}" for tier, count in found["cached"].items()) or "none cached"
    say(f"{plural(found['prompt_tokens'], 'prompt token')}: {cached}, {found['computed']:,} computed")
    say(f"{found['reason']}: {found['why']}")
    if found["again"] and found["again_seconds"] is not None:
        seconds = format_duration(found["again_seconds"])
        say(f"paid again: {plural(found['again'], 'token')} that an earlier request had, about {seconds}")
    elif found["again"] is None:
        say("paid again: unknown")
    if found["nearest"] is not None:
        say(f"nearest earlier request: {found['nearest']}, alike in its first {found['common']:,} tokens")
    if (difference := found["difference"]) is not None:
        table = Table("", "where", "text", "token", box=None, pad_edge=False)
        for name in ("earlier", "now"):
            side = difference[name]
            line = "" if side["line"] is None else f", line {side['line']}, column {side['column']}"
            text = Text(_shown(side["before"][-30:])) + Text(_shown(side["after"][:40]) or "(its end)", style="bold")
            token = Text("" if side["token"] is None else repr(side["token"]))
            table.add_row(name, Text(_shown(side["where"]) + line), text, token)
        say(f"the first difference, at token {difference['token']:,}:")
        show(console, table)
    if found["note"] is not None:
        say(found["note"])


def _show_tax(found: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from kvist.base.tables import output, show

    console = output()
    say = partial(console.print, markup=False, highlight=False)
    name = "the last session" if found["session"] is None else f"session {_shown(found['session'])}"
    say(f"{name}: {plural(found['requests'], 'request')}, {plural(found['prompt_tokens'], 'prompt token')}")
    share = found["cached"] / max(found["cached"] + found["computed"], 1)
    say(
        f"{found['cached']:,} read from the cache ({share:.1%}), {found['computed']:,} computed where "
        f"{found['necessary']:,} were necessary, {found['again']:,} of them paid again "
        f"({format_duration(found['again_seconds'])})"
    )
    say(
        f"stable prefix: {plural(found['stable'], 'token')}; behind it, in the median prompt, "
        f"{plural(found['changing'], 'token')} that change"
    )
    breaks = Table("what breaks the cache", box=None, pad_edge=False)
    for heading in ("times", "tokens again", "time"):
        breaks.add_column(heading, justify="right")
    for one in found["breaks"]:
        again, seconds = f"{one['again']:,}", format_duration(one["seconds"])
        breaks.add_row(Text(_shown(one["what"])), str(one["times"]), again, seconds)
    if found["breaks"]:
        show(console, breaks)
    parts = Table("part of the last prompt", box=None, pad_edge=False)
    parts.add_column("tokens", justify="right")
    for one in sorted(found["parts"], key=lambda part: -part["tokens"])[:_PARTS]:
        parts.add_row(Text(_shown(one["label"])), f"{one['tokens']:,}")
    if found["parts"]:
        show(console, parts)


def _shown(text: str) -> str:
    """On one line, and nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else {"\n": "\\n", "\t": "\\t"}.get(c, "?") for c in text)
