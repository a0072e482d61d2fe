"""Types, errors, events, units: what every layer may use, and nothing that needs a tensor."""
