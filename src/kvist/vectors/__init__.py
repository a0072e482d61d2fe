"""Search among vectors kept in a few bits a number, the other use of the cache's codes."""

from kvist.vectors.index import VectorIndex

__all__ = ["VectorIndex"]
