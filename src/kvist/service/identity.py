"""What made a model's KV, as a digest: whatever is kept outside of memory is found again under the same one only.

Most of it is described: the weights' own bytes, the config and who made its family, the tokenizer, the layout with
calibration, codecs and who made them, the operators' source. The arithmetic is measured: a few tokens are run, and the
bits of their KV and logits are part of the identity. So another PyTorch, processor or number of threads is another
identity exactly where its sums come out differently."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvist.base.errors import KvistError
from kvist.cache import record
from kvist.models.families import described
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.service.loaded import Loaded

_PACKAGE = Path(__file__).parent.parent
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_PROBE = 72  # tokens: a whole block, and a few in one that is not full


@dataclass(frozen=True)
class Identity:
    """Digests (hex), each of one thing that the bytes of a block depend on. `model` is a name, for people; it is no
    part of `digest`. `adapter`: of weights that are added to the model's, if any."""

    model: str
    weights: str
    config: str
    tokenizer: str
    kv: str
    layout: str
    operators: str
    arithmetic: str
    adapter: str = ""
    format: int = record.VERSION

    @cached_property
    def digest(self) -> bytes:
        """32 bytes."""
        facts = {name: value for name, value in asdict(self).items() if name != "model"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()

    def differences(self, other: "Identity") -> list[str]:
        """What of another identity is not the same, by name; the model's name left out."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name != "model" and mine[name] != theirs[name]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of_json(value: Any) -> "Identity":
        """Raises `KvistError` for what is none."""
        names = Identity.__dataclass_fields__
        if not isinstance(value, dict) or value.keys() != names.keys():
            raise KvistError("it describes no model")
        fields = {name: value[name] for name in names}
        wrong = [n for n, v in fields.items() if type(v) is not (int if n == "format" else str) or len(str(v)) > 1024]
        if wrong:
            raise KvistError(f"it describes no model: {wrong[0]} is not what it should be")
        return Identity(**fields)


def identify(loaded: Loaded) -> Identity:
    """The identity of a model in memory and its cache. Reads all of the weights, unless their digest is known."""
    return Identity(
        model=loaded.name,
        weights=loaded.weights_digest(),
        config=_digest(described(loaded.config).encode()),
        tokenizer=_digest(*_contents(loaded.directory / name for name in _TOKENIZER)),
        kv=loaded.layout.kv,
        layout=loaded.layout.fingerprint,
        operators=_operators(loaded.backend.name),
        arithmetic=_arithmetic(loaded),
        adapter=loaded.adapter,
    )


@torch.inference_mode()
def _arithmetic(loaded: Loaded) -> str:
    """The bits that a few tokens come to on this machine: of their KV, and of the last one's logits."""
    count = min(_PROBE, loaded.config.max_positions)
    tokens = [(index * 7919 + 13) % loaded.config.vocab_size for index in range(count)]
    runner = Runner(loaded.model, loaded.layout, 2, loaded.backend, sequences=1)
    lease = runner.manager.open()
    most = runner.widths.most
    logits = torch.empty(0)
    for start in range(0, count, most):
        (logits,) = runner.run([Work(lease, tokens[start : start + most], 1)])
    return _digest(bytes(runner.store.read_block(runner.manager.blocks_at(lease, 0))), logits.numpy().tobytes())


def _operators(backend: str) -> str:
    """Of the implementation, PyTorch, and every source file that decides what is computed."""
    sources = sorted(path for layer in ("ops", "models") for path in (_PACKAGE / layer).rglob("*") if path.is_file())
    sources = [path for path in sources if path.suffix in (".py", ".cpp", ".h")]
    return _digest(backend.encode(), torch.__version__.encode(), *_contents(sources))


def _contents(paths: Iterable[Path]) -> Iterable[bytes]:
    for path in paths:
        if path.is_file():
            yield path.name.encode()
            yield path.read_bytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
