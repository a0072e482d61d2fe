"""Names of models: directories first, then a hub; the hub here is a stand-in on loopback."""

import hashlib
import json
import os
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvist.base.errors import ModelNotFound
from kvist.weights.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "pytorch_model.bin": b"a duplicate",
    "original/consolidated.safetensors": b"a duplicate",
    "README.md": b"# a model",
    "model-Q8_0.gguf": b"GGUF and so on",
    "model-Q4_0.gguf": b"GGUF and so on, smaller",
    "split-00001-of-00002.gguf": b"GGUF, one",
    "split-00002-of-00002.gguf": b"GGUF, two",
    "Q8/large-00001-of-00002.gguf": b"GGUF, in a folder",
    "Q8/large-00002-of-00002.gguf": b"GGUF, beside it",
    "lost-00001-of-00002.gguf": b"GGUF, alone",
}


class StandInHub(BaseHTTPRequestHandler):
    """The hub's endpoints that a snapshot needs: a revision's commit, its files, each file's content."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        path = self.path.split("?")[0].removesuffix("/revision/main")
        if path == "/api/models/org/gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models/org/small/revision/absent":
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path in ("/api/models/org/small", f"/api/models/org/small/revision/{COMMIT}"):
            self._send(200, json.dumps({"id": "org/small", "sha": COMMIT, "siblings": []}).encode(), {})
        elif path == f"/api/models/org/small/tree/{COMMIT}":
            self._send(200, json.dumps([self._entry(name) for name in FILES]).encode(), {})
        elif path.startswith(f"/org/small/resolve/{COMMIT}/"):
            content = FILES[path.split(f"{COMMIT}/")[1]]
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _entry(self, name: str) -> dict[str, object]:
        content = FILES[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are kept in the server's list, not printed."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInHub)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


RESOLVE_PROGRAM = """
import json, sys
from kvist.base.errors import ModelNotFound
from kvist.weights.hub import resolve, resolve_file
for name in sys.argv[1:]:
    try:
        found = resolve_file(name, progress=True)
        print(json.dumps(["found", str(found or resolve(name, progress=True))]))
    except ModelNotFound as error:
        print(json.dumps(["refused", str(error)]))
"""


def environment(home: Path, endpoint: str, offline: bool = False) -> dict[str, str]:
    """This process's, without proxies, with the hub at `endpoint` and its cache under `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    kept = {key: value for key, value in kept.items() if not key.startswith("HF_")}
    kept |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    return kept | ({"HF_HUB_OFFLINE": "1"} if offline else {})


def resolve_elsewhere(home: Path, endpoint: str, *names: str, offline: bool = False) -> list[list[str]]:
    """Resolve `names` in a process of its own: the library reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE_PROGRAM, *names],
        env=environment(home, endpoint, offline),
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "%|" not in done.stderr  # stderr is a pipe here: no progress bar
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_one_gguf_file_of_a_repository(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    found, absent = resolve_elsewhere(tmp_path, endpoint, "org/small/model-Q8_0.gguf", "org/small/model-Q2_K.gguf")
    assert found[0] == "found"
    assert Path(found[1]).read_bytes() == FILES["model-Q8_0.gguf"]
    assert {path.name for path in Path(found[1]).parent.iterdir()} == {"model-Q8_0.gguf"}, "and nothing else of it"
    assert absent == ["refused", "org/small holds no model-Q2_K.gguf; choose one of its *.gguf files"]
    (again,) = resolve_elsewhere(tmp_path, endpoint, "org/small/model-Q8_0.gguf", offline=True)
    assert again == found


def test_all_parts_of_a_model_that_is_split(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    names = ("split-00001-of-00002.gguf", "Q8/large-00001-of-00002.gguf", "lost-00001-of-00002.gguf")
    plain, within, lost = resolve_elsewhere(tmp_path, endpoint, *(f"org/small/{name}" for name in names))
    for found, name in zip((plain, within), names, strict=False):
        assert found[0] == "found"
        assert found[1].endswith(name)
        second = name.replace("00001-of", "00002-of")
        assert Path(found[1]).with_name(Path(second).name).read_bytes() == FILES[second]
    assert lost == ["refused", "org/small holds no lost-00002-of-00002.gguf; choose one of its *.gguf files"]


def test_a_model_is_downloaded_once_and_then_read_offline(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    first, gated, private, revision = resolve_elsewhere(
        tmp_path, endpoint, "org/small", "org/gated", "org/secret", "org/small@absent"
    )
    assert first[0] == "found"
    folder = Path(first[1])
    assert folder.is_relative_to(tmp_path / "hub")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = ("config.json", "tokenizer.json", "model.safetensors")
    assert found == {name: FILES[name] for name in wanted}
    assert any("resolve" in path for path in hub.requests)

    assert gated == [
        "refused",
        f"org/gated is gated: accept its terms at {endpoint}/org/gated and set HF_TOKEN",
    ]
    assert private[0] == "refused"
    assert f"{endpoint} has none of that name" in private[1]
    assert revision == ["refused", f"org/small has no revision 'absent' on {endpoint}"]

    hub.requests.clear()
    names = ("org/small", f"org/small@{COMMIT}", "org/other")
    cached, pinned, absent = resolve_elsewhere(tmp_path, endpoint, *names, offline=True)
    assert cached == pinned == ["found", str(folder)]
    assert absent[0] == "refused"
    assert absent[1].endswith(f"it is not in {tmp_path / 'hub'}; unset HF_HUB_OFFLINE to download it")
    assert hub.requests == []

    unreachable = resolve_elsewhere(tmp_path, "http://127.0.0.1:9", "org/small")
    assert unreachable == [["found", str(folder)]]


def test_progress_is_shown_on_a_terminal(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    subprocess.run(
        [sys.executable, "-c", RESOLVE_PROGRAM, "org/small"],
        env=environment(tmp_path, f"http://127.0.0.1:{hub.server_port}"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        check=True,
        timeout=60,
    )
    os.close(terminal)
    shown = os.read(controller, 1 << 16)
    os.close(controller)
    assert b"%|" in shown


def test_a_hub_out_of_reach_is_said_quickly_and_in_one_line(tmp_path: Path) -> None:
    start = time.monotonic()
    ((verdict, message),) = resolve_elsewhere(tmp_path, "http://127.0.0.1:9", "org/small")
    assert time.monotonic() - start < 15
    assert verdict == "refused"
    assert re.fullmatch(
        r"org/small is no directory here, and fetching it from http://127\.0\.0\.1:9 failed \(.*refused.*\); "
        r"check the network, or give a directory",
        message,
    )


def test_a_directory_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "small").mkdir(parents=True)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert resolve("org/small", progress=False) == Path("org/small")
    assert resolve(str(tmp_path / "org"), progress=False) == tmp_path / "org"
    for name in ("./absent", "/absent/here", "a/b/c", "absent", "../absent", "~/absent-folder", "a/b@", ""):
        with pytest.raises(ModelNotFound, match=re.escape(f"no such directory: {name}")):
            resolve(name, progress=False)
    with pytest.raises(ModelNotFound, match=r"weights\.bin is a file"):
        resolve("weights.bin", progress=False)


def test_the_hub_library_is_imported_only_when_it_is_needed() -> None:
    program = "import sys, kvist.weights.hub; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
