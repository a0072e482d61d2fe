"""What tests of the command line share."""

from collections.abc import Callable
from dataclasses import dataclass

CONFIG = {
    "model_type": "llama",
    "vocab_size": 27,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Kvist = Callable[..., Outcome]
