"""How a claim that does not hold is told: an `AssertionError` of one line."""

from collections.abc import Iterator
from contextlib import contextmanager


def require(condition: bool, message: str) -> None:
    """Not an `assert`, which an optimizing interpreter leaves out."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def claiming(what: str, claim: str | None) -> Iterator[None]:
    """Whatever else is raised within it speaks against `claim`, of which the first sentence is told, about `what`."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        said = " ".join((claim or "").split()).partition(":")[0].partition(".")[0]
        words = " ".join(str(error).split())
        raise AssertionError(f"{what}: {said[:1].lower()}{said[1:]}: {type(error).__name__}: {words}") from error
