"""What every tier does: records come back byte for byte or not at all, whoever else is at work, within its budget."""

import random
import threading
import time
from collections.abc import Callable

from kvist.cache.tier import Buffer, Tier, TierError
from kvist.testing.claims import claiming, require

_SIZE = 3000  # bytes of a record
_THREADS, _STEPS = 6, 60
MakeTier = Callable[[], Tier]


def check_tier(make: MakeTier, *, budget: int | None = None, broken: MakeTier | None = None) -> None:
    """`make` gives a tier that is empty, or that has none of the names used here; it is called once. `budget`: bytes
    that it keeps at most, a few tens of kilobytes, so that it is filled quickly. `broken`: gives one whose store is
    gone. Seconds, as quick as the tier."""
    tier = make()
    for check in (check_records, check_unknown, check_threads):
        with claiming(tier.name, check.__doc__):
            check(tier)
    if budget is not None:
        with claiming(tier.name, check_budget.__doc__):
            check_budget(tier, budget)
    if broken is not None:
        check_broken(broken())


def check_records(tier: Tier) -> None:
    """What is put is there: in pieces or not, and until it is removed."""
    record, name, until = _record(1), _name(1), time.time() + 60
    pieces: list[Buffer] = [record[:100], b"", bytearray(record[100:101]), memoryview(record)[101:]]
    require(tier.put(name, pieces, until), f"{tier.name}: an empty tier refuses a record")
    require(tier.contains(name) is not False, f"{tier.name}: `contains` denies a record that was put")
    require(tier.probe(name), f"{tier.name}: `probe` denies a record that was put")
    require(_get(tier, name, _SIZE) == record, f"{tier.name}: a record does not come back byte for byte")
    short = _get(tier, name, 10)
    require(short is None or len(short) <= 11, f"{tier.name}: `get` gives more than one byte beyond the size asked for")
    whole = short is None or record.startswith(short)
    require(whole, f"{tier.name}: `get` gives other bytes where fewer are asked for")
    require(short is None or len(short) > 10, f"{tier.name}: `get` cuts what is too long so that it seems right")
    require(tier.put(name, (record,), until + 60), f"{tier.name}: a record that is there is refused")
    require(_get(tier, name, _SIZE) == record, f"{tier.name}: a record does not come back after it was put twice")
    for end in (until, float("inf"), until):
        tier.pin([name, _name(2)], end)
    require(_get(tier, name, _SIZE) == record, f"{tier.name}: a record does not come back after it was pinned")
    tier.remove(name)
    gone = _get(tier, name, _SIZE) is None and not tier.probe(name)
    require(gone, f"{tier.name}: a record is there after it was removed")


def check_unknown(tier: Tier) -> None:
    """Names that are not there are no error."""
    name = _name(3)
    require(not tier.contains(name), f"{tier.name}: `contains` knows a record that was never put")
    require(not tier.probe(name), f"{tier.name}: `probe` finds a record that was never put")
    require(_get(tier, name, _SIZE) is None, f"{tier.name}: `get` gives a record that was never put")
    tier.pin([name], time.time())
    tier.remove(name)


def check_threads(tier: Tier) -> None:
    """Several threads put, read and remove the same few records: each is whole, and its own."""
    wrong = list[str]()
    found = [0] * _THREADS

    def work(place: int) -> None:
        rng = random.Random(place)
        try:
            for step in range(_STEPS):
                number = 10 + rng.randrange(6)
                if step % 3 == 0:
                    tier.put(_name(number), (_record(number),), time.time() + 60)
                elif step % 20 == 7:
                    tier.remove(_name(number))
                elif (record := _get(tier, _name(number), _SIZE)) is not None:
                    found[place] += 1
                    if record != _record(number):
                        wrong.append("a record that several threads write does not come back byte for byte")
        except Exception as error:
            wrong.append(f"threads beside each other make it fail: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(place,)) for place in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not wrong, f"{tier.name}: {next(iter(wrong), None)}")
    require(sum(found) > 0, f"{tier.name}: of several threads none finds what another has put")
    for number in range(10, 16):
        tier.remove(_name(number))


def check_budget(tier: Tier, budget: int) -> None:
    """More records than it has room for: it keeps some, and no more than that; what it says it keeps can be read."""
    numbers = range(100, 100 + 3 * budget // _SIZE)
    require(len(numbers) > 5, f"{tier.name}: a budget of {budget} bytes holds too few records of {_SIZE} to try it")
    for number in numbers:
        kept = tier.put(_name(number), (_record(number),), time.time() + number)
        if kept:
            there = _get(tier, _name(number), _SIZE) == _record(number)
            require(there, f"{tier.name}: a record that it says it keeps is not there")
        else:
            require(_get(tier, _name(number), _SIZE) is None, f"{tier.name}: a record that it refuses is there")
    left = [number for number in numbers if _get(tier, _name(number), _SIZE) is not None]
    require(bool(left), f"{tier.name}: once it is full it keeps nothing")
    most = len(left) * _SIZE
    require(most <= budget, f"{tier.name}: it keeps {most} bytes of records, and {budget} are the most")
    for number in numbers:
        tier.remove(_name(number))


def check_broken(tier: Tier) -> None:
    """Its store is gone: whatever is asked raises `TierError`, or nothing is there."""
    name, record = _name(1), _record(1)
    acts: dict[str, Callable[[], object]] = {
        "contains": lambda: tier.contains(name),
        "probe": lambda: tier.probe(name),
        "get": lambda: tier.get(name, _SIZE),
        "put": lambda: tier.put(name, (record,), time.time()),
        "pin": lambda: tier.pin([name], time.time()),
        "remove": lambda: tier.remove(name),
    }
    for act, ask in acts.items():
        try:
            found = ask()
        except TierError as error:
            require("\n" not in str(error), f"{tier.name}: `{act}` fails with more than one line")
            continue
        except Exception as error:
            raise AssertionError(
                f"{tier.name}: `{act}` of one that is gone raises {type(error).__name__}, which is no TierError"
            ) from error
        require(not found, f"{tier.name}: `{act}` of one that is gone says that something is there")


def _get(tier: Tier, name: str, size: int) -> bytes | None:
    found = tier.get(name, size)
    return None if found is None else bytes(found)


def _name(number: int) -> str:
    """As blocks are called: two digests in hexadecimal."""
    return f"{'c' * 32}/{number:064x}"


def _record(number: int) -> bytes:
    return bytes(range(256)) + random.Random(number).randbytes(_SIZE - 256)
