"""How long a request waits for its blocks to come from storage, by how many tokens they hold."""

import math
from dataclasses import dataclass

from mlpstorage.spec.fields import number_text

STEP_TOKENS = 1024
"""Tokens of one step of `LoadTimeout.per_1024_tokens_s`."""

_FORM = "expected SECONDS, or BASE:PER_1024_TOKENS:MOST in seconds, such as 2:0.1:30"
_PARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTimeout:
    """After how long a load from storage is abandoned. Its text is `base:per_1024_tokens:most`.

    Attributes:
        base_s: Seconds for any load.
        per_1024_tokens_s: Seconds more for each 1,024 tokens; parts of them count in proportion.
        most_s: Most seconds, however many the tokens.
    """

    base_s: float
    per_1024_tokens_s: float
    most_s: float

    def __str__(self) -> str:
        return ":".join(map(number_text, (self.base_s, self.per_1024_tokens_s, self.most_s)))

    def limit_s(self, tokens: int) -> float:
        """Most seconds that reading `tokens` tokens from storage may take."""
        return min(self.most_s, self.base_s + self.per_1024_tokens_s * tokens / STEP_TOKENS)


def parse_load_timeout(value: object) -> object:
    """A limit from its text, or from a number, which is the limit for any load; all else as it is.

    Raises:
        ValueError: The text is neither, a part is negative or not finite, or the most is 0 or below the base.
    """
    if not isinstance(value, (str, int, float)):
        return value
    try:
        parts = [float(part) for part in str(value).split(":")]
    except ValueError:
        raise ValueError(_FORM) from None
    if len(parts) == 1:
        parts = [parts[0], 0.0, parts[0]]
    if len(parts) != _PARTS:
        raise ValueError(_FORM)
    base_s, step_s, most_s = parts
    if not all(map(math.isfinite, parts)) or min(parts) < 0 or not most_s:
        raise ValueError(f"no part may be negative, and the most must be above 0; {_FORM}")
    if most_s < base_s:
        raise ValueError(f"the most is below the base; {_FORM}")
    return LoadTimeout(base_s=base_s, per_1024_tokens_s=step_s, most_s=most_s)
