"""The other ranks of a run: none, or those that the MPI library knows."""

import contextlib
import os
import signal
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

from mlpstorage.errors import ConfigurationError

T = TypeVar("T")

_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""The number of ranks, as Open MPI and MPICH's Hydra tell it."""

_MPI_VARIABLES = (*_MPI_SIZE_VARIABLES, "PMIX_RANK")
"""One of them is set by every launcher; the last one by any that speaks PMIx."""

_FORWARD_S = 1.0
"""Time for the launcher's daemon of this host to hand on what a rank has just written, before it is ended."""

_DAEMON_GRACE_S = 2.0
"""Time for that daemon to end all ranks here, before it is killed."""

OFFSET_ROUND_TRIPS = 20
"""Questions for the time of rank 0; the quickest answer of them counts."""

_QUESTION_TAG, _POST_TAG, _TURN_TAG, _BEAT_TAG = 1, 2, 3, 4

_TURN_POLL_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """How far rank 0's clock is ahead of this rank's, and by how much that may be wrong, in nanoseconds.

    Rank 0 read its clock at some moment between a question and its answer. The offset takes the middle for that moment,
    so that it cannot be further off than half of the round trip, however unequal the two ways are.
    """

    offset_ns: int
    error_ns: int

    @classmethod
    def of_round_trip(cls, asked_ns: int, told_ns: int, answered_ns: int) -> "ClockOffset":
        """From the moments of question and answer by this rank's clock, and what rank 0's clock said in between."""
        trip_ns = max(answered_ns - asked_ns, 0)
        # Both halves rounded up: the bound holds for odd round trips too.
        return cls(offset_ns=told_ns - asked_ns - trip_ns // 2, error_ns=-(-trip_ns // 2))


class Ranks(Protocol):
    """This rank's number, and what ranks do together."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of all ranks."""
        ...

    @property
    def launched(self) -> bool:
        """Whether an MPI launcher has started this rank."""
        ...

    @property
    def ranks_on_host(self) -> int:
        """Ranks that share this host's memory and file systems."""
        ...

    @property
    def number_on_host(self) -> int:
        """Number of this rank among those of its host, 0 for the lowest."""
        ...

    @property
    def lowest_on_host(self) -> bool:
        """Whether this rank is the lowest of its host, which does what a host needs once."""
        ...

    def told_on_host(self, item: T) -> T:
        """The item of the lowest rank on this host, for all ranks on it."""
        ...

    def allgather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, for every rank."""
        ...

    def barrier(self) -> None:
        """Return when every rank is here."""
        ...

    def clock_offset(self) -> ClockOffset:
        """Compare `time.perf_counter_ns` with rank 0's; all ranks do it together."""
        ...

    def post(self, message: object, to: int) -> None:
        """Begin to send a message to another rank; `arrived` of both goes on with it."""
        ...

    def arrived(self) -> list[tuple[int, Any]]:
        """Messages that are here, each with the rank that posted it, one rank's in their order. Waits for nothing."""
        ...

    def beat(self, still_s: float, to: int) -> None:
        """Give another rank a sign of life, and say how long nothing has gone on here; of any thread."""
        ...

    def beats(self) -> list[tuple[int, float]]:
        """Signs of life that are here, each with its rank, in their order; of the thread that gives them."""
        ...

    def settle(self) -> None:
        """Have all that is on its way to this rank arrive; all ranks do it together, when none sends any more."""
        ...

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks at once, those that hang too."""
        ...


class Alone:
    """A run of one rank."""

    rank = 0
    size = 1
    launched = False
    ranks_on_host = 1
    number_on_host = 0
    lowest_on_host = True

    def told_on_host(self, item: T) -> T:
        """The one item."""
        return item

    def allgather(self, item: T) -> list[T]:
        """The one item."""
        return [item]

    def barrier(self) -> None:
        """Everybody is here."""

    def clock_offset(self) -> ClockOffset:
        """The clock is rank 0's."""
        return ClockOffset(offset_ns=0, error_ns=0)

    def post(self, message: object, to: int) -> None:
        """There is nobody to post to."""
        raise ValueError(f"rank {to} does not exist: {message!r} is for nobody")

    def arrived(self) -> list[tuple[int, Any]]:
        """Nobody posts."""
        return []

    def beat(self, still_s: float, to: int) -> None:
        """There is nobody to hear it."""
        raise ValueError(f"rank {to} does not exist: nobody hears that this one is still for {still_s} s")

    def beats(self) -> list[tuple[int, float]]:
        """Nobody gives one."""
        return []

    def settle(self) -> None:
        """Nothing is on its way."""

    def abort(self, exit_code: int) -> NoReturn:
        """End this process at once."""
        os._exit(exit_code)


class MpiRanks:
    """The ranks of MPI's world. MPI is called from the thread that made this, and from no other."""

    def __init__(self) -> None:
        from mpi4py import MPI  # noqa: PLC0415 - an optional package; importing it starts MPI

        self._mpi = MPI
        self._daemon = os.getppid()
        self.launched = True
        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self._on_host = self._world.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self.ranks_on_host: int = self._on_host.Get_size()
        self.number_on_host: int = self._on_host.Get_rank()
        self.lowest_on_host: bool = self.number_on_host == 0
        self._posted: list[MPI.Request] = []
        self._beating: list[MPI.Request] = []
        self._sent = {tag: [0] * self.size for tag in (_POST_TAG, _BEAT_TAG)}
        self._taken = dict.fromkeys((_POST_TAG, _BEAT_TAG), 0)
        self._coming: list[tuple[int, MPI.Request]] = []

    def told_on_host(self, item: T) -> T:
        """The item of the lowest rank on this host, for all ranks on it."""
        told: T = self._on_host.bcast(item, root=0)
        return told

    def allgather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, for every rank."""
        items: list[T] = self._world.allgather(item)
        return items

    def barrier(self) -> None:
        """Return when every rank is here."""
        self._world.Barrier()

    def clock_offset(self) -> ClockOffset:
        """Compare `time.perf_counter_ns` with rank 0's, one rank after the other; all ranks do it together."""
        if self.rank:
            return self._ask_time()
        for other in range(1, self.size):
            self._tell_time(other)
        return ClockOffset(offset_ns=0, error_ns=0)

    def _tell_time(self, other: int) -> None:
        """Answer the questions of one rank."""
        buffer = array("q", [0])
        self._world.Send(buffer, dest=other, tag=_TURN_TAG)
        for _ in range(OFFSET_ROUND_TRIPS):
            self._world.Recv(buffer, source=other, tag=_QUESTION_TAG)
            buffer[0] = time.perf_counter_ns()
            self._world.Send(buffer, dest=other, tag=_QUESTION_TAG)

    def _ask_time(self) -> ClockOffset:
        """Ask rank 0 for the time; what the quickest answer tells."""
        told, buffer = [], array("q", [0])
        # Asleep until it is this rank's turn: MPI waits by looking all the time, and many ranks may share a processor.
        while not self._world.Iprobe(source=0, tag=_TURN_TAG):
            time.sleep(_TURN_POLL_S)
        self._world.Recv(buffer, source=0, tag=_TURN_TAG)
        for _ in range(OFFSET_ROUND_TRIPS):
            asked_ns = time.perf_counter_ns()
            self._world.Send(buffer, dest=0, tag=_QUESTION_TAG)
            self._world.Recv(buffer, source=0, tag=_QUESTION_TAG)
            told.append(ClockOffset.of_round_trip(asked_ns, buffer[0], time.perf_counter_ns()))
        return min(told, key=lambda one: one.error_ns)

    def post(self, message: object, to: int) -> None:
        """Begin to send a message to another rank; `arrived` of both goes on with it."""
        self._sent[_POST_TAG][to] += 1
        self._posted.append(self._world.isend(message, dest=to, tag=_POST_TAG))

    def arrived(self) -> list[tuple[int, Any]]:
        """Messages that are here, each with the rank that posted it, one rank's in their order. Waits for nothing.

        A large message needs several calls, of the sender and of the receiver, to get across. To wait for it inside MPI
        would hold up the event loop, and for ever where the sender has stopped.
        """
        self._posted = [request for request in self._posted if not request.test()[0]]
        status = self._mpi.Status()
        while (message := self._world.improbe(tag=_POST_TAG, status=status)) is not None:
            self._coming.append((status.Get_source(), message.irecv()))
        here: list[tuple[int, Any]] = []
        coming: list[tuple[int, Any]] = []
        late: set[int] = set()
        for source, request in self._coming:
            done, message = (False, None) if source in late else request.test()
            if done:
                here.append((source, message))
            else:
                late.add(source)
                coming.append((source, request))
        self._coming = coming
        self._taken[_POST_TAG] += len(here)
        return here

    def beat(self, still_s: float, to: int) -> None:
        """Give another rank a sign of life, and say how long nothing has gone on here."""
        self._beating = [request for request in self._beating if not request.Test()]
        self._sent[_BEAT_TAG][to] += 1
        self._beating.append(self._world.Isend(array("d", [still_s]), dest=to, tag=_BEAT_TAG))

    def beats(self) -> list[tuple[int, float]]:
        """Signs of life that are here, each with its rank, in their order."""
        here: list[tuple[int, float]] = []
        buffer, status = array("d", [0.0]), self._mpi.Status()
        while (message := self._world.Improbe(tag=_BEAT_TAG, status=status)) is not None:
            # So little comes at once: there is nothing to wait for.
            message.Recv(buffer)
            here.append((status.Get_source(), buffer[0]))
        self._taken[_BEAT_TAG] += len(here)
        return here

    def settle(self) -> None:
        """Have all that is on its way to this rank arrive.

        MPI's own end may wait for messages that nobody has taken.
        """
        sent = [sum(to) for to in zip(*self._sent.values(), strict=True)]
        due = sum(self._world.alltoall(sent))
        while sum(self._taken.values()) < due or self._posted:
            self.arrived()
            self.beats()
        self._mpi.Request.Waitall(self._beating)

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks at once, those that hang too.

        Not by MPI_Abort, which waits for word from a launcher that may be cut off: the launcher's daemon of this host
        is ended instead. It takes its ranks with it; where the network holds, the launcher notices and ends the others.
        """
        # Its signal ends this process whatever it waits for.
        signal.alarm(round(_FORWARD_S + 3 * _DAEMON_GRACE_S))
        time.sleep(_FORWARD_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline_s = time.monotonic() + _DAEMON_GRACE_S
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._daemon, number)
            while os.getppid() == self._daemon and time.monotonic() < deadline_s:
                time.sleep(0.05)
        os._exit(exit_code)


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks of this run: MPI's where an MPI launcher started this process.

    Raises:
        ConfigurationError: The MPI library is not the launcher's, so that each rank would be a run of its own.
    """
    if not any(variable in environment for variable in _MPI_VARIABLES):
        return Alone()
    ranks = MpiRanks()
    told = next((environment[name] for name in _MPI_SIZE_VARIABLES if name in environment), str(ranks.size))
    if told != str(ranks.size):
        from mpi4py import MPI  # noqa: PLC0415 - as above

        raise ConfigurationError(
            f"the launcher has started {told} ranks, and the MPI library finds {ranks.size}: mpi4py uses "
            f"{MPI.Get_library_version().splitlines()[0].strip()}, which is not the launcher's; set MPI4PY_LIBMPI to "
            "the path of its libmpi.so, or choose another launcher with --mpi-bin"
        )
    return ranks
