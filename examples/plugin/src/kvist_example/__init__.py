"""A codec and a tier for Kvist. Nothing is imported here: each is, when it is asked for by name."""
