"""Other engines, each in an environment of its own and measured by a worker that runs there."""
