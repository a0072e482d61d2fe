"""`python -m kvist` is `kvist`."""

from kvist.cli import main

main()
