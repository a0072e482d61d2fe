"""Asks `/health` again and again, from a process of its own, which no client's work holds up.

Each line says when one was asked (seconds of the machine's clock), how long its answer took, and its status.
"""

import contextlib
import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

PAUSE = 0.02  # seconds between two


def main(port: int) -> None:
    while True:
        start = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        except OSError:
            status = 0
        connection.close()
        print(start, time.monotonic() - start, status, flush=True)
        time.sleep(PAUSE)


@contextlib.contextmanager
def probing(port: int) -> Iterator[list[tuple[float, float, int]]]:
    """Probes for as long as the block runs; what came of them is in the list afterwards."""
    probes: list[tuple[float, float, int]] = []
    with tempfile.TemporaryFile("w+") as lines:
        process = subprocess.Popen([sys.executable, __file__, str(port)], stdout=lines)
        try:
            yield probes
        finally:
            process.kill()
            process.wait()
            lines.seek(0)
            for line in lines:
                if line.endswith("\n"):
                    start, seconds, status = line.split()
                    probes.append((float(start), float(seconds), int(status)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
