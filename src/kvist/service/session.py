"""A loaded model with its tokenizer: text in, pieces of text out."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvist.base.errors import RequestError
from kvist.base.events import Listener
from kvist.cache.codecs import codec
from kvist.cache.layout import Layout, plan_layout
from kvist.models.config import ModelConfig
from kvist.models.decoder import Decoder
from kvist.models.load import DTYPES, load, load_config, stored_dtype
from kvist.ops.backend import select
from kvist.runtime.engine import Engine
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.runner import Runner
from kvist.text.detokenizer import Detokenizer
from kvist.text.stops import StopMatcher
from kvist.text.tokenizer import Tokenizer
from kvist.weights.checkpoint import Checkpoint

_KV_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Loaded:
    """A model in memory, ready to be run by any number of engines."""

    name: str
    config: ModelConfig
    model: Decoder
    tokenizer: Tokenizer | None
    dtype: torch.dtype

    def layout(self, kv: str | None = None) -> Layout:
        """Its cache under codec `kv`; by default the one that keeps the model's own dtype, losing nothing."""
        return plan_layout(self.config.layer_specs(), codec(kv or _KV_OF[self.dtype]))
