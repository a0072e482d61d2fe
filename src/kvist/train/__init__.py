"""Training of small models on one text: the engine's own decoders, run over whole rows, with gradients."""
