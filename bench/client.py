"""What the client itself costs: verification, payloads, the index, and the time series. Nothing here touches a disk.

    python bench/client.py [--json]

Rates are of processor time (`time.thread_time`), so that a busy machine does not change them much. Memory is what
`tracemalloc` counts.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

from mlpstorage.config import GIB, MIB, Verify
from mlpstorage.kvcache.events import HostProgress
from mlpstorage.kvcache.host_series import HostSampler, watch_host
from mlpstorage.kvcache.index import LruSet, leading_run
from mlpstorage.measure.clock import NS, MonotonicClock
from mlpstorage.storage.base import aligned_memory
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.payload import Payload

ROUNDS = 7
OBJECT_BYTES = (128 << 10, 2 * MIB, 32 * MIB)
MIN_FULL_GIB_PER_S = 3.0
INDEXED_BLOCKS = 1_000_000
CHAIN_BLOCKS = 400
MAX_BYTES_PER_BLOCK = 400
MAX_LOOKUP_MS = 1.0
SAMPLES = 100
MAX_SAMPLING_SHARE = 0.01
"""Of one core, at the default interval of a second."""
MAX_LOOP_MS = 1.0
_COLD_BYTES = 256 * MIB
"""Memory that is gone through between two looks at the same object, so that no cache holds it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of the table")
    args = parser.parse_args(argv)
    checks = {
        size: {mode.value: _check_gib_per_s(size, mode) for mode in (Verify.STAMP, Verify.FULL)}
        for size in OBJECT_BYTES
    }
    bytes_per_block, lookup_ms = _index()
    sampling_share, loop_ms = asyncio.run(_sampling())
    met = (
        min(rates["full"] for rates in checks.values()) >= MIN_FULL_GIB_PER_S
        and bytes_per_block < MAX_BYTES_PER_BLOCK
        and lookup_ms < MAX_LOOKUP_MS
        and sampling_share < MAX_SAMPLING_SHARE
        and loop_ms < MAX_LOOP_MS
    )
    if args.json:
        numbers = {"index_bytes_per_block": bytes_per_block, "lookup_ms": lookup_ms}
        sampling = {"sampling_share_of_core": sampling_share, "sampling_loop_ms": loop_ms}
        print(json.dumps({"check_gib_per_s": checks, **numbers, **sampling}))
    else:
        print("  object | check, GiB/s per core, memory not in cache")
        print("         |    stamp     full")
        for size, rates in checks.items():
            name = f"{size // MIB} MiB" if size >= MIB else f"{size >> 10} KiB"
            print(f"{name:>8} | {rates['stamp']:>8.1f} {rates['full']:>8.1f}")
        print(f"index: {bytes_per_block:.0f} bytes a block with {INDEXED_BLOCKS:,} blocks in three tiers;")
        print(f"       look-up of a chain of {CHAIN_BLOCKS} blocks: {lookup_ms:.3f} ms (median)")
        print(f"time series of the host: {sampling_share:.3%} of a core with a line a second, all threads;")
        print(f"       {loop_ms:.3f} ms of it on the event loop a line")
        print("targets met" if met else "targets MISSED")
    return 0 if met else 1


def _check_gib_per_s(object_bytes: int, verify: Verify) -> float:
    """Objects checked a second of processor time, in GiB, as they come fresh from storage."""
    payload = Payload(ObjectKeys("bench|0|full"), object_bytes, verify)
    count = _COLD_BYTES // object_bytes
    memory = aligned_memory(count * object_bytes)
    parts = [memory[start : start + object_bytes] for start in range(0, memory.nbytes, object_bytes)]
    source = payload.new_buffer()
    for object_id, part in enumerate(parts):
        part[:] = source.to_write(object_id).memory

    def check_all() -> None:
        for object_id, part in enumerate(parts):
            payload.check(part, object_id)

    return count * object_bytes / GIB / _median_s(check_all)


def _index() -> tuple[float, float]:
    """Bytes of the index a block, and milliseconds of a look-up."""
    draw = random.Random(7)  # noqa: S311 - no secret
    ids = [draw.getrandbits(64) for _ in range(INDEXED_BLOCKS)]
    tracemalloc.start()
    before_bytes, _ = tracemalloc.get_traced_memory()
    storage = LruSet(INDEXED_BLOCKS)
    for block_id in ids:
        storage.insert(block_id)
    stored = set(ids)
    after_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The ids themselves are counted once: they were made before.
    id_bytes = 36
    chain = ids[5000 : 5000 + CHAIN_BLOCKS]
    empty: set[int] = set()

    def look_up() -> None:
        assert leading_run(chain, (empty, empty, stored)) == CHAIN_BLOCKS

    return (after_bytes - before_bytes) / INDEXED_BLOCKS + id_bytes, _median_s(look_up) * 1e3


async def _sampling() -> tuple[float, float]:
    """Processor time of the host's time series: share of a core with a line a second, and milliseconds on the loop.

    Counted is all that the process uses: the thread that reads, its start, the line, and its JSON as rank 0 sends it.
    """
    clock = MonotonicClock()
    sent: list[str] = []
    watch = watch_host(
        Path.cwd(), clock, on_sample=lambda sample: sent.append(HostProgress(sample=sample).model_dump_json())
    )
    sampler = HostSampler(watch, clock=clock, begin_ns=clock.now_ns(), interval_ns=NS, phase=lambda _: "window")
    await sampler.finish()
    process_s, loop_s = time.process_time(), time.thread_time()
    for _ in range(SAMPLES):
        await sampler.finish()
    used_s, on_loop_s = time.process_time() - process_s, time.thread_time() - loop_s
    assert len(sent) == SAMPLES
    return used_s / SAMPLES, on_loop_s / SAMPLES * 1e3


def _median_s(work: Callable[[], None]) -> float:
    work()
    times_s = []
    for _ in range(ROUNDS):
        start_s = time.thread_time()
        work()
        times_s.append(time.thread_time() - start_s)
    return statistics.median(times_s)


if __name__ == "__main__":
    raise SystemExit(main())
