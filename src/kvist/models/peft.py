"""PEFT's `adapter_config.json`, key by key: each is applied, does nothing at inference, or is refused by name."""

import re
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import regex

from kvist.base.errors import ConfigError, brief
from kvist.base.files import read_json
from kvist.models.keys import Keys

CONFIG = "adapter_config.json"
_MOST_BYTES = 1 << 20
_MOST_PATTERN = 1000  # characters of one, and patterns of one key
_SAID = 120  # characters of what is said of a pattern
_MOST_NAME = 300  # characters of a module's name
_MOST_SECONDS, _ONE = 2.0, 0.05  # of computing, for all matches of one adapter and for one
_REPEAT = re.compile(r"\{(?!\d+(?:,\d*)?\}|,\d+\})")  # a brace that is no count


class Use(StrEnum):
    """What becomes of a key whatever its value."""

    APPLIED = "applied"
    INERT = "inert"


# Every key of PEFT's LoraConfig, and those of its first versions. A tuple: refused, unless it has one of these values
# or is null. Configs of how an adapter was initialized do nothing once its tensors are there; `init_lora_weights`
# itself says whether the base was changed with it.
KEYS: dict[str, Use | tuple[Any, ...]] = {
    **dict.fromkeys(("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"), Use.APPLIED),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), Use.APPLIED),
    "init_lora_weights": Use.APPLIED,
    # Where it came from.
    **dict.fromkeys(("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type"), Use.INERT),
    # How it was trained, and is held in memory.
    **dict.fromkeys(("inference_mode", "lora_dropout", "merge_weights", "runtime_config"), Use.INERT),
    **dict.fromkeys(("megatron_config", "megatron_core", "qalora_group_size"), Use.INERT),
    **dict.fromkeys(("corda_config", "eva_config", "loftq_config", "lora_ga_config"), Use.INERT),
    "fan_in_fan_out": Use.INERT,  # PEFT sets it by the kind of the base's module
    # What changes the mathematics, or other parts than products.
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "bias": ("none",),
    "enable_lora": (),
    "ensure_weight_tying": (False,),
    "kasa_config": (),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "monteclora_config": (),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_bdlora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (),
}
# Initializations after which an adapter stands on the base as it is. The others take out of the base what they put
# into the adapter, again whenever PEFT loads it.
_ON_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


# `rank_pattern` or `alpha_pattern`: the first that matches the end of a module's name counts.
_Patterns = list[tuple["regex.Pattern[str]", float]]


class PeftConfig:
    """What an adapter's config says of its modules. Matching ends for all of them together after `_MOST_SECONDS`."""

    def __init__(self, directory: Path) -> None:
        """Raises `ConfigError` for what is not supported, by name."""
        self.where = str(directory / CONFIG)
        raw = read_json(directory / CONFIG, _MOST_BYTES)
        self._left = _MOST_SECONDS
        self._check(raw)
        keys = Keys(raw, self.where)
        self.stabilized: bool = keys.take("use_rslora", bool, False)
        self._rank: int = keys.take("r", int, 8)
        self._alpha: float = keys.take("lora_alpha", float, 8)
        self._ranks = self._patterns(keys, "rank_pattern", int)
        self._alphas = self._patterns(keys, "alpha_pattern", float)
        self._targets = self._names(keys, "target_modules")
        self._excluded = self._names(keys, "exclude_modules")
        self._layers = _layers(keys)
        between = self._names(keys, "layers_pattern") or ()
        self._between = [
            self._compile(f"(?:^|.*?\\.){name}\\.(?P<index>\\d{{1,9}})\\.", "layers_pattern", name)
            for name in ([between] if isinstance(between, str) else between)
        ] or [regex.compile(r".*?\.[^.]*\.(?P<index>\d{1,9})\.")]
        self._target = self._whole("target_modules", self._targets)
        self._exclude = self._whole("exclude_modules", self._excluded)

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return int(self._first(self._ranks, module, self._rank))

    def alpha(self, module: str) -> float:
        """What the module's adapter is multiplied with, before it is divided by its rank."""
        return self._first(self._alphas, module, self._alpha)

    def changes(self, module: str) -> bool:
        """Whether PEFT gives this module an adapter when it loads the config."""
        if self._exclude is not None and self._match(self._exclude, module, whole=True):
            return False
        if not isinstance(self._excluded, str) and _ends(module, self._excluded or ()):
            return False
        if self._targets is None:  # PEFT's own choice for the base
            return True
        if isinstance(self._targets, str):
            if self._targets.lower() == "all-linear":
                return module not in ("lm_head", "embed_out")
            return self._target is not None and self._match(self._target, module, whole=True) is not None
        if module in self._targets:
            return True
        return _ends(module, self._targets) and (self._layers is None or self._layer(module) in self._layers)

    def _layer(self, module: str) -> int | None:
        for pattern in self._between:
            if found := self._match(pattern, module):
                return int(found["index"])
        return None

    def _check(self, raw: dict[str, Any]) -> None:
        """Refuses, by name, each key that is not known, or at a value that is not computed."""
        if (kind := raw.get("peft_type")) not in (None, "LORA"):
            raise ConfigError(f"{self.where}: peft_type={brief(kind)} changes the maths and is not supported (LORA is)")
        for name, value in raw.items():
            use = KEYS.get(name)
            if value is None or isinstance(use, Use):
                continue
            if use is None:
                raise ConfigError(f"{self.where}: unknown key {brief(name)}, which may change the maths")
            if value not in use:
                inert = " or ".join(map(repr, use)) or "null"
                raise ConfigError(
                    f"{self.where}: {name}={brief(value)} changes the maths and is not supported ({inert} is)"
                )
        how = raw.get("init_lora_weights")
        if (
            how is not None
            and not isinstance(how, bool)
            and (not isinstance(how, str) or how.lower() not in _ON_THE_BASE)
        ):
            raise ConfigError(
                f"{self.where}: init_lora_weights={brief(how)} means that the base was changed with the adapter, which "
                "is not supported; write it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), "
                "or merge it there"
            )

    def _patterns(self, keys: Keys, name: str, kind: type) -> _Patterns:
        found = keys.take(name, dict, {})
        if len(found) > _MOST_PATTERN:
            raise ConfigError(f"{self.where}: {name} has {len(found):,} patterns, and {_MOST_PATTERN:,} are read")
        where = f"{self.where}: {name}"
        return [
            (
                self._compile(f"(.*\\.)?({pattern})$", name, pattern),
                Keys({brief(pattern): value}, where).take(brief(pattern), kind),
            )
            for pattern, value in found.items()
            if value is not None
        ]

    def _names(self, keys: Keys, name: str) -> str | frozenset[str] | None:
        """A pattern, or names."""
        found = keys.peek(name)
        if found is None or isinstance(found, str):
            return found
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise ConfigError(f"{self.where}: {name} should be a text or a list of texts, got {brief(found)}")
        return frozenset(found)

    def _whole(self, name: str, found: str | Iterable[str] | None) -> "regex.Pattern[str] | None":
        return self._compile(found, name, found) if isinstance(found, str) else None

    def _compile(self, expression: str, name: str, given: str) -> "regex.Pattern[str]":
        """An expression of Python's `re`, whose matches can be bounded in time. Where the dialect of `regex` means
        something else (sets by name, braces that are no count), it is refused."""
        try:
            if len(given) > _MOST_PATTERN or _REPEAT.search(given) or "[:" in given:
                raise re.error("longer than 1,000 characters, or with sets or braces of another dialect")
            re.compile(expression)
            return regex.compile(expression)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{self.where}: {name}: cannot read the pattern {brief(given)} ({str(error)[:_SAID]})"
            ) from None

    def _first(self, patterns: _Patterns, module: str, otherwise: float) -> float:
        return next((value for pattern, value in patterns if self._match(pattern, module)), otherwise)

    def _match(self, pattern: "regex.Pattern[str]", module: str, whole: bool = False) -> "regex.Match[str] | None":
        if len(module) > _MOST_NAME:
            raise ConfigError(f"{self.where}: a module's name is longer than {_MOST_NAME} characters: {brief(module)}")
        start = time.thread_time()
        try:
            how = pattern.fullmatch if whole else pattern.match
            found = how(module, timeout=max(min(_ONE, self._left), 1e-3))
        except TimeoutError:
            raise ConfigError(
                f"{self.where}: its patterns take too long to match, as {brief(pattern.pattern)}"
            ) from None
        self._left -= time.thread_time() - start
        return found


def _layers(keys: Keys) -> frozenset[int] | None:
    found = keys.peek("layers_to_transform")
    if found is None or found == []:
        return None
    listed = found if isinstance(found, list) else [found]
    if not all(type(one) is int for one in listed):
        raise ConfigError(f"{keys.where}: layers_to_transform should be a list of whole numbers, got {brief(found)}")
    return frozenset(listed)


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
