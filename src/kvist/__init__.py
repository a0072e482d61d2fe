"""Kvist: an inference engine for open-weights language models, built around an exact, paged KV cache.

    with kvist.LLM() as llm:
        print(llm.generate("ROMEO:", max_tokens=50).text)

The names in `__all__` are the library; all else may change from one version to the next. A name is loaded when it is
first used, and PyTorch with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvist.base.process import settle
from kvist.base.version import __version__

settle()

_PLACES = {
    "AsyncLLM": "kvist.library.async_llm",
    "LLM": "kvist.library.llm",
    "Answer": "kvist.library.results",
    "ChatDelta": "kvist.library.results",
    "Completion": "kvist.library.results",
    "Score": "kvist.library.results",
    "TextDelta": "kvist.library.results",
    "ToolCall": "kvist.library.results",
    "fidelity": "kvist.evals.studies",
    "plan": "kvist.evals.studies",
    "verify": "kvist.evals.studies",
    "FinishReason": "kvist.runtime.request",
    "Sampling": "kvist.runtime.request",
    "register_codec": "kvist.cache.codecs",
    "register_family": "kvist.models.families",
    "register_tier": "kvist.cache.tiers",
    "Closed": "kvist.base.errors",
    "KvistError": "kvist.base.errors",
    "PluginError": "kvist.base.errors",
    "RequestError": "kvist.base.errors",
    "LateImport": "kvist.base.process",
}
__all__ = ["__version__", *_PLACES]

if TYPE_CHECKING:
    from kvist.base.errors import Closed as Closed
    from kvist.base.errors import KvistError as KvistError
    from kvist.base.errors import PluginError as PluginError
    from kvist.base.errors import RequestError as RequestError
    from kvist.base.process import LateImport as LateImport
    from kvist.cache.codecs import register_codec as register_codec
    from kvist.cache.tiers import register_tier as register_tier
    from kvist.evals.studies import fidelity as fidelity
    from kvist.evals.studies import plan as plan
    from kvist.evals.studies import verify as verify
    from kvist.library.async_llm import AsyncLLM as AsyncLLM
    from kvist.library.llm import LLM as LLM
    from kvist.library.results import Answer as Answer
    from kvist.library.results import ChatDelta as ChatDelta
    from kvist.library.results import Completion as Completion
    from kvist.library.results import Score as Score
    from kvist.library.results import TextDelta as TextDelta
    from kvist.library.results import ToolCall as ToolCall
    from kvist.models.families import register_family as register_family
    from kvist.runtime.request import FinishReason as FinishReason
    from kvist.runtime.request import Sampling as Sampling


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'kvist' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
