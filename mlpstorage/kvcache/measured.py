"""What a rank measured, in the shape in which it is handed to the launcher."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.config import EXIT_CODE, RunStatus
from mlpstorage.kvcache.play import Ending, Played, Stop
from mlpstorage.kvcache.prepare import Prepared, is_buffered
from mlpstorage.kvcache.ranks import ClockOffset, Ranks
from mlpstorage.kvcache.recorder import counts
from mlpstorage.measure.clock import NS
from mlpstorage.results.models import (
    HistogramData,
    RankClient,
    RankClock,
    RankError,
    RankResult,
    RankWindow,
    RequestCounts,
    ReuseDistanceData,
    SignedHistogramData,
    StorageCounts,
    TtftCounts,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a rank's results tell of it, besides what was played.

    Attributes:
        io_before: Bytes that the process had read and written when it began; None where the kernel does not tell.
    """

    prepared: Prepared
    run_id: str
    ranks: Ranks
    offset: ClockOffset
    io_before: tuple[int, int] | None

    def result(self, played: Played, status: RunStatus, error: RankError | None) -> RankResult:
        """What it measured, up to now or in all."""
        recorder = played.recorder
        io_after = process_io()
        moved = (
            None
            if self.io_before is None or io_after is None
            else (io_after[0] - self.io_before[0], io_after[1] - self.io_before[1])
        )
        facts = self.prepared.facts
        assert facts is not None, "its host's lowest rank has told them"
        cores = facts["usable_cores"]
        assert isinstance(cores, int)
        return RankResult(
            run_id=self.run_id,
            rank=self.ranks.rank,
            host=os.uname().nodename,
            status=status,
            error=error,
            workload_digest=self.prepared.workload.digest,
            clock=RankClock(
                offset_ns=self.offset.offset_ns,
                offset_error_ns=self.offset.error_ns,
                start_late_ns=played.late_ns,
            ),
            window=RankWindow(
                start_unix_s=played.started_unix_s,
                warmup_s=played.warmup_ns / NS,
                warmup_steady=played.warmup_steady,
                measured_s=played.measured_ns / NS,
                drain_s=played.drain_ns / NS,
                requests_in_flight_at_end=played.in_flight_at_end,
            ),
            requests=RequestCounts.model_validate(counts(recorder.requests)),
            first_tokens=TtftCounts.model_validate(counts(recorder.first_tokens)),
            saved=SignedHistogramData.of(recorder.saved),
            reuse_distance=ReuseDistanceData(
                first_uses=played.reuse.first_uses,
                distances=dict(played.reuse.distances),
                sample_weight=played.reuse.sample_weight,
            ),
            operations_digest=played.operations_digest,
            storage=StorageCounts.model_validate(counts(recorder.window)),
            storage_total=StorageCounts.model_validate(counts(recorder.total)),
            latency={name: HistogramData.of(histogram) for name, histogram in recorder.latency.items()},
            client=RankClient(
                cpu_s=played.cpu_s,
                payload_cpu_s=played.payload_cpu_s,
                sampling_cpu_s=played.sampling_cpu_s,
                cpu_wait_s=played.cpu_wait_s,
                cores=cores,
                max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                os_read_bytes=None if moved is None else moved[0],
                os_written_bytes=None if moved is None else moved[1],
                loop_lag=HistogramData.of(played.loop_lag),
            ),
            verify_failures=played.failures,
            dropped_page_cache_bytes=played.dropped_page_cache_bytes if is_buffered(self.prepared.store) else 0,
            reuse=None if self.prepared.found is None else self.prepared.found.reuse,
            host_facts=facts,
            samples=played.samples,
            host_samples=played.host_samples,
        )


def verdict(played: Played, stop: Stop) -> tuple[RunStatus, RankError | None]:
    """How the run ended for a rank, and why where it did not end well."""
    if played.error is not None:
        return RunStatus.FAILED, RankError(exit_code=played.error.exit_code, message=str(played.error))
    if played.ending is Ending.INTERRUPTED:
        return RunStatus.INTERRUPTED, RankError(exit_code=EXIT_CODE.INTERRUPTED, message=stop.reason)
    if not played.recorder.requests.completed:
        return RunStatus.FAILED, RankError(
            exit_code=EXIT_CODE.FAILURE,
            message="no request was answered inside the measured window: there is nothing to report. Lengthen "
            "--duration, shorten --warmup, or play faster (--generation-mode, --time-scale)",
        )
    return RunStatus.COMPLETE, None


def process_io() -> tuple[int, int] | None:
    """Bytes that this process had read from and written to storage, by the kernel's count; None where it has none."""
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
    except OSError:
        return None
    values = dict(line.split(": ", 1) for line in text.splitlines())
    return int(values["read_bytes"]), int(values["write_bytes"])
