"""Anthropic's Messages API, as the `anthropic` package and the agents that are built on it speak it."""

from kvist.server.anthropic.messages import router

__all__ = ["router"]
