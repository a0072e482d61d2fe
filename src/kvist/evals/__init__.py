"""Measurements of what the engine promises: exactness first."""
