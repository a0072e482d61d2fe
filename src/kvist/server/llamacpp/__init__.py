"""llama.cpp's own routes, beside those of OpenAI that its server has, too."""

from kvist.server.llamacpp.routes import router

__all__ = ["router"]
