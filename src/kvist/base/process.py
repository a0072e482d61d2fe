"""What makes the process fast: how PyTorch's threads wait, and how often the collector looks. Set once, before PyTorch.

No import but the standard library's: this runs at `import kvist`.
"""

import gc
import os
import sys
import warnings

SPINS = "GOMP_SPINCOUNT"
_TURNS = "10000"
_USUAL = (700, 10, 10)  # of Python 3.11 to 3.13, which nobody has chosen
_THRESHOLDS = (50_000, 20, 20)


class LateImport(UserWarning):
    """PyTorch was there before what makes its threads quick beside other programs could be set."""


def settle() -> None:
    """Make the settings that can still be made. What somebody has set already stays.

    PyTorch's threads read how long they spin when they are loaded. They wait for each other several hundred times a
    token. Spinning long, a wait beside another busy program costs a time slice (seen: 4 tokens/s for 400); going to
    sleep at once costs a wake-up each time (half the speed). So: that many turns, tens of microseconds, then sleep.

    Hundreds of thousands of objects of imported modules are looked through each time that a few hundred more are there:
    a third of a second until the first token, and a pause between two tokens every now and then. So: more seldom.
    """
    if SPINS not in os.environ:
        os.environ[SPINS] = _TURNS  # also of the processes that this one starts
        if "torch" in sys.modules and sys.platform == "linux":
            warnings.warn(
                "torch was imported before kvist, so its threads wait by spinning, and lose most of their speed beside "
                f"a busy program: import kvist first, or set {SPINS}={_TURNS} in the environment",
                LateImport,
                stacklevel=3,
            )
    if gc.get_threshold() == _USUAL:
        gc.set_threshold(*_THRESHOLDS)
