"""A small `kvist verify`, and random weights to run it on."""

from kvist.evals.verify import Verifier
from kvist.service.loaded import Loaded


def verify(loaded: Loaded, what: str, length: int = 160, steps: int = 3, trials: int = 2) -> None:
    """Raises `AssertionError` naming the checks that fail; see `Verifier`."""
    context = min(loaded.config.max_positions, length + 40)
    checks = list(Verifier(loaded, length=context - 40, steps=steps, trials=trials).run())
    failed = [check for check in checks if not check.passed]
    if failed:
        facts = ", ".join(f"{name} {value}" for name, value in failed[0].evidence.items())
        names = "; ".join(check.name for check in failed)
        raise AssertionError(f"{what} is not exact over the cache: {names} (the first: {facts})")
    for check in checks:
        if not check.compared:
            raise AssertionError(f"{what}: {check.name} compared nothing")
