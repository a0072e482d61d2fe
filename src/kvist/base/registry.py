"""What a name stands for: things of ours, of packages that are installed, and of the program itself.

A name of ours, or of the program, is found at once. Only when it is none of these, or when all names are listed, is the
metadata of installed packages read (their entry points); and what they offer is imported when it is asked for by name.
So a package that offers a name of ours is never used; whoever lists all names is told of it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar

from kvist.base.errors import PluginError, brief

T = TypeVar("T")


@dataclass(frozen=True)
class Registered(Generic[T]):
    """`version`: that of whoever made it; None where it is ours. `package`: that brought it; None: the program."""

    value: T
    version: str | None = None
    package: str | None = None

    @property
    def origin(self) -> str:
        """Who made it, in words."""
        if self.version is None:
            return "Kvist"
        return f"{'this program' if self.package is None else self.package} {self.version}"


class Registry(Mapping[str, T]):
    """`what`: one of them, in words; `group`: of entry points. `refusal`: why a thing cannot have that name, or None;
    not asked of ours. As a mapping it has all names, ours first; looking one up, or listing them, raises `PluginError`.
    """

    def __init__(self, what: str, group: str, refusal: Callable[[str, Any], str | None]) -> None:
        self._what = what
        self._group = group
        self._refusal = refusal
        self._known: dict[str, Registered[T]] = {}

    def register(self, name: str, value: T, version: str | None = None) -> None:
        """`version`: None for what is ours. The same thing may be registered again, and changes nothing. Raises
        `PluginError` for a name that is taken, and for what is refused."""
        new = Registered(value, version)
        if version is not None:
            if not isinstance(version, str) or not version.isprintable() or not 0 < len(version) <= 64:
                raise PluginError(f"a version is a text of at most 64 characters, as '1'; got {brief(version)}")
            if self._known.get(name) == new:
                return
            self._check(name, new)
            for point in self._offered():
                if point.name == name:
                    raise self._taken(name, _origin(point))
        if name in self._known:
            raise self._taken(name, self._known[name].origin)
        self._known[name] = new

    def find(self, name: str) -> Registered[T] | None:
        """What has that name; None where nothing has. Raises `PluginError` where it cannot be imported or is refused,
        and where two packages offer it."""
        if (known := self._known.get(name)) is not None:
            return known
        offers = [point for point in self._offered() if point.name == name]
        if not offers:
            return None
        if len(offers) > 1:
            raise self._several(name, offers)
        return self._known.setdefault(name, self._load(offers[0]))

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """Who made those of `names` that are neither ours nor unknown: part of what was made with them."""
        found = {name: self._known[name] for name in sorted(set(names)) if name in self._known}
        return {name: known.origin for name, known in found.items() if known.version is not None}

    def __getitem__(self, name: str) -> T:
        if (found := self.find(name)) is None:
            raise KeyError(name)
        return found.value

    def __iter__(self) -> Iterator[str]:
        points = self._offered()
        counts = Counter(point.name for point in points)
        for point in points:
            known = self._known.get(point.name)
            if known is not None and known.package is None:
                raise self._taken(point.name, known.origin, _origin(point))
            if counts[point.name] > 1:
                raise self._several(point.name, points)
        return iter([*self._known, *sorted(counts.keys() - self._known.keys())])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _offered(self) -> metadata.EntryPoints:
        return metadata.entry_points(group=self._group)

    def _load(self, point: metadata.EntryPoint) -> Registered[T]:
        try:
            value = point.load()
        except Exception as error:
            raise PluginError(
                f"the {self._what} {point.name!r} of {_origin(point)} cannot be imported: {type(error).__name__}: "
                f"{_line(error)}"
            ) from error
        assert point.dist is not None, "it was found in the metadata of a package"
        found = Registered[T](value, point.dist.version, point.dist.name)
        self._check(point.name, found)
        return found

    def _check(self, name: str, new: Registered[T]) -> None:
        try:
            reason = self._refusal(name, new.value)
        except Exception as error:
            raise PluginError(
                f"the {self._what} {brief(name)} of {new.origin} fails: {type(error).__name__}: {_line(error)}"
            ) from error
        if reason is not None:
            raise PluginError(f"the {self._what} {brief(name)} of {new.origin} is refused: {reason}")

    def _several(self, name: str, points: Iterable[metadata.EntryPoint]) -> PluginError:
        makers = " and by ".join(sorted(_origin(point) for point in points if point.name == name))
        return PluginError(f"the {self._what} {brief(name)} is offered by {makers}; uninstall one of them")

    def _taken(self, name: str, by: str, whose: str = "this program") -> PluginError:
        return PluginError(
            f"the {self._what} {brief(name)} of {whose} has a name that is taken, by {by}; it needs another one"
        )


def _origin(point: metadata.EntryPoint) -> str:
    return "a package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _line(error: Exception) -> str:
    """An error's own words, on one line that is not too long."""
    words = " ".join(str(error).split())
    return words if len(words) <= 160 else f"{words[:157]}..."
