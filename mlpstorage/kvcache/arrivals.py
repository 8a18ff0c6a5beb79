"""When the requests of an open loop arrive: at random, or at a trace's times, spread or as they are."""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from mlpstorage.kvcache.traces import TraceRequest

_ROUNDED = 9
"""Digits of a second to which random times are rounded, so that the last bits of libm leave no trace."""


def poisson_s(rate_per_s: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process from 0, in seconds: the distances are exponential with mean `1 / rate_per_s`."""
    draw = _draw("poisson", seed)
    at_s = 0.0
    while True:
        at_s += -math.log(1.0 - draw()) / rate_per_s
        yield round(at_s, _ROUNDED)


def at_rate(requests: Iterable[TraceRequest], rate_per_s: float, seed: int) -> Iterator[TraceRequest]:
    """The requests in their order, at the times of a Poisson process."""
    for request, at_s in zip(requests, poisson_s(rate_per_s, seed), strict=False):
        yield replace(request, timestamp_s=at_s)


def spread(requests: Iterable[TraceRequest], spread_s: float, seed: int) -> Iterator[TraceRequest]:
    """Each request later by a random time below `spread_s`, all of them in their new order.

    That undoes the rounding down of timestamps. A session's requests keep their order: one that would come before an
    earlier one of its session comes with it.

    Args:
        requests: In order of time.
        spread_s: Longest delay, in seconds.
        seed: Of the delays.
    """
    draw = _draw("spread", seed)
    waiting: list[tuple[float, int, TraceRequest]] = []
    latest_s: dict[int, float] = {}
    for number, request in enumerate(requests):
        # What comes from here on has no earlier time than this request's own.
        yield from _due(waiting, request.timestamp_s, latest_s)
        at_s = round(request.timestamp_s + draw() * spread_s, _ROUNDED)
        at_s = max(at_s, latest_s.get(request.session, at_s))
        latest_s[request.session] = at_s
        heapq.heappush(waiting, (at_s, number, request))
    yield from _due(waiting, math.inf, latest_s)


def _due(
    waiting: list[tuple[float, int, TraceRequest]], before_s: float, latest_s: dict[int, float]
) -> Iterator[TraceRequest]:
    """Take out what lies before a time, and forget the sessions of which nothing waits any more."""
    while waiting and waiting[0][0] < before_s:
        at_s, _, request = heapq.heappop(waiting)
        if latest_s.get(request.session) == at_s:
            del latest_s[request.session]
        yield replace(request, timestamp_s=at_s)


def _draw(purpose: str, seed: int) -> Callable[[], float]:
    return random.Random(f"{purpose} {seed}").random  # noqa: S311 - a workload, no secret
