"""How a model's makers propose to sample it: what its generation_config.json says is the default of whoever says
nothing, value by value."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvist.base.errors import ConfigError, KvistError, RequestError
from kvist.base.files import read_json
from kvist.runtime.request import Sampling

FILE = "generation_config.json"
_KINDS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
_PLAIN = Sampling(temperature=1.0)


@dataclass(frozen=True)
class Proposed:
    """Values as in `Sampling`; None where nothing is proposed."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def over(self, other: "Proposed") -> "Proposed":
        """What is proposed here, and else what `other` proposes."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return Proposed(**(asdict(other) | mine))

    def sampling(self, seed: int = 0) -> Sampling:
        """A sampling of it; what nobody proposes changes nothing. Raises `RequestError`."""

        def settled(name: str) -> Any:
            value = getattr(self, name)
            return getattr(_PLAIN, name) if value is None else value

        return Sampling(**{name: settled(name) for name in _KINDS}, seed=seed)

    def shown(self) -> dict[str, float]:
        """All values that are then in force."""
        sampling = self.sampling()
        return {name: getattr(sampling, name) for name in _KINDS}

    def __str__(self) -> str:
        """`temperature 0.6, top_p 0.9`; empty where nothing is proposed."""
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items() if value is not None)


def read_proposed(directory: Path) -> Proposed:
    """What the checkpoint in `directory` proposes. Raises `ConfigError` for a value that none can be."""
    path = directory / FILE
    if not path.exists():
        return Proposed()
    try:
        stated = read_json(path)
        found = Proposed(**{name: _number(stated, name, kind) for name, kind in _KINDS.items()})
        found.sampling()
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from None
    except KvistError as error:
        raise ConfigError(str(error)) from None
    return found


def _number(stated: dict[str, Any], name: str, kind: type[int] | type[float]) -> Any:
    value = stated.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(value) < 2**31 or (kind is int and value != int(value)):
        raise RequestError(f"{name} should be a number, got {value!r:.80}")
    return max(int(value), 0) if kind is int else float(value)  # a top_k of -1 means all tokens
