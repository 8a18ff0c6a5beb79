"""The program of one rank: `python -m mlpstorage.kvcache.rank`, with the flags of `kvcache run` that concern it.

It claims its directory, plays its share of the workload, tells the launcher through rank 0, and removes its files.
"""

import argparse
import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mlpstorage.cli.options import add_options
from mlpstorage.cluster.facts import available_memory_bytes, file_system_space, host_facts
from mlpstorage.config import EXIT_CODE, GIB, RunStatus
from mlpstorage.errors import ConfigurationError, InterruptedRunError, MLPStorageError
from mlpstorage.kvcache.engine import EngineConfig
from mlpstorage.kvcache.events import EventWriter, Finished, Progress, Refused
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.play import Ending, Played, Stop, Timing, play
from mlpstorage.kvcache.ranks import Ranks, find_ranks
from mlpstorage.kvcache.recorder import counts
from mlpstorage.kvcache.sessions import CHAT
from mlpstorage.kvcache.threaded_io import ThreadedIO
from mlpstorage.kvcache.workload import Workload, session_workload, trace_workload
from mlpstorage.measure.clock import NS, MonotonicClock
from mlpstorage.plan.kvcache import Sizes, check_room, rank_directory, sizes, with_automatic_sizes
from mlpstorage.results.models import (
    HistogramData,
    RankClient,
    RankError,
    RankResult,
    RankWindow,
    RequestCounts,
    StorageCounts,
)
from mlpstorage.spec.fields import resolve
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.cache_dir import CacheDirectory
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import IoPool

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may hold the interpreter while others wait: Python's 5 ms would show in every latency."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that a rank needs before its run begins."""

    spec: KVCacheSpec
    planned: Sizes
    workload: Workload
    facts: dict[str, object]
    directory: CacheDirectory
    store: FileStore
    arena: DramArena
    pool: IoPool
    warnings: tuple[str, ...]


class _Signals:
    """SIGINT and SIGTERM: an error while the rank prepares, a stop while it plays, nothing while it cleans up.

    asyncio's own handlers would not do: closing its loop sets the default back, and a second signal would kill the
    clean-up. (A launcher that is killed sends one for each of its threads.)
    """

    def __init__(self) -> None:
        self.preparing = True
        self.seen = False
        self.notify: Callable[[], object] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self.seen = True
        if self.preparing:
            self.preparing = False
            raise InterruptedRunError(f"stopped by {signal.Signals(number).name} before the run began")
        if self.notify is not None:
            self.notify()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    die_with_parent()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    spec, run_id = parse_arguments(sys.argv[1:] if argv is None else argv)
    ranks = find_ranks()
    writer = EventWriter(speaks=ranks.rank == 0)
    signals = _Signals()
    with contextlib.ExitStack() as cleanup:
        prepared, error = _try_to_prepare(spec, run_id, ranks, cleanup, signals)
        exit_code = _agree(ranks, prepared, error, writer)
        if exit_code is None:
            assert prepared is not None, "every rank is prepared where none refused"
            ranks.barrier()
            result = asyncio.run(_run(prepared, run_id, ranks, writer, signals))
            gathered = ranks.gather(result)
            if gathered is not None:
                writer.send(Finished(ranks=tuple(gathered)))
            exit_code = EXIT_CODE.SUCCESS if result.error is None else EXIT_CODE(result.error.exit_code)
            if exit_code is EXIT_CODE.TIMEOUT:
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


def die_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the parent dies: a killed launcher leaves no rank and no file behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _try_to_prepare(
    spec: KVCacheSpec, run_id: str, ranks: Ranks, cleanup: contextlib.ExitStack, signals: _Signals
) -> tuple[Prepared | None, MLPStorageError | None]:
    try:
        prepared = _prepare(spec, run_id, ranks, cleanup)
        signals.preparing = False
    except MLPStorageError as error:
        signals.preparing = False
        return None, error
    return prepared, None


def _prepare(spec: KVCacheSpec, run_id: str, ranks: Ranks, cleanup: contextlib.ExitStack) -> Prepared:
    """Check the host, claim the directory and make everything ready; `cleanup` takes it back."""
    if spec.cache_dir is None:
        raise ConfigurationError("--cache-dir: a rank needs it")
    place = rank_directory(spec.cache_dir, ranks.rank)
    space, memory_bytes = file_system_space(place), available_memory_bytes()
    warnings: list[str] = []
    directory = CacheDirectory.claim(place, run_id)
    cleanup.callback(directory.release)
    if directory.cleared is not None and directory.cleared.files:
        warnings.append(
            f"cleared {directory.cleared.files:,} files ({directory.cleared.bytes / GIB:.2f} GiB) that the dead run "
            f"{directory.cleared.run_id} had left in {place}"
        )
        space = file_system_space(place)
    spec = with_automatic_sizes(
        spec,
        memory_free_bytes=memory_bytes,
        storage_total_bytes=space.total_bytes,
        storage_free_bytes=space.free_bytes,
        ranks_on_host=ranks.ranks_on_host,
    )
    workload = build_workload(spec, ranks.rank, ranks.size)
    planned = sizes(spec, workload.block_tokens)
    check_room(
        spec,
        planned,
        memory_free_bytes=memory_bytes,
        storage_free_bytes=space.free_bytes,
        ranks_on_host=ranks.ranks_on_host,
        where=str(place),
    )
    namespace = f"{spec.model}|0|0"
    store = FileStore(directory.objects, namespace, planned.object_bytes)
    cleanup.callback(directory.remove_objects)
    store.open()
    if store.direct_refusal is not None:
        warnings.append(f"buffered I/O in {place}: {store.direct_refusal}; the page cache is part of what is measured")
    arena = DramArena(planned.cpu_blocks or 0, planned.stored_bytes)
    cleanup.callback(arena.close)
    pool = IoPool(store, Payload(namespace, planned.stored_bytes), arena, spec.io_threads)
    pool.start()
    cleanup.callback(store.close)
    cleanup.callback(pool.close)
    return Prepared(
        spec=spec,
        planned=planned,
        workload=workload,
        facts=host_facts(place),
        directory=directory,
        store=store,
        arena=arena,
        pool=pool,
        warnings=tuple(warnings),
    )


def build_workload(spec: KVCacheSpec, rank: int, ranks: int) -> Workload:
    """What `rank` plays."""
    if spec.trace is not None:
        return trace_workload(
            spec.trace,
            spec.block_tokens,
            time_scale=spec.time_scale,
            max_requests=spec.max_requests,
            rank=rank,
            ranks=ranks,
        )
    return session_workload(
        CHAT, spec.num_users, spec.seed + rank, spec.block_tokens, multi_turn=not spec.disable_multi_turn
    )


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


async def _run(prepared: Prepared, run_id: str, ranks: Ranks, writer: EventWriter, signals: _Signals) -> RankResult:
    spec, planned = prepared.spec, prepared.planned
    assert spec.warmup is not None, "worked out"
    stop = Stop()
    loop = asyncio.get_running_loop()
    signals.notify = lambda: loop.call_soon_threadsafe(stop.interrupt)
    if signals.seen:
        stop.interrupt()
    io_before = _process_io()
    played = await play(
        rank=ranks.rank,
        workload=prepared.workload,
        config=EngineConfig(
            block_tokens=planned.block_tokens,
            object_bytes=planned.object_bytes,
            gpu_blocks=planned.gpu_blocks,
            cpu_blocks=planned.cpu_blocks or 0,
            storage_blocks=planned.storage_blocks or 0,
            write_queue_blocks=planned.write_queue_blocks,
            touch=spec.touch,
            prefix_caching=not spec.disable_prefix_caching,
            pacing=Pacing(
                mode=spec.generation_mode,
                prefill_tokens_per_s=spec.prefill_tokens_per_s,
                decode_tokens_per_s=spec.decode_tokens_per_s,
            ),
        ),
        stored_bytes=planned.stored_bytes,
        timing=Timing(warmup_ns=round(spec.warmup * NS), duration_ns=round(spec.duration * NS)),
        clock=MonotonicClock(),
        open_io=lambda on_operations: ThreadedIO(prepared.pool, on_operations),
        arena=prepared.arena,
        stop=stop,
        on_sample=lambda sample: writer.send(Progress(sample=sample)),
    )
    signals.notify = None
    return _result(prepared, played, run_id, ranks, io_before)


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
            measured_s=recorder.measured_ns / NS,
            drain_s=played.drain_ns / NS,
            requests_in_flight_at_end=played.in_flight_at_end,
        ),
        requests=RequestCounts.model_validate(counts(recorder.requests)),
        storage=StorageCounts.model_validate(counts(recorder.window)),
        storage_total=StorageCounts.model_validate(counts(recorder.total)),
        latency={name: HistogramData.of(histogram) for name, histogram in recorder.latency.items()},
        client=RankClient(
            cpu_s=played.cpu_s,
            cores=cores,
            max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            os_read_bytes=None if moved is None else moved[0],
            os_written_bytes=None if moved is None else moved[1],
            loop_lag=HistogramData.of(played.loop_lag),
        ),
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
