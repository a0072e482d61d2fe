"""A tiny random model that chats, in a `Serving`."""

import json
from pathlib import Path
from typing import Any

import torch

from kvist.models.families import read_config
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.service.calibration import TEXT
from kvist.service.loaded import open_model
from kvist.service.serving import Serving
from kvist.text.training import save_tokenizer, train_bytes_bpe
from kvist.weights.checkpoint import save

CONTEXT = 2048
EOS = "<|im_end|>"
_SPECIAL = ["<|im_start|>", EOS]
TEMPLATE = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}Functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}To call one, write <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' and tools and loop.first %}{% continue %}{% endif -%}
<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_tiny_model(directory: Path, context: int = CONTEXT) -> Path:
    """A random Llama of two layers over a byte-level vocabulary, with a ChatML template that knows tools."""
    directory.mkdir(parents=True)
    tokenizer = train_bytes_bpe(TEXT.read_text("utf-8"), 400)
    tokenizer.add_special_tokens(_SPECIAL)
    save_tokenizer(tokenizer, directory, eos=EOS)
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    model = build(read_config(config, "config.json"), PlainActivations(), torch.float32)
    save(directory / "model.safetensors", export(randomize(model, seed=1, std=0.1)))
    return directory


def open_serving(directory: Path, *, blocks: int = 256, running: int = 4, **options: Any) -> Serving:
    """A `Serving` that has not been started; `options` are its own."""
    torch.set_num_threads(1)
    loaded = open_model(str(directory))
    budget = loaded.budget(loaded.layout.store_bytes(blocks, 0, 0), running)
    return Serving(loaded, loaded.engine(budget), name="tiny", **options)
