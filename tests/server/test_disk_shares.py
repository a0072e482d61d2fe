"""Tenants that share a server's disk over HTTP: whoever has all of it held for a day leaves the others their parts."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.cache.record import record_bytes
from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from kvist.service.calibration import TEXT as WORDS
from kvist.service.keeping import KeepSettings, Kept, open_kept
from kvist.service.loaded import open_model
from kvist.service.serving import Serving
from kvist.service.tenants import Tenant
from live import live

TEXT = WORDS.read_text("utf-8")[:1500]
TENANTS = {"key-a": Tenant("a"), "key-b": Tenant("b"), "key-op": Tenant("op", operator=True)}
BLOCKS = 60  # that the disk has room for: a third of them is each tenant's part


@contextmanager
def server(model: Path, folder: Path, shared: bool) -> Iterator[tuple[str, Kept]]:
    """A server whose disk is small, and whose tenants have their parts of it, or not; and what it keeps."""
    with ExitStack() as stack:
        loaded = open_model(str(model))
        size = record_bytes(loaded.layout.block_size, loaded.layout.block_bytes)
        kept = stack.enter_context(open_kept(loaded, KeepSettings(folder, BLOCKS * size)))
        budget = loaded.budget(loaded.layout.store_bytes(256, 0, 0), 4)
        engine = loaded.engine(budget, kept)
        settings = ServerSettings(api_keys=tuple(TENANTS), tenants=TENANTS)
        serving = Serving(loaded, engine, name="tiny", tenants=tuple(TENANTS.values()), kept=kept)
        if shared:
            kept.share({tenant.id: None for tenant in TENANTS.values()}, serving.manager)
        yield stack.enter_context(live(create_app(serving, settings), serving, settings)).url, kept


def ask(url: str, method: str, path: str, key: str, body: Any = None) -> httpx.Response:
    return httpx.request(method, url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def fill(url: str, kept: Kept, number: int) -> None:
    """Have `key-a` hold as much as it can for a day."""
    for part in range(4):
        prompt = f"{number} {part} " + WORDS.read_text("utf-8")[:3300]
        body = {"prompt": prompt, "max_tokens": 1, "prompt_cache_retention": "24h"}
        found = ask(url, "POST", "/v1/completions", "key-a", body)
        assert found.status_code == 200, found.text
        blocks = found.json()["usage"]["prompt_tokens"] // 64
        assert blocks > BLOCKS / 4
    size = kept.disk.budget // BLOCKS
    wait_until(lambda: kept.disk.used > kept.disk.budget - 4 * size)


@pytest.mark.parametrize("shared", [True, False])
def test_what_one_tenant_holds_for_a_day_leaves_another_its_part(
    tiny_model: Path, tmp_path: Path, shared: bool
) -> None:
    with server(tiny_model, tmp_path, shared) as (url, kept):
        fill(url, kept, 1)
        held, refused = {name[:32] for name in kept.disk._entries}, kept.disk.refused
        asked = {"prompt": TEXT[::-1], "max_tokens": 1}
        assert ask(url, "POST", "/v1/completions", "key-b", asked).status_code == 200

        def kept_of_others() -> int:
            return sum(name[:32] not in held for name in list(kept.disk._entries))

        if not shared:  # as it would be without parts: so the disk was held, indeed
            wait_until(lambda: kept.disk.refused > refused)
            assert not kept_of_others()
            return
        wait_until(lambda: kept_of_others() > 3)
        made = ask(url, "POST", "/v1/contexts", "key-b", {"name": "book", "text": TEXT, "form": "text"})
        assert made.status_code == 200, made.text
        assert made.json()["blocks"] == made.json()["blocks_on_disk"] > 3
        fill(url, kept, 2)  # nor does it go afterwards
        assert ask(url, "GET", "/v1/contexts/book", "key-b").json() == made.json()
        asked = {"prompt": " And", "max_tokens": 2, "context": "book"}
        assert ask(url, "POST", "/v1/completions", "key-b", asked).status_code == 200


def test_metrics_name_the_tier_that_a_prompt_was_read_from(tiny_model: Path, tmp_path: Path) -> None:
    body = {"prompt": TEXT, "max_tokens": 1}
    with server(tiny_model, tmp_path, True) as (url, kept):
        first = ask(url, "POST", "/v1/completions", "key-a", body).json()
        assert first["kvist"]["cached"] == {}
        wait_until(lambda: len(kept.disk) >= first["usage"]["prompt_tokens"] // 64)
    with server(tiny_model, tmp_path, True) as (url, _):
        for tier in ("disk", "memory"):
            found = ask(url, "POST", "/v1/completions", "key-a", body).json()["kvist"]["cached"]
            assert list(found) == [tier]
            assert found[tier] > 300
            lines = ask(url, "GET", "/metrics", "key-op").text.splitlines()
            (line,) = (one for one in lines if one.startswith(f'kvist:prefix_cache_tokens_total{{tier="{tier}"}}'))
            assert float(line.split()[-1]) == found[tier]
        (line,) = (one for one in lines if one.startswith('kvist:kept_blocks_read_total{tier="disk"}'))
        assert float(line.split()[-1]) > 4
