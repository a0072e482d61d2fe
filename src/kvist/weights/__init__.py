"""Weights on disk: safetensors in and out, finding a model by name, importing llama2.c checkpoints."""
