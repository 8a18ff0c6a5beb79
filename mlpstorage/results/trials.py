"""Several trials of one run: how much they differ, and their results as if they were one long run."""

import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

from mlpstorage.measure.histogram import Histogram, SignedHistogram
from mlpstorage.results.adding import added, added_buckets, joined_digest, sum_or_none
from mlpstorage.results.models import (
    HistogramData,
    HostSample,
    RankClient,
    RankClock,
    RankResult,
    RankWindow,
    RequestCounts,
    ReuseDistanceData,
    Sample,
    SignedHistogramData,
    StorageCounts,
    TtftCounts,
)
from mlpstorage.results.summary import (
    Spread,
    Summary,
    Trials,
)

SampleT = TypeVar("SampleT", Sample, HostSample)


def compared(summaries: Sequence[Summary]) -> Trials:
    """How much the main numbers differ from trial to trial."""
    return Trials(
        count=len(summaries),
        storage_gib_per_s=_spread([_storage_gib_per_s(one) for one in summaries]),
        read_gib_per_s=_spread([one.storage.read_gib_per_s for one in summaries]),
        write_gib_per_s=_spread([one.storage.write_gib_per_s for one in summaries]),
        requests_per_s=_spread([one.requests.rate_per_s for one in summaries]),
        hit_ratio_tokens=_spread([one.hit_ratio.tokens.total for one in summaries]),
        ttft_p50_ms=_spread([one.latency["ttft"].p50_ms for one in summaries]),
        ttft_p95_ms=_spread([one.latency["ttft"].p95_ms for one in summaries]),
    )


def pooled(trials: Sequence[Sequence[RankResult]]) -> tuple[RankResult, ...]:
    """Each rank's results of all trials as one: counts, times and histograms are added, the worst status stays."""
    of_rank: dict[int, list[RankResult]] = {}
    for trial in trials:
        for result in trial:
            of_rank.setdefault(result.rank, []).append(result)
    return tuple(_pooled_rank(results) for _, results in sorted(of_rank.items()))


def _storage_gib_per_s(summary: Summary) -> float | None:
    read, written = summary.storage.read_gib_per_s, summary.storage.write_gib_per_s
    return None if read is None or written is None else read + written


def _spread(numbers: Sequence[float | None]) -> Spread | None:
    values = [value for value in numbers if value is not None]
    if not values or len(values) != len(numbers):
        return None
    mean = statistics.fmean(values)
    stdev = statistics.stdev(values) if len(values) > 1 else None
    return Spread(
        values=tuple(values),
        mean=mean,
        min=min(values),
        max=max(values),
        stdev=stdev,
        cv=None if stdev is None or not mean else stdev / mean,
    )


def _pooled_rank(results: Sequence[RankResult]) -> RankResult:
    if len(results) == 1:
        return results[0]
    last = results[-1]
    windows = [one.window for one in results]
    steady = [one.warmup_steady for one in windows if one.warmup_steady is not None]
    return last.model_copy(
        update={
            "workload_digest": _one_digest([one.workload_digest for one in results]),
            "operations_digest": _one_digest([one.operations_digest for one in results]),
            "clock": RankClock(
                offset_ns=last.clock.offset_ns,
                offset_error_ns=max(one.clock.offset_error_ns for one in results),
                start_late_ns=max(one.clock.start_late_ns for one in results),
            ),
            "window": RankWindow(
                start_unix_s=windows[0].start_unix_s,
                warmup_s=sum(one.warmup_s for one in windows),
                warmup_steady=all(steady) if steady else None,
                measured_s=sum(one.measured_s for one in windows),
                drain_s=sum(one.drain_s for one in windows),
                requests_in_flight_at_end=sum(one.requests_in_flight_at_end for one in windows),
            ),
            "requests": added(RequestCounts, [one.requests for one in results]),
            "first_tokens": added(TtftCounts, [one.first_tokens for one in results]),
            "saved": SignedHistogramData.of(SignedHistogram.merged(one.saved.restore() for one in results)),
            "reuse_distance": ReuseDistanceData(
                first_uses=sum(one.reuse_distance.first_uses for one in results),
                distances=added_buckets([one.reuse_distance.distances for one in results]),
                sample_weight=max(one.reuse_distance.sample_weight for one in results),
            ),
            "storage": added(StorageCounts, [one.storage for one in results]),
            "storage_total": added(StorageCounts, [one.storage_total for one in results]),
            "latency": {name: _merged([one.latency[name] for one in results]) for name in last.latency},
            "client": _pooled_client([one.client for one in results]),
            "verify_failures": tuple(failure for one in results for failure in one.verify_failures),
            "dropped_page_cache_bytes": sum_or_none(one.dropped_page_cache_bytes for one in results),
            "samples": tuple(_one_after_the_other([one.samples for one in results], _ends_s(results))),
            "host_samples": tuple(_one_after_the_other([one.host_samples for one in results], _ends_s(results))),
        }
    )


def _pooled_client(clients: Sequence[RankClient]) -> RankClient:
    waits_s = [one.cpu_wait_s for one in clients if one.cpu_wait_s is not None]
    return RankClient(
        cpu_s=sum(one.cpu_s for one in clients),
        payload_cpu_s=sum(one.payload_cpu_s for one in clients),
        sampling_cpu_s=sum(one.sampling_cpu_s for one in clients),
        cpu_wait_s=sum(waits_s) if len(waits_s) == len(clients) else None,
        cores=max(one.cores for one in clients),
        max_rss_bytes=max(one.max_rss_bytes for one in clients),
        os_read_bytes=sum_or_none(one.os_read_bytes for one in clients),
        os_written_bytes=sum_or_none(one.os_written_bytes for one in clients),
        loop_lag=_merged([one.loop_lag for one in clients]),
    )


def _merged(histograms: Sequence[HistogramData]) -> HistogramData:
    return HistogramData.of(Histogram.merged(one.restore() for one in histograms))


def _one_digest(digests: Sequence[str]) -> str:
    """The digest that all trials have, or one of them all where they differ."""
    return joined_digest(digests[:1] if len(set(digests)) == 1 else digests)


def _ends_s(trials: Sequence[RankResult]) -> list[float]:
    """When the last line of each trial was taken."""
    return [
        max([line.t_s for line in one.samples] + [line.t_s for line in one.host_samples], default=0.0) for one in trials
    ]


def _one_after_the_other(trials: Sequence[Sequence[SampleT]], ends_s: Sequence[float]) -> Iterator[SampleT]:
    """The time series of the trials, each beginning where the one before ended."""
    begin_s = 0.0
    for samples, end_s in zip(trials, ends_s, strict=True):
        for sample in samples:
            yield sample.model_copy(update={"t_s": round(begin_s + sample.t_s, 3)})
        begin_s += end_s
