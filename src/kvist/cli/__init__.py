"""The command line: verbs. Heavy imports stand inside the commands, so that `kvist --help` is quick."""

import gc
import os
import sys

from kvist.base.errors import KvistError


def main() -> None:
    """Run a verb. A `KvistError` is one line on stderr and its exit code; a reader that went away is no error."""
    from kvist.cli.process import quiet_pipe, starting

    quiet_pipe()
    with starting():
        from kvist.cli.app import app
    # Read by PyTorch's threads when they start. They wait for each other several hundred times a token. Spinning long,
    # a wait beside another busy program costs a time slice (seen: 4 tokens/s for 400); going to sleep at once costs a
    # wake-up each time (half the speed). This many turns, some tens of microseconds, then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Hundreds of thousands of objects of imported modules are looked through each time that a few hundred more are
    # there: a third of a second until the first token, and a pause between two tokens every now and then.
    gc.set_threshold(50_000, 20, 20)
    try:
        app()
    except KvistError as error:
        print(f"kvist: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        sys.stdout.flush()  # while a reader that went away is still no error
