"""The library: a model, its cache and its engine as values of a program. `kvist` itself has the names."""
