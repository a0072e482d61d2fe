"""Weights on disk: reading and writing safetensors, finding a model by name, importing llama2.c checkpoints."""
