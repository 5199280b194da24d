"""Which language a reply should be in, and whether it was: text hygiene, resolving, scoring.

Nothing in this package needs torch or vLLM, except the decode-time guard's processor classes.
"""

from typing import Literal

Language = Literal["en", "ar"]
"""A language the service answers in."""
