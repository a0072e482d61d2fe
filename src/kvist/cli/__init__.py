"""The command line: verbs. Heavy imports stand inside the commands, so that `kvist --help` is quick."""

import sys

from kvist.base.errors import KvistError


def main() -> None:
    """Run a verb. A `KvistError` is one line on stderr and its exit code; a reader that went away is no error."""
    from kvist.cli.process import quiet_pipe, starting

    quiet_pipe()
    with starting():
        from kvist.cli.app import app
    try:
        app()
    except KvistError as error:
        print(f"kvist: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        sys.stdout.flush()  # while a reader that went away is still no error
