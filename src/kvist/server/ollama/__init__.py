"""Ollama's API, as unmodified clients of it speak it."""

from kvist.server.ollama.routes import router

__all__ = ["router"]
