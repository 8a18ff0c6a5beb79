"""What a rank counts while it plays. Only what completes inside the measured window counts as measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from mlpstorage.config import Tier
from mlpstorage.kvcache.first_token import FirstToken, TtftTally
from mlpstorage.measure.histogram import Histogram, SignedHistogram
from mlpstorage.results.models import LATENCIES
from mlpstorage.storage.ops import OpDone, OperationSkippedError, OpKind, is_gone
from mlpstorage.storage.payload import VerifyError

FAILURES_KEPT = 100
"""Messages of verification failures that are kept; all are counted."""


@dataclass(slots=True)
class StorageTally:
    """Running counts of storage operations; the fields are those of `results.models.StorageCounts`."""

    read_bytes: int = 0
    written_bytes: int = 0
    padding_bytes: int = 0
    deleted_bytes: int = 0
    read_ops: int = 0
    write_ops: int = 0
    delete_ops: int = 0
    sync_ops: int = 0
    retries: int = 0
    direct_files: int = 0
    buffered_files: int = 0
    page_cache_bytes: int | None = 0
    io_errors: int = 0
    verify_errors: int = 0
    verified_bytes: int = 0
    writes_dropped: int = 0
    writes_deferred: int = 0
    dedup_skipped_bytes: int = 0
    exists_ops: int = 0
    reads_gone: int = 0
    deletes_gone: int = 0

    def add(
        self, kind: OpKind, tried: Sequence[OpDone], object_bytes: int, padding_bytes: int, *, shared: bool = False
    ) -> None:
        """Count storage operations of one kind that were tried. Tries beyond the first count whatever became of them.

        What is `shared` other ranks may have deleted: that is no error.
        """
        self.retries += sum([done.retries for done in tried])
        succeeded = [done for done in tried if done.error is None]
        if len(succeeded) < len(tried):
            for done in tried:
                if done.error is not None:
                    self._add_failed(done, shared=shared)
        count = len(succeeded)
        match kind:
            case OpKind.READ:
                self.read_ops += count
                self.read_bytes += count * object_bytes
                self.padding_bytes += count * padding_bytes
                self.verified_bytes += sum([done.verified_bytes for done in succeeded])
                for done in succeeded:
                    known = done.page_cache_bytes
                    if known is None or self.page_cache_bytes is None:
                        self.page_cache_bytes = None
                    else:
                        self.page_cache_bytes += known
            case OpKind.WRITE:
                self.write_ops += count
                self.written_bytes += count * object_bytes
                self.padding_bytes += count * padding_bytes
            case OpKind.DELETE:
                self.delete_ops += count
                self.deleted_bytes += count * object_bytes
            case _:
                self.sync_ops += count
        direct = [done.direct for done in succeeded]
        self.direct_files += direct.count(True)
        self.buffered_files += direct.count(False)

    def _add_failed(self, done: OpDone, *, shared: bool) -> None:
        if isinstance(done.error, VerifyError):
            self.verify_errors += 1
        elif not shared or not is_gone(done):
            self.io_errors += 1
        elif done.op.kind is OpKind.READ:
            self.reads_gone += 1
        else:
            self.deletes_gone += 1


@dataclass(slots=True)
class TierTally:
    """A running count for each tier."""

    gpu: int = 0
    cpu: int = 0
    storage: int = 0

    def add(self, counted: Mapping[Tier, int]) -> None:
        """Add each tier's count."""
        self.gpu += counted[Tier.GPU]
        self.cpu += counted[Tier.CPU]
        self.storage += counted[Tier.STORAGE]


@dataclass(slots=True)
class RequestTally:
    """Running counts of requests; the fields are those of `results.models.RequestCounts`."""

    completed: int = 0
    failed: int = 0
    loads_skipped: int = 0
    loads_abandoned: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prompt_blocks: int = 0
    cached_tokens: TierTally = field(default_factory=TierTally)
    hit_blocks: TierTally = field(default_factory=TierTally)
    cross_rank_tokens: int = 0
    cross_rank_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A request whose answer is complete, and what was found for it."""

    done_ns: int
    prompt_tokens: int
    output_tokens: int
    prompt_blocks: int
    cached_tokens: dict[Tier, int]
    hit_blocks: dict[Tier, int]
    load_skipped: bool
    load_abandoned: bool
    cross_rank_tokens: int = 0
    cross_rank_blocks: int = 0


_LATENCY_OF = {
    OpKind.READ: "storage_read",
    OpKind.WRITE: "storage_write",
    OpKind.DELETE: "storage_delete",
    OpKind.SYNC: "storage_sync",
}


class Recorder:
    """Counts of the window and of the whole run.

    Args:
        object_bytes: Payload of one object.
        stored_bytes: The same with padding.
        ttft_target_ns: Target of the verdict.
        window_ns: First and last-but-one nanosecond of the measured window, by the rank's clock; None where that is
            not known yet, so that nothing lies inside.
        shared: Whether other ranks delete objects, too, so that one that is gone is no error.

    Attributes:
        window: Storage operations inside the window.
        total: The same of the whole run.
        requests: Requests inside the window.
        total_requests: The same of the whole run.
        first_tokens: First tokens inside the window.
        saved: What the cache saved each of them.
        latency: The latencies inside the window, by name.
        payload_ns: Processor time inside the window that payloads took.
        verify_failures: Reads of the whole run that did not get what had been written, copies from DRAM among them.
        failures: Messages of the first `FAILURES_KEPT` of them.
    """

    def __init__(
        self,
        *,
        object_bytes: int,
        stored_bytes: int,
        ttft_target_ns: int,
        window_ns: tuple[int, int] | None = None,
        shared: bool = False,
    ) -> None:
        self._shared = shared
        self._object_bytes = object_bytes
        self._ttft_target_ns = ttft_target_ns
        self._padding_bytes = stored_bytes - object_bytes
        self._start_ns, self._end_ns = window_ns or (0, 0)
        self.payload_ns = 0
        self.verify_failures = 0
        self.failures: list[str] = []
        self.window = StorageTally()
        self.total = StorageTally()
        self.requests = RequestTally()
        self.total_requests = RequestTally()
        self.first_tokens = TtftTally()
        self.saved = SignedHistogram()
        self.latency = {name: Histogram() for name in LATENCIES}

    def inside(self, at_ns: int) -> bool:
        """Whether `at_ns` lies inside the measured window."""
        return self._start_ns <= at_ns < self._end_ns

    def open(self, window_ns: tuple[int, int]) -> None:
        """Say when the window is; see `window_ns` of the class."""
        self._start_ns, self._end_ns = window_ns

    @property
    def start_ns(self) -> int | None:
        """When the window begins; None where that is not known yet."""
        return self._start_ns if self._end_ns else None

    def close(self, at_ns: int) -> None:
        """End the window now, where it has not ended: the run stopped early."""
        self._end_ns = min(self._end_ns, at_ns)

    @property
    def measured_ns(self) -> int:
        """True length of the window."""
        return max(self._end_ns - self._start_ns, 0)

    def measured_until(self, at_ns: int) -> int:
        """Length of the window as far as it is over at `at_ns`."""
        return max(min(self._end_ns, at_ns) - self._start_ns, 0)

    def operations(self, finished: Sequence[OpDone]) -> None:
        """Count finished operations of the I/O engine. Those that were never tried do not count."""
        tried = finished
        if [done for done in finished if done.error is not None]:
            tried = [done for done in finished if not isinstance(done.error, OperationSkippedError)]
            self._keep_wrong(tried)
        start_ns, end_ns = self._start_ns, self._end_ns
        inside = [done for done in tried if start_ns <= done.end_ns < end_ns]
        self.payload_ns += sum([done.payload_ns for done in inside])
        self.latency["queue_wait"].record_all([done.start_ns - done.queued_ns for done in inside])
        for kind in {done.op.kind for done in tried}.intersection(_LATENCY_OF):
            self.total.add(kind, _of(kind, tried), self._object_bytes, self._padding_bytes, shared=self._shared)
            measured = _of(kind, inside)
            self.window.add(kind, measured, self._object_bytes, self._padding_bytes, shared=self._shared)
            self.latency[_LATENCY_OF[kind]].record_all(
                [done.end_ns - done.start_ns for done in measured if done.error is None]
            )

    def _keep_wrong(self, tried: Iterable[OpDone]) -> None:
        """Count reads that did not get what had been written."""
        for done in tried:
            if isinstance(done.error, VerifyError):
                self.verify_failures += 1
                if len(self.failures) < FAILURES_KEPT:
                    self.failures.append(str(done.error))

    def looked_for(self, start_ns: int, end_ns: int, objects: int) -> None:
        """Count a check which of so many objects another rank has written."""
        self.took("existence_check", start_ns, end_ns)
        self.total.exists_ops += objects
        if self.inside(end_ns):
            self.window.exists_ops += objects

    def took(self, latency: str, start_ns: int, end_ns: int) -> None:
        """Count a latency that ended at `end_ns`."""
        if self.inside(end_ns):
            self.latency[latency].record(end_ns - start_ns)

    def took_each(self, latency: str, spans_ns: Iterable[tuple[int, int]]) -> None:
        """Count latencies of one kind, each from its begin to its end."""
        first_ns, last_ns = self._start_ns, self._end_ns
        self.latency[latency].record_all([end - start for start, end in spans_ns if first_ns <= end < last_ns])

    def answered(self, request: Answered) -> None:
        """Count a request that was answered."""
        self._count(self.total_requests, request)
        if self.inside(request.done_ns):
            self._count(self.requests, request)

    def first_token(self, token: FirstToken) -> None:
        """Count a time to first token."""
        if not self.inside(token.at_ns):
            return
        self.first_tokens.add(token, self._ttft_target_ns)
        self.latency["ttft"].record(token.ttft_ns)
        self.latency["client_late"].record(token.client_late_ns)
        self.latency["prefill_queue"].record(token.prefill_queue_ns)
        if token.storage_load_tokens:
            self.latency["storage_load"].record(token.storage_load_ns)
        if token.without_cache_ns is not None:
            self.latency["ttft_without_cache"].record(token.without_cache_ns)
        if token.without_storage_ns is not None:
            self.latency["ttft_without_storage"].record(token.without_storage_ns)
        if token.saved_ns is not None:
            self.saved.record(token.saved_ns)

    def failed(self, at_ns: int) -> None:
        """Count a request that failed."""
        self.total_requests.failed += 1
        if self.inside(at_ns):
            self.requests.failed += 1

    def dropped(self, at_ns: int, blocks: int) -> None:
        """Count blocks that should have been stored and were not."""
        self.total.writes_dropped += blocks
        if self.inside(at_ns):
            self.window.writes_dropped += blocks

    def deferred(self, at_ns: int, blocks: int) -> None:
        """Count blocks that were not stored because it was their first use."""
        self.total.writes_deferred += blocks
        if self.inside(at_ns):
            self.window.writes_deferred += blocks

    def deduplicated(self, at_ns: int, objects: int) -> None:
        """Count objects of new blocks that storage had already, or was about to have."""
        self.total.dedup_skipped_bytes += objects * self._object_bytes
        if self.inside(at_ns):
            self.window.dedup_skipped_bytes += objects * self._object_bytes

    @staticmethod
    def _count(tally: RequestTally, request: Answered) -> None:
        tally.completed += 1
        tally.loads_skipped += request.load_skipped
        tally.loads_abandoned += request.load_abandoned
        tally.prompt_tokens += request.prompt_tokens
        tally.output_tokens += request.output_tokens
        tally.prompt_blocks += request.prompt_blocks
        tally.cross_rank_tokens += request.cross_rank_tokens
        tally.cross_rank_blocks += request.cross_rank_blocks
        tally.cached_tokens.add(request.cached_tokens)
        tally.hit_blocks.add(request.hit_blocks)


def _of(kind: OpKind, finished: Sequence[OpDone]) -> Sequence[OpDone]:
    """The operations of one kind."""
    return [done for done in finished if done.op.kind is kind]


def counts(tally: StorageTally | RequestTally | TtftTally) -> dict[str, object]:
    """The tally's fields, for a result model."""
    return asdict(tally)
