"""Kvist: an inference engine for open-weights language models, built around an exact, paged KV cache."""

__version__ = "0.1.0"
