"""The program of one rank: `python -m mlpstorage.kvcache.rank`, with the flags of `kvcache run` that concern it.

It claims its directory, plays its share of the workload, tells the launcher through rank 0, and removes its files.
"""

import argparse
import asyncio
import contextlib
import errno
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlpstorage.cli.options import add_options
from mlpstorage.cluster.facts import available_memory_bytes, host_facts
from mlpstorage.config import EXIT_CODE, Layout, RunStatus, Verify
from mlpstorage.errors import AccessError, ConfigurationError, MLPStorageError
from mlpstorage.kvcache.cache import (
    Flushable,
    Found,
    Place,
    claim_place,
    find_blocks,
    make_engine,
    make_store,
    place_warnings,
)
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.events import EventWriter, Finished, Progress, Refused
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.play import DRAIN_LIMIT_S, Ending, Played, Stop, Timing, play
from mlpstorage.kvcache.played import build_workload
from mlpstorage.kvcache.process import Signals, die_with_parent, in_daemon
from mlpstorage.kvcache.ranks import Ranks, find_ranks
from mlpstorage.kvcache.recorder import counts
from mlpstorage.kvcache.threaded_io import ThreadedIO
from mlpstorage.kvcache.workload import Workload
from mlpstorage.measure.clock import NS, MonotonicClock
from mlpstorage.plan.compute import compute_model
from mlpstorage.plan.kvcache import Sizes, check_room, sizes, warmup_s, with_automatic_sizes
from mlpstorage.results.models import (
    HistogramData,
    RankClient,
    RankError,
    RankResult,
    RankWindow,
    RequestCounts,
    ReuseDistanceData,
    SignedHistogramData,
    StorageCounts,
    TtftCounts,
)
from mlpstorage.spec.fields import resolve
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.spec.workload import STEADY
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import BlockStore
from mlpstorage.storage.ops import IoEngine
from mlpstorage.storage.payload import Payload, WriteNumbers

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may hold the interpreter while others wait: Python's 5 ms would show in every latency."""

DRAIN_MARGIN_S = 5.0
"""Longer than an object store is tried again we wait so much for the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that a rank needs before its run begins."""

    spec: KVCacheSpec
    planned: Sizes
    workload: Workload
    facts: dict[str, object]
    place: Place
    store: BlockStore
    found: Found | None
    arena: DramArena
    io_engine: IoEngine
    warnings: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    die_with_parent()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    spec, run_id = parse_arguments(sys.argv[1:] if argv is None else argv)
    ranks = find_ranks()
    writer = EventWriter(speaks=ranks.rank == 0)
    signals = Signals()
    with contextlib.ExitStack() as cleanup:
        prepared, error = _try_to_prepare(spec, run_id, ranks, cleanup, signals)
        exit_code = _agree(ranks, prepared, error, writer)
        if exit_code is None:
            assert prepared is not None, "every rank is prepared where none refused"
            if prepared.place.removal is not None:
                prepared.place.removal.run_begins(keep=spec.keep_cache)
            ranks.barrier()
            result, hung = asyncio.run(_run(prepared, run_id, ranks, writer, signals))
            gathered = ranks.gather(result)
            if gathered is not None:
                writer.send(Finished(ranks=tuple(gathered)))
            exit_code = EXIT_CODE.SUCCESS if result.error is None else EXIT_CODE(result.error.exit_code)
            if hung:
                # A thread hangs in the kernel and cannot be joined; the next run on the directory clears the files.
                os._exit(exit_code)
    # Under mpi4py a rank that ends with an error ends all others: they must have removed their files.
    ranks.barrier()
    return exit_code


def parse_arguments(argv: Sequence[str]) -> tuple[KVCacheSpec, str]:
    """The spec and the run's id from a rank's command line. The environment was resolved by the launcher."""
    parser = argparse.ArgumentParser(prog="mlpstorage.kvcache.rank", allow_abbrev=False)
    add_options(parser, KVCacheSpec, "run")
    parser.add_argument("--run-id", required=True)
    args = parser.parse_args(argv)
    return resolve(KVCacheSpec, args, environment={}).spec, args.run_id


def _try_to_prepare(
    spec: KVCacheSpec, run_id: str, ranks: Ranks, cleanup: contextlib.ExitStack, signals: Signals
) -> tuple[Prepared | None, MLPStorageError | None]:
    try:
        prepared = _prepare(spec, run_id, ranks, cleanup)
        signals.preparing = False
    except MLPStorageError as error:
        signals.preparing = False
        return None, error
    except OSError as error:
        signals.preparing = False
        return None, _as_refusal(error)
    return prepared, None


def _as_refusal(error: OSError) -> MLPStorageError:
    """The system's error as the user's."""
    kind = AccessError if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS} else ConfigurationError
    where = f"{error.filename}: " if error.filename else ""
    return kind(f"{where}{error.strerror or error}; choose a place that can be used with --cache-dir")


def _prepare(spec: KVCacheSpec, run_id: str, ranks: Ranks, cleanup: contextlib.ExitStack) -> Prepared:
    """Check the host, claim the place and make everything ready; `cleanup` takes it back."""
    workload = build_workload(spec, ranks.rank, ranks.size)
    place = claim_place(spec, sizes(spec), run_id, ranks, cleanup)
    spec, planned = _fitted(spec, place, ranks)
    store = make_store(spec, planned, place)
    store.open()
    cleanup.callback(store.close)
    if spec.keep_cache and isinstance(store, Flushable):
        cleanup.callback(store.flush)
    found = find_blocks(store, place.keys) if place.claim is not None and place.claim.reused else None
    arena = DramArena(planned.cpu_blocks or 0, planned.stored_block_bytes)
    cleanup.callback(arena.close)
    writes = None if spec.verify is Verify.OFF else WriteNumbers()
    payload = Payload(place.keys, planned.stored_bytes, spec.verify, buffers=spec.depth, writes=writes)
    io_engine = make_engine(spec, store, payload, arena)
    io_engine.start()
    cleanup.callback(io_engine.close)
    return Prepared(
        spec=spec,
        planned=planned,
        workload=workload,
        facts=host_facts(place.objects if isinstance(place.objects, Path) else None),
        place=place,
        store=store,
        found=found,
        arena=arena,
        io_engine=io_engine,
        warnings=tuple(place_warnings(place, store, found)),
    )


def _fitted(spec: KVCacheSpec, place: Place, ranks: Ranks) -> tuple[KVCacheSpec, Sizes]:
    """The spec with every size worked out for this host, and the sizes that follow; refused where they do not fit."""
    memory_bytes = available_memory_bytes()
    spec = with_automatic_sizes(
        spec,
        memory_free_bytes=memory_bytes,
        space=place.space,
        ranks_on_host=ranks.ranks_on_host,
    )
    planned = sizes(spec)
    check_room(
        spec,
        planned,
        memory_free_bytes=memory_bytes,
        storage_free_bytes=None if place.space is None else place.space.free_bytes,
        ranks_on_host=ranks.ranks_on_host,
        where="" if place.claim is None else place.claim.place,
    )
    return spec, planned


def _agree(
    ranks: Ranks, prepared: Prepared | None, error: MLPStorageError | None, writer: EventWriter
) -> EXIT_CODE | None:
    """Begin only where every rank can; else the exit code of the first that cannot."""
    host = os.uname().nodename
    mine = None if error is None else (int(error.exit_code), str(error), host)
    told = ranks.allgather((mine, () if prepared is None else prepared.warnings))
    for _, warnings in told:
        writer.warn(warnings)
    for number, (problem, _) in enumerate(told):
        if problem is not None:
            exit_code, message, where = problem
            writer.send(
                Refused(
                    exit_code=exit_code,
                    message=message if ranks.size == 1 else f"rank {number} on {where}: {message}",
                )
            )
            return EXIT_CODE(exit_code)
    return None


async def _run(
    prepared: Prepared, run_id: str, ranks: Ranks, writer: EventWriter, signals: Signals
) -> tuple[RankResult, bool]:
    """Play; returns what was measured, and whether the storage hangs."""
    spec, planned = prepared.spec, prepared.planned
    stop = Stop()
    loop = asyncio.get_running_loop()
    signals.notify = lambda: loop.call_soon_threadsafe(stop.interrupt)
    if signals.seen:
        stop.interrupt()
    io_before = _process_io()
    played = await play(
        rank=ranks.rank,
        workload=prepared.workload,
        config=_engine_config(spec, planned),
        stored_bytes=planned.stored_bytes,
        ttft_target_ms=spec.ttft_p95_ms_target,
        timing=Timing(
            warmup_ns=round(warmup_s(spec) * NS),
            duration_ns=round(spec.duration * NS),
            drain_limit_s=_drain_limit_s(spec),
            until_steady=spec.warmup == STEADY,
        ),
        clock=MonotonicClock(),
        open_io=lambda on_operations: ThreadedIO(prepared.io_engine, on_operations),
        arena=prepared.arena,
        stop=stop,
        on_sample=lambda sample: writer.send(Progress(sample=sample)),
        reused=() if prepared.found is None else prepared.found.blocks,
        drop_page_cache=partial(in_daemon, prepared.store.drop_page_cache) if _is_buffered(prepared.store) else None,
    )
    signals.notify = None
    return _result(prepared, played, run_id, ranks, io_before), played.hung


def _is_buffered(store: BlockStore) -> bool:
    """Whether the page cache of this host is under the store."""
    return store.capabilities.aligned and not store.capabilities.direct


def _drain_limit_s(spec: KVCacheSpec) -> float:
    """How long I/O may take to return: of an object store as long as it is tried again, and a little more."""
    tried_s = spec.io_limit_s + DRAIN_MARGIN_S if spec.store_layout is Layout.OBJECT else 0.0
    return max(DRAIN_LIMIT_S, tried_s)


def _engine_config(spec: KVCacheSpec, planned: Sizes) -> EngineConfig:
    assert spec.decisions is not None, "settled"
    return EngineConfig(
        block_tokens=planned.block_tokens,
        kv_ranks=planned.kv_ranks,
        object_bytes=planned.object_bytes,
        gpu_blocks=planned.gpu_blocks,
        cpu_blocks=planned.cpu_blocks or 0,
        storage_blocks=planned.storage_blocks or 0,
        touch=spec.touch,
        prefix_caching=not spec.disable_prefix_caching,
        pacing=Pacing(mode=spec.generation_mode, compute=compute_model(spec)),
        promote=spec.promote,
        decisions=spec.decisions,
        store_policy=spec.store_policy,
        eviction=spec.eviction,
        evict_above=spec.evict_above,
        evict_to=spec.evict_to,
        write_overflow=spec.write_overflow,
        write_queue_blocks=planned.write_queue_blocks,
        write_queue_s=spec.write_queue_s,
        write_batch=spec.write_batch,
        write_interval_s=spec.write_interval_s,
        write_sync=spec.write_sync,
        load_batch=spec.load_batch,
        min_load_tokens=spec.min_load_tokens,
        load_timeout=spec.load_timeout,
    )


def _result(
    prepared: Prepared, played: Played, run_id: str, ranks: Ranks, io_before: tuple[int, int] | None
) -> RankResult:
    recorder = played.recorder
    io_after = _process_io()
    moved = None if io_before is None or io_after is None else (io_after[0] - io_before[0], io_after[1] - io_before[1])
    status, error = _verdict(played)
    cores = prepared.facts["usable_cores"]
    assert isinstance(cores, int)
    return RankResult(
        run_id=run_id,
        rank=ranks.rank,
        host=os.uname().nodename,
        status=status,
        error=error,
        workload_digest=prepared.workload.digest,
        window=RankWindow(
            start_unix_s=played.started_unix_s,
            warmup_s=played.warmup_ns / NS,
            warmup_steady=played.warmup_steady,
            measured_s=recorder.measured_ns / NS,
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
            cpu_wait_s=played.cpu_wait_s,
            cores=cores,
            max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            os_read_bytes=None if moved is None else moved[0],
            os_written_bytes=None if moved is None else moved[1],
            loop_lag=HistogramData.of(played.loop_lag),
        ),
        verify_failures=played.failures,
        dropped_page_cache_bytes=played.dropped_page_cache_bytes if _is_buffered(prepared.store) else 0,
        reuse=None if prepared.found is None else prepared.found.reuse,
        host_facts=prepared.facts,
        samples=played.samples,
    )


def _verdict(played: Played) -> tuple[RunStatus, RankError | None]:
    if played.error is not None:
        return RunStatus.FAILED, RankError(exit_code=played.error.exit_code, message=str(played.error))
    if played.ending is Ending.INTERRUPTED:
        return RunStatus.INTERRUPTED, RankError(exit_code=EXIT_CODE.INTERRUPTED, message="interrupted by a signal")
    if not played.recorder.requests.completed:
        return RunStatus.FAILED, RankError(
            exit_code=EXIT_CODE.FAILURE,
            message="no request was answered inside the measured window: there is nothing to report. Lengthen "
            "--duration, shorten --warmup, or play faster (--generation-mode, --time-scale)",
        )
    return RunStatus.COMPLETE, None


def _process_io() -> tuple[int, int] | None:
    """Bytes that this process had read from and written to storage, by the kernel's count; None where it has none."""
    try:
        text = Path("/proc/self/io").read_text(encoding="ascii")
    except OSError:
        return None
    values = dict(line.split(": ", 1) for line in text.splitlines())
    return int(values["read_bytes"]), int(values["write_bytes"])


if __name__ == "__main__":
    sys.exit(main())
