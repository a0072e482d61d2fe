"""What the fixtures give. Not in conftest.py: of that name there is one in each folder, and one of them stands for
all."""

from collections.abc import Callable
from typing import Any

from recorded import Recorded

Script = Callable[[str, str], dict[str, Any]]
Program = Callable[..., str]
ServerOf = Callable[[int], Recorded]
