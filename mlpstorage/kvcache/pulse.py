"""Signs of life between ranks, from their start to their end: a rank that stands still, or is gone, ends the run.

They are carried by a thread of their own, whatever a rank does meanwhile: open a store, wait for the others, play, or
remove its files. Each rank lets rank 0 hear of it, and rank 0 lets all others and the launcher hear of it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mlpstorage.config import EXIT_CODE
from mlpstorage.kvcache.events import Alive, EventWriter, Silent, SilentRank
from mlpstorage.kvcache.ranks import Ranks
from mlpstorage.measure.clock import NS, Clock

LOOK_EVERY_S = 0.25
"""How often a rank looks for signs of life."""

BEAT_NS = NS
"""How often a rank gives one."""

SILENCE_S = 10.0
"""A rank that was not heard of for so long is stopped, or its host is gone."""

STILL_S = 15.0
"""A rank in which no thread has run for so long hangs in its storage. One that waits for others does run: MPI waits by
looking all the time."""

_COUNTED_S = 1.0
"""Most seconds that count between two looks: who did not look has heard nobody, and stood still itself."""

_NEGLIGIBLE_S = 5.0
"""Whoever else has been still for less is not named beside one that hangs."""

Activity = Callable[[], object]
"""What changes as soon as a thread of this process has run; None where that is unknown."""


class Silence:
    """How long each rank was not heard of."""

    def __init__(self, ranks: Iterable[int], limit_s: float = SILENCE_S) -> None:
        self._limit_s = limit_s
        self._silent_s = dict.fromkeys(ranks, 0.0)

    def heard(self, rank: int) -> None:
        """A message of it is here."""
        if rank in self._silent_s:
            self._silent_s[rank] = 0.0

    def passed(self, time_s: float) -> dict[int, float]:
        """Time has passed since the last look for messages; returns the ranks that hang, with their silence in s.

        Of a long time little counts: then it was this rank that stood still, and messages of the others wait.
        """
        for rank in self._silent_s:
            self._silent_s[rank] += min(time_s, _COUNTED_S)
        return {rank: silent_s for rank, silent_s in self._silent_s.items() if silent_s >= self._limit_s}


class Pulse:
    """This rank's part.

    Args:
        ranks: All ranks.
        hosts: Host of each.
        clock: This rank's.
        writer: Where rank 0 tells the launcher.
        finals: Results of ranks that have finished, as JSON, as far as this rank knows them.
        activity: Of this process.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        hosts: Sequence[str],
        clock: Clock,
        writer: EventWriter,
        finals: Mapping[int, str],
        activity: Activity,
    ) -> None:
        self._ranks = ranks
        self._hosts = hosts
        self._clock = clock
        self._writer = writer
        self._finals = finals
        self._activity = activity
        self._still_limit_s = STILL_S
        self._others = range(1, ranks.size) if ranks.rank == 0 else (0,)
        self._silence = Silence(self._others)
        self._still_s = dict.fromkeys((ranks.rank, *self._others), 0.0)
        self._seen: object = None
        self._looked_ns = self._beat_ns = clock.now_ns()

    def bear(self, still_s: float) -> None:
        """Let ranks stand still for so long."""
        self._still_limit_s = still_s

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life, and look for those of the others, until the block is left."""
        ended = threading.Event()

        def beat() -> None:
            self._looked_ns = self._beat_ns = self._clock.now_ns()
            while not ended.wait(LOOK_EVERY_S):
                self.look()

        # A rank that no launcher has started has nobody to tell.
        thread = threading.Thread(target=beat, name="pulse", daemon=True) if self._ranks.launched else None
        if thread is not None:
            thread.start()
        try:
            yield
        finally:
            if thread is not None:
                ended.set()
                thread.join()

    def look(self) -> None:
        """Count what has come and what has not, and give a sign of life where it is due; ends all where one hangs."""
        now_ns = self._clock.now_ns()
        passed_s, self._looked_ns = (now_ns - self._looked_ns) / NS, now_ns
        for source, still_s in self._ranks.beats():
            self._silence.heard(source)
            self._still_s[source] = still_s
        self._watch_this_rank(passed_s)
        silent = self._silence.passed(passed_s)
        # Rank 0 knows them all; what another one says of itself goes there.
        still = {rank: still_s for rank, still_s in self._still_s.items() if rank in self._others or not rank}
        if silent or max(still.values()) >= self._still_limit_s:
            hung = {rank: still_s for rank, still_s in still.items() if still_s >= _NEGLIGIBLE_S}
            self._give_up(silent or hung, still=not silent)
        if now_ns >= self._beat_ns:
            self._beat_ns = now_ns + BEAT_NS
            for other in self._others:
                self._ranks.beat(self._still_s[self._ranks.rank], other)
            if self._ranks.rank == 0:
                self._writer.send(Alive())

    def _watch_this_rank(self, passed_s: float) -> None:
        seen = self._activity()
        stands_still = seen is not None and seen == self._seen
        self._seen = seen
        mine = self._ranks.rank
        self._still_s[mine] = self._still_s[mine] + min(passed_s, _COUNTED_S) if stands_still else 0.0

    def _give_up(self, hung: Mapping[int, float], *, still: bool) -> None:
        """Say which ranks hang, keep what is complete, and end all."""
        self._writer.speak()
        for result in list(self._finals.values()):
            self._writer.line(f'{{"type":"snapshot","result":{result}}}')
        silent = (
            SilentRank(rank=rank, host=self._hosts[rank], silent_s=round(hung_s, 1), still=still)
            for rank, hung_s in hung.items()
        )
        self._writer.send(Silent(ranks=tuple(silent)))
        self._ranks.abort(int(EXIT_CODE.TIMEOUT))
