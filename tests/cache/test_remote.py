"""A store that machines share: gone, slow, lying; and a real one."""

import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvist.base.errors import ConfigError
from kvist.cache.kept import Fetch, KeptCache
from kvist.cache.keys import root_key
from kvist.cache.record import BlockId, Loss, header, record_bytes
from kvist.cache.remote import PREFIX, RemoteTier
from kvist.cache.tier import TierError

SIZE, PAYLOAD = 16, 3000
RECORD = record_bytes(SIZE, PAYLOAD)
ROOT = root_key(b"remote", "")


def block_of(number: int, parent: bytes = ROOT) -> tuple[BlockId, bytes]:
    tokens = tuple(range(number, number + SIZE))
    return BlockId.after(ROOT, parent, tokens), random.Random(number).randbytes(PAYLOAD)


@contextmanager
def answering(*replies: bytes | float | None) -> Iterator[str]:
    """A server that gives each request the same reply, in these pieces, with waits between them; None: it hangs up."""
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(0.1)
            while not stop.is_set():
                try:
                    asked = connection.recv(1 << 16)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not asked:
                    return
                if b"CLIENT" in asked or b"HELLO" in asked:
                    connection.sendall(b"+OK\r\n" * asked.count(b"*"))
                    continue
                for reply in replies:
                    if reply is None:
                        return
                    if isinstance(reply, float):
                        stop.wait(reply)
                        continue
                    try:
                        connection.sendall(reply)
                    except OSError:
                        return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)

        def accept() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield f"redis://127.0.0.1:{listening.getsockname()[1]}?protocol=2"
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


def fetched(kept: KeptCache, blocks: list[BlockId]) -> tuple[Fetch, list[BlockId]]:
    fetch, found, end = kept.fetch(blocks, 0), list[BlockId](), time.monotonic() + 20
    while not fetch.ended:
        assert time.monotonic() < end
        kept.wait([fetch], 0.1)
        while fetch.ready:
            found.append(kept.take(fetch).block)
    return fetch, found


@pytest.mark.parametrize("url", ["http://x", "redis:/", "file:///etc/passwd", "", "redis://[::1", "redis://h:no"])
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises((ConfigError, TierError)):
        RemoteTier(url).get("a" * 32 + "/" + "b" * 64, 10)


def test_a_password_is_never_told() -> None:
    for url in ("ftp://user:hush@host/0", "redis://user:hush@127.0.0.1:9/0", "redis://user:hush@127.0.0.1:no/0"):
        with pytest.raises((ConfigError, TierError)) as found:
            RemoteTier(url).get("x", 10)
        assert "hush" not in str(found.value)


def test_a_record_comes_back() -> None:
    block, planes = block_of(1)
    with answering(bulk(header(block, planes) + planes)) as url:
        kept = KeptCache([RemoteTier(url)], PAYLOAD)
        assert fetched(kept, [block])[1] == [block]
        assert kept.counters.hits["remote"] == 1
        kept.close()


@pytest.mark.parametrize(
    "replies",
    [
        (None,),
        (bulk(b"x" * RECORD),),
        (bulk(b"x" * (RECORD + 1)),),
        (bulk(b""),),
        (b"$-1\r\n",),
        (b"$99999999\r\nabc",),
        (b"-OOM command not allowed\r\n",),
        (b"-NOAUTH Authentication required.\r\n",),
        (b"nonsense\r\n",),
        (b"$10\r\nabc", None),
        (b":5\r\n",),
        (b"*2\r\n$1\r\na\r\n$1\r\nb\r\n",),
        (5.0, b"$-1\r\n"),
    ],
)
def test_whatever_it_answers_nothing_wrong_is_read_and_soon(replies: tuple[bytes | float | None, ...]) -> None:
    blocks = [block_of(1)[0]]
    with answering(*replies) as url:
        kept = KeptCache([RemoteTier(url)], PAYLOAD)
        started = time.monotonic()
        _, found = fetched(kept, blocks)
        assert found == []
        assert time.monotonic() - started < 3
        kept.close()


def test_random_answers_are_never_blocks() -> None:
    rng, block = random.Random(5), block_of(1)[0]
    for _ in range(40):
        with answering(rng.randbytes(rng.randrange(1, 300)), None) as url:
            kept = KeptCache([RemoteTier(url, timeout=0.1)], PAYLOAD)
            assert fetched(kept, [block])[1] == []
            kept.close()


def test_one_that_is_gone_is_asked_once_and_then_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    kept = KeptCache([RemoteTier(f"redis://127.0.0.1:{port}")], PAYLOAD)
    block, planes = block_of(1)
    assert kept.has(block)
    assert fetched(kept, [block])[1] == []
    assert kept.counters.failures["remote", "read"] == 1
    assert not kept.has(block)
    kept.save(block, planes, 0.0)
    assert kept.flush(10)
    assert kept.counters.failures["remote", "write"] == 1
    kept.close()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[str]:
    """A server of Debian's packages, on a socket of its own."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("no valkey-server and no redis-server; Debian's package redis-server has one")
    path = tmp_path / "socket"
    command = [program, "--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path), "--save", ""]
    with subprocess.Popen([*command, "--maxmemory", "4mb"], stdout=subprocess.DEVNULL) as server:
        end = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        yield f"unix://{path}"
        server.terminate()


@pytest.mark.slow
def test_a_real_store(real: str) -> None:
    tier = RemoteTier(real)
    block, planes = block_of(1)
    record = header(block, planes) + planes
    assert tier.get(block.name, RECORD) is None
    assert not tier.probe(block.name)
    assert tier.put(block.name, (header(block, planes), planes), 0.0)
    assert tier.probe(block.name)
    assert tier.get(block.name, RECORD) == record
    assert tier.get(block.name, 10) == record[:11]  # one byte too many tells that it is longer
    week = 7 * 86_400
    assert week - 5 < tier._client.ttl(PREFIX + block.name) <= week
    tier.pin([block.name, "missing"], time.time() + 2 * week)
    assert tier._client.ttl(PREFIX + block.name) > 2 * week - 5
    tier.pin([block.name], float("inf"))
    assert tier._client.ttl(PREFIX + block.name) == -1
    tier.remove(block.name)
    assert tier.get(block.name, RECORD) is None


@pytest.mark.slow
def test_two_caches_share_a_real_store_and_survive_its_end(real: str) -> None:
    blocks, parent = list[tuple[BlockId, bytes]](), ROOT
    for number in range(50):
        blocks.append(block_of(number, parent))
        parent = blocks[-1][0].key
    one, two = (KeptCache([RemoteTier(real)], PAYLOAD) for _ in range(2))
    for block, planes in blocks:
        one.save(block, planes, time.time())
    assert one.flush(10)
    ids = [block for block, _ in blocks]
    assert fetched(two, ids)[1] == ids
    assert two.counters.hits["remote"] == 50
    # Somebody writes into it what is none of ours.
    RemoteTier(real)._client.set(PREFIX + ids[10].name, b"not a block")
    assert fetched(two, ids)[1] == ids[:10]
    assert two.counters.losses["remote", Loss.TRUNCATED] == 1
    # It is full: what cannot be written is counted, and nothing else happens.
    for number in range(100, 2000):
        while not one.has_room:
            time.sleep(0.001)
        one.save(*block_of(number), time.time())
    assert one.flush(60)
    assert one.counters.failures["remote", "write"] >= 1
    for cache in (one, two):
        cache.close()
