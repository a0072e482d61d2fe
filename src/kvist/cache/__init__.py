"""The KV cache: described (spec, layout), allocated (pool, store), held (manager), seen by models (view)."""
