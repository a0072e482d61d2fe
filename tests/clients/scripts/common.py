"""What scripts of clients share. Each is given the server's URL, and prints what its client got as one line of JSON."""

import json
import sys

URL = sys.argv[1]
MODEL = "tiny"
KEY = "none"
ASKED = "Hello"
TOKENS = 6
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def tell(**found: object) -> None:
    """What the test reads."""
    print("\n" + json.dumps(found))
