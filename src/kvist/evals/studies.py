"""What the library has of the command line's studies of a model: values that print as tables, and show as such in
notebooks."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kvist.base.errors import RequestError
from kvist.evals import fidelity as measured
from kvist.evals.fidelity import DEFAULT_KV, LENGTH, TOKENS, FidelityReport
from kvist.evals.verify import Report, Verifier
from kvist.service.calibration import built_in_text
from kvist.service.loaded import BUNDLED, BUNDLED_NAME, find_gguf, open_model, plain_name
from kvist.service.plan import CONTEXTS, KVS, Plan, plan_model
from kvist.weights.hub import resolve

Watch = Callable[[str], None]


def plan(model: str | None = None, *, kv: Sequence[str] = KVS, contexts: Sequence[int] = CONTEXTS) -> Plan:
    """What a model keeps, and the bytes of its KV at growing contexts under each codec, from its config alone. Raises
    `KvistError`."""
    source = BUNDLED if model is None else find_gguf(model) or resolve(model, progress=True, weights=False)
    return plan_model(BUNDLED_NAME if model is None else plain_name(model), source, _choices(kv), contexts)


def verify(
    model: str | None = None,
    *,
    kv: str | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    tokens: int = 560,
    steps: int = 24,
    trials: int = 6,
    seed: int = 0,
    watch: Watch = lambda what: None,
) -> Report:
    """Runs with the cache compared with runs from nothing, bit for bit, and one with plain attention, nearly: see
    `Report.exact`, `Report.passed`. `watch` is told of each check as it ends. Raises `KvistError`."""
    verifier = Verifier(open_model(model, dtype=dtype, kv=kv, weights=weights), tokens, steps, trials, seed)
    checks = []
    for check in verifier.run():
        checks.append(check)
        watch(check.name)
    return Report(verifier.title, checks)


def fidelity(
    model: str | None = None,
    *,
    kv: Sequence[str] = DEFAULT_KV,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    length: int | None = None,
    dtype: str | None = None,
    watch: Watch = lambda what: None,
) -> FidelityReport:
    """What compressed caches change of a model's predictions on a text, at how many bytes: every prediction held
    against the one over full precision. `text`: itself, or the path of a file; without one a built-in text, which has
    also calibrated the model and flatters it. `tokens`: of it, in windows of `length`. `watch` is told what is under
    way. Raises `KvistError`."""
    base = open_model(model, dtype=dtype)
    words = text.read_text("utf-8") if isinstance(text, Path) else text or built_in_text(base.tokenizer())
    parts = measured.windows(base, words, tokens, length or min(base.config.max_positions, LENGTH))
    name = "built-in text" if text is None else text.name if isinstance(text, Path) else "text"
    report = measured.run(base, {choice: base.with_kv(choice) for choice in _choices(kv)}, name, parts, watch)
    assert report is not None, "nobody has stopped it"
    return report


def _choices(kv: Sequence[str]) -> list[str]:
    if isinstance(kv, str):
        raise RequestError(f"kv is a list of codecs here; one alone is written [{kv!r}]")
    return list(kv)
