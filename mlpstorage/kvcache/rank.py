"""The program of one rank: `python -m mlpstorage.kvcache.rank`, with the flags of `kvcache run` that concern it.

It claims its directory, plays its share of the workload, tells the launcher through rank 0, and removes its files.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlpstorage import __version__
from mlpstorage.cli.options import add_options
from mlpstorage.config import EXIT_CODE, Layout, RunStatus
from mlpstorage.errors import ConfigurationError, MLPStorageError
from mlpstorage.kvcache.cache import Place
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.events import (
    EventWriter,
    HostProgress,
    Known,
    Progress,
    Refused,
    Snapshot,
    Started,
    StartedRank,
)
from mlpstorage.kvcache.host_series import watch_host
from mlpstorage.kvcache.measured import Measured, process_io, verdict
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.play import DRAIN_LIMIT_S, Played, Stop, Timing, play
from mlpstorage.kvcache.prepare import Prepared, is_buffered, prepare
from mlpstorage.kvcache.process import Signals, die_with_parent, in_daemon
from mlpstorage.kvcache.pulse import STILL_S, Activity, Pulse
from mlpstorage.kvcache.ranks import Ranks, find_ranks
from mlpstorage.kvcache.shared_place import SharedPlace, as_refusal, share_place
from mlpstorage.kvcache.threaded_io import ThreadedIO
from mlpstorage.kvcache.together import Together
from mlpstorage.measure.clock import NS, MonotonicClock
from mlpstorage.measure.process import thread_activity
from mlpstorage.plan.compute import compute_model
from mlpstorage.plan.kvcache import Sizes, warmup_s
from mlpstorage.results.models import RankResult
from mlpstorage.spec.fields import resolve
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.spec.workload import STEADY

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may hold the interpreter while others wait: Python's 5 ms would show in every latency."""

DRAIN_MARGIN_S = 5.0
"""Longer than an object store is tried again we wait so much for the answer."""

EXIT_LIMIT_S = 10
"""Longest end of MPI itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    die_with_parent()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        ranks = find_ranks()
    except ConfigurationError as mismatch:
        EventWriter(speaks=True).send(Refused(exit_code=int(mismatch.exit_code), message=str(mismatch)))
        return mismatch.exit_code
    writer = EventWriter(speaks=ranks.rank == 0)
    hosts = _introduce(ranks, writer)
    if hosts is None:
        ranks.barrier()
        return EXIT_CODE.CONFIGURATION
    finals: dict[int, str] = {}
    pulse = Pulse(
        ranks=ranks,
        hosts=hosts,
        clock=MonotonicClock(),
        writer=writer,
        finals=finals,
        activity=_activity(),
    )
    with pulse.beating():
        spec, run_id = parse_arguments(sys.argv[1:] if argv is None else argv)
        if spec.store_layout is Layout.OBJECT:
            # An object store may be silent for as long as it is tried again.
            pulse.bear(STILL_S + spec.io_limit_s)
        exit_code = _prepare_and_run(spec, run_id, ranks, writer, finals)
        # Under mpi4py a rank that ends with an error ends all others: they must have removed their files.
        ranks.barrier()
    if ranks.launched:
        # MPI's own end waits for the others, too.
        signal.alarm(EXIT_LIMIT_S)
    ranks.settle()
    return exit_code


def _prepare_and_run(
    spec: KVCacheSpec, run_id: str, ranks: Ranks, writer: EventWriter, finals: dict[int, str]
) -> EXIT_CODE:
    """Prepare, play where every rank can, and remove what was made; returns the exit code."""
    signals = Signals()
    with contextlib.ExitStack() as held, contextlib.ExitStack() as cleanup:
        shared, error = share_place(spec, run_id, ranks, held, signals)
        prepared = None
        if error is None and not (shared is None and spec.shares_cache):
            prepared, error = _try_to_prepare(spec, run_id, ranks, cleanup, signals, shared)
        exit_code = _agree(ranks, prepared, error, writer)
        if exit_code is None:
            assert prepared is not None, "every rank is prepared where none refused"
            if prepared.place.removal is not None:
                prepared.place.removal.run_begins(keep=spec.keep_cache)
            prepared = _with_facts(prepared, ranks, writer)
            result, hung = asyncio.run(_run(prepared, run_id, ranks, writer, signals, finals))
            exit_code = EXIT_CODE.SUCCESS if result.error is None else EXIT_CODE(result.error.exit_code)
            if hung:
                # A thread hangs in the kernel and cannot be joined; the next run on the directory clears the files.
                os._exit(exit_code)
    return exit_code


def _activity() -> Activity:
    """Tells whether a thread of this process has run, but for the pulse's own and those that MPI has started."""
    own = threading.get_native_id()
    of_mpi = {int(task.name) for task in Path("/proc/self/task").iterdir()} - {own}
    return lambda: thread_activity({*of_mpi, threading.get_native_id()})


def _introduce(ranks: Ranks, writer: EventWriter) -> Sequence[str] | None:
    """The hosts of all ranks, where these have one version of this package; rank 0 tells who they are, or who differs.

    It comes before all that another version may do otherwise, and exchanges what every version understands.
    """
    told = ranks.allgather((__version__, os.uname().nodename, os.getpid()))
    version, first_host, _ = told[0]
    for number, (other, host, _) in enumerate(told):
        if other != version:
            message = (
                f"rank {number} on {host} has mlpstorage {other}, rank 0 on {first_host} has {version}; nothing was "
                "begun. Install the same version on every host"
            )
            writer.send(Refused(exit_code=int(EXIT_CODE.CONFIGURATION), message=message))
            return None
    started = (StartedRank(rank=number, host=host, pid=pid) for number, (_, host, pid) in enumerate(told))
    writer.send(Started(version=version, ranks=tuple(started)))
    return [host for _, host, _ in told]


def parse_arguments(argv: Sequence[str]) -> tuple[KVCacheSpec, str]:
    """The spec and the run's id from a rank's command line. The environment was resolved by the launcher."""
    parser = argparse.ArgumentParser(prog="mlpstorage.kvcache.rank", allow_abbrev=False)
    add_options(parser, KVCacheSpec, "run")
    parser.add_argument("--run-id", required=True)
    args = parser.parse_args(argv)
    return resolve(KVCacheSpec, args, environment={}).spec, args.run_id


def _try_to_prepare(
    spec: KVCacheSpec,
    run_id: str,
    ranks: Ranks,
    cleanup: contextlib.ExitStack,
    signals: Signals,
    shared: Place | SharedPlace | None,
) -> tuple[Prepared | None, MLPStorageError | None]:
    try:
        prepared = prepare(spec, run_id, ranks, cleanup, shared)
        signals.preparing = False
    except MLPStorageError as error:
        signals.preparing = False
        return None, error
    except OSError as error:
        signals.preparing = False
        return None, as_refusal(error)
    return prepared, None


def _with_facts(prepared: Prepared, ranks: Ranks, writer: EventWriter) -> Prepared:
    """Tell the launcher of every host, and each rank of its own: one rank of a host has gathered its facts."""
    gathered = ranks.allgather(prepared.facts)
    writer.send(Known(hosts=tuple(facts for facts in gathered if facts is not None)))
    return replace(prepared, facts=ranks.told_on_host(prepared.facts))


def _agree(
    ranks: Ranks, prepared: Prepared | None, error: MLPStorageError | None, writer: EventWriter
) -> EXIT_CODE | None:
    """Begin only where every rank can; else the exit code of the first that cannot."""
    host = os.uname().nodename
    mine = None if error is None else (int(error.exit_code), str(error), host)
    told = ranks.allgather((mine, () if prepared is None else prepared.warnings))
    # What ranks that share a place all found wrong with it is told once.
    writer.warn(tuple(dict.fromkeys(one for _, warnings in told for one in warnings)))
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
    prepared: Prepared, run_id: str, ranks: Ranks, writer: EventWriter, signals: Signals, finals: dict[int, str]
) -> tuple[RankResult, bool]:
    """Play with all other ranks; returns what this one measured, and whether its storage hangs."""
    stop = Stop()
    loop = asyncio.get_running_loop()
    signals.notify = lambda: loop.call_soon_threadsafe(stop.interrupt)
    if signals.seen:
        stop.interrupt()
    offset = ranks.clock_offset()
    together = Together(
        ranks=ranks,
        offset=offset,
        clock=MonotonicClock(),
        writer=writer,
        on_stop=partial(stop.interrupt, "stopped: another rank failed"),
        finals=finals,
    )
    rank = Measured(prepared=prepared, run_id=run_id, ranks=ranks, offset=offset, io_before=process_io())
    async with asyncio.TaskGroup() as group:
        group.create_task(together.run())
        played = await _play(rank, together, stop)
        signals.notify = None
        result = rank.result(played, *verdict(played, stop))
        gathered = await together.finish(result.model_dump_json(), failed=result.status is RunStatus.FAILED)
    if gathered is not None:
        writer.line(f'{{"type":"result","ranks":[{",".join(gathered)}]}}')
    return result, played.hung


async def _play(rank: Measured, together: Together, stop: Stop) -> Played:
    prepared, spec, clock = rank.prepared, rank.prepared.spec, MonotonicClock()
    host_watch = None
    if rank.ranks.lowest_on_host:
        host_watch = watch_host(
            prepared.place.objects,
            clock,
            on_sample=lambda sample: together.tell(HostProgress(sample=sample).model_dump_json()),
        )

    def on_snapshot(played: Played) -> None:
        together.tell(Snapshot(result=rank.result(played, RunStatus.RUNNING, None)).model_dump_json())

    return await play(
        rank=rank.ranks.rank,
        workload=prepared.workload,
        config=_engine_config(spec, prepared.planned),
        stored_bytes=prepared.planned.stored_bytes,
        ttft_target_ms=spec.ttft_p95_ms_target,
        timing=Timing(
            warmup_ns=round(warmup_s(spec) * NS),
            duration_ns=round(spec.duration * NS),
            drain_limit_s=_drain_limit_s(spec),
            until_steady=spec.warmup == STEADY,
            sample_ns=round(spec.timeseries_interval * NS),
        ),
        clock=clock,
        open_io=lambda on_operations: ThreadedIO(prepared.io_engine, on_operations),
        arena=prepared.arena,
        stop=stop,
        on_sample=lambda sample: together.tell(Progress(sample=sample).model_dump_json()),
        reused=() if prepared.found is None else prepared.found.blocks,
        drop_page_cache=partial(in_daemon, prepared.store.drop_page_cache) if is_buffered(prepared.store) else None,
        meet=together.meet,
        on_snapshot=on_snapshot,
        existence=prepared.existence,
        host_watch=host_watch,
    )


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


if __name__ == "__main__":
    sys.exit(main())
