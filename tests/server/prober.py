"""Asks `/health` again and again, from a process of its own, which no client's work holds up.

Each line says when one was asked (seconds of the machine's clock), how long its answer took, and its status.
"""

import bisect
import contextlib
import http.client
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

PAUSE = 0.02  # seconds between two


class Probe(NamedTuple):
    """One answer: when it was asked for, how many seconds it took, and its status (0: there was none)."""

    start: float
    seconds: float
    status: int


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
def probing(port: int) -> Iterator[list[Probe]]:
    """Probes for as long as the block runs; what came of them is in the list afterwards."""
    probes: list[Probe] = []
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
                    probes.append(Probe(float(start), float(seconds), int(status)))


def slowest(probes: Sequence[Probe], spans: Sequence[tuple[float, float]]) -> tuple[int, float, float]:
    """Of those under way during any of the spans (from, to): how many, the seconds that 99 of 100 took at most, and of
    the worst."""
    apart = list[list[float]]()  # the spans without their overlaps, in order
    for start, end in sorted(spans):
        if apart and start <= apart[-1][1]:
            apart[-1][1] = max(apart[-1][1], end)
        else:
            apart.append([start, end])
    met = list[float]()
    for probe in probes:
        later = bisect.bisect_right(apart, probe.start, key=lambda span: span[1])  # the first that ends after it began
        if later < len(apart) and apart[later][0] < probe.start + probe.seconds:
            met.append(probe.seconds)
    most = statistics.quantiles(met, n=100, method="inclusive")[-1] if len(met) > 1 else 0.0
    return len(met), most, max(met, default=0.0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
