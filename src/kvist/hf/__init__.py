"""Models of families that are not ours: transformers' own code, over our cache. Needs `kvist[hf]`."""
