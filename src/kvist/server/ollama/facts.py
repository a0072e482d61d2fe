"""What there is to say of the model, as Ollama's clients ask for it."""

import hashlib
from typing import Any

from kvist.base.units import utc_time
from kvist.models.linear import tensors_of, weights_of
from kvist.server.openai.models import names
from kvist.service.serving import Serving

_MILLION, _BILLION = 10**6, 10**9
_NEVER = "9999-12-31T23:59:59Z"  # when a model that stays is unloaded


def listed(serving: Serving) -> list[dict[str, Any]]:
    """The model and its adapters."""
    return [_entry(serving, name) for name in names(serving)]


def loaded(serving: Serving) -> list[dict[str, Any]]:
    """The same, as they lie in memory, which they all do."""
    more = {"expires_at": _NEVER, "size_vram": 0, "context_length": serving.context}
    return [{**_entry(serving, name), **more} for name in names(serving)]


def described(serving: Serving) -> dict[str, Any]:
    """All that is known of the model."""
    config = serving.loaded.config
    family = config.family
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": "" if serving.template is None else serving.template.source,
        "details": _details(serving),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": _parameters(serving),
            f"{family}.context_length": serving.context,
            f"{family}.embedding_length": config.hidden_size,
            f"{family}.block_count": config.layers,
            f"{family}.attention.head_count": config.heads,
            f"{family}.attention.head_count_kv": config.kv_heads,
            f"{family}.vocab_size": config.vocab_size,
        },
        "capabilities": _capabilities(serving),
        "modified_at": utc_time(serving.created),
    }


def _capabilities(serving: Serving) -> list[str]:
    found = ["completion", "embedding"]
    if serving.template is not None and "tools" in serving.template.source:
        found.append("tools")
    if serving.format.reasoning is not None:
        found.append("thinking")
    return found


def _entry(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": utc_time(serving.created),
        "size": sum(tensor.nbytes for tensor in tensors_of(serving.loaded.model).values()),
        "digest": _digest(serving, name),
        "details": _details(serving),
    }


def _digest(serving: Serving, name: str) -> str:
    """Another one for another model, other weights, or another adapter: by what is known without reading them again."""
    loaded = serving.loaded
    facts = (name, loaded.config, loaded.stamp, loaded.model.weights, serving.adapters.get(name, loaded.adapter))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _parameters(serving: Serving) -> int:
    model = serving.loaded.model
    packed = [weight.form for weight in weights_of(model).values() if weight.form is not None]
    return sum(one.numel() for one in model.parameters()) + sum(form.rows * form.columns for form in packed)


def _details(serving: Serving) -> dict[str, Any]:
    loaded, count = serving.loaded, _parameters(serving)
    size = f"{count / _BILLION:.1f}B" if count >= _BILLION else f"{count / _MILLION:.1f}M"
    return {
        "parent_model": "",
        "format": "gguf" if loaded.files is not None and loaded.files.suffix == ".gguf" else "safetensors",
        "family": loaded.config.family,
        "families": [loaded.config.family],
        "parameter_size": size,
        "quantization_level": loaded.model.weights,
    }
