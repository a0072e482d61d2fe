"""Decoders. They see token ids, positions and one `LayerView` per layer; nothing else of the cache."""
