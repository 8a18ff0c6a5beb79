"""Ranks of one event loop on virtual time, with a clock each, and messages that take a given time."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mlpstorage.kvcache.ranks import ClockOffset
from mlpstorage.measure.clock import NS
from mlpstorage.testing.virtual import VirtualClock


class AbortedError(Exception):
    """A rank ended all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedClock:
    """A clock that is `ahead_ns` ahead of virtual time."""

    ahead_ns: int

    def now_ns(self) -> int:
        """Nanoseconds by this clock."""
        return VirtualClock().now_ns() + self.ahead_ns

    async def sleep_until(self, when_ns: int) -> None:
        """Return at `when_ns` by this clock."""
        await VirtualClock().sleep_until(when_ns - self.ahead_ns)


@dataclass(slots=True, kw_only=True)
class Wire:
    """What connects so many ranks; a message takes `delay_ns`."""

    size: int
    delay_ns: int = NS // 1000
    boxes: dict[int, deque[tuple[int, int, Any]]] = field(default_factory=dict)

    def rank(self, number: int) -> "WiredRank":
        """The end of one rank."""
        self.boxes[number] = deque()
        return WiredRank(wire=self, rank=number)


@dataclass(slots=True, kw_only=True)
class WiredRank:
    """One end; it is a `kvcache.ranks.Ranks`."""

    wire: Wire
    rank: int
    launched: bool = True
    ranks_on_host: int = 1
    number_on_host: int = 0
    lowest_on_host: bool = True
    aborted: int | None = None

    @property
    def size(self) -> int:
        """Number of all ranks."""
        return self.wire.size

    def post(self, message: object, to: int) -> None:
        """Send a message on its way."""
        self.wire.boxes[to].append((VirtualClock().now_ns() + self.wire.delay_ns, self.rank, message))

    def arrived(self) -> list[tuple[int, Any]]:
        """What is here."""
        box, here = self.wire.boxes[self.rank], []
        while box and box[0][0] <= VirtualClock().now_ns():
            _, source, message = box.popleft()
            here.append((source, message))
        return here

    def beat(self, still_s: float, to: int) -> None:
        """Not here: signs of life are no matter of the event loop."""
        raise NotImplementedError

    def beats(self) -> list[tuple[int, float]]:
        """Likewise."""
        raise NotImplementedError

    def settle(self) -> None:
        """Likewise."""
        raise NotImplementedError

    def abort(self, exit_code: int) -> NoReturn:
        """Remember with what, and end."""
        self.aborted = exit_code
        raise AbortedError

    def told_on_host(self, item: Any) -> Any:  # noqa: ANN401 - as of Ranks
        """The item itself: each rank is alone on its host."""
        return item

    def allgather(self, item: Any) -> list[Any]:  # noqa: ANN401 - as of Ranks
        """Not here: it would wait for the other ranks outside the event loop."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Likewise."""
        raise NotImplementedError

    def clock_offset(self) -> ClockOffset:
        """Likewise."""
        raise NotImplementedError
