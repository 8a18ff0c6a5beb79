"""When a warm-up has done its work: the hit ratio no longer changes."""

from collections import deque

from mlpstorage.kvcache.recorder import Recorder, RequestTally
from mlpstorage.kvcache.together import Meet
from mlpstorage.measure.clock import NS, Clock

SPAN_S = 5
"""Seconds over which a hit ratio is taken."""

SPANS = 3
"""So many spans one after the other must agree."""

TOLERANCE = 0.02
"""Greatest difference between the hit ratios of tokens of the spans that agree."""


class Steadiness:
    """Watches the hit ratio of tokens, span after span.

    Attributes:
        seen: Whether it was steady when the last span ended.
    """

    def __init__(self) -> None:
        self.seen = False
        self._ratios: deque[float | None] = deque(maxlen=SPANS)
        self._prompt_tokens = 0
        self._cached_tokens = 0

    async def reached(self, recorder: Recorder, clock: Clock, begin_ns: int, most_ns: int, meet: Meet) -> None:
        """Return when the hit ratio is steady on all ranks at once, at the latest at `most_ns`."""
        due_ns = begin_ns
        everyone = False
        while not everyone and due_ns < most_ns:
            due_ns = min(due_ns + SPAN_S * NS, most_ns)
            await clock.sleep_until(due_ns)
            self.seen = self._is_steady(recorder.total_requests)
            everyone = (await meet(self.seen)).everyone

    def _is_steady(self, requests: RequestTally) -> bool:
        """Take in a span; whether it and those before it agree. A span without an answered request agrees with none."""
        found = requests.cached_tokens
        cached_tokens = found.gpu + found.cpu + found.storage
        asked = requests.prompt_tokens - self._prompt_tokens
        self._ratios.append((cached_tokens - self._cached_tokens) / asked if asked else None)
        self._prompt_tokens, self._cached_tokens = requests.prompt_tokens, cached_tokens
        ratios = [ratio for ratio in self._ratios if ratio is not None]
        return len(ratios) == SPANS and max(ratios) - min(ratios) <= TOLERANCE
