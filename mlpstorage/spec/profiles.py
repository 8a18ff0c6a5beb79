"""Layout profiles: the parameters with which the benchmark does to storage what a production engine does.

A profile is a layer of values between the defaults and the config file; every one can be overridden. It sets what is
known of the engine (sources and papers of 2026); where nothing is known the default stays. It is not the engine. None
of them models: the engine's own metadata, the way from host memory to the GPU, its own cache in DRAM (the DRAM tier
is this benchmark's), block ids and names, and the code around the I/O. Besides:

- `vllm-fs`: nothing is evicted; what the engine does when the file system is full is not known. Here new blocks are
  dropped when the tier is full.
- `lmcache-disk`: loads go before deletes and deletes before stores, but nothing that runs is interrupted.
- `llmd-fs`: how the engine reckons the 30 s is not known; here it is by the rate of the rank's own writes. Its hash
  directories are not known: the default ones.
- `sglang-file`: one thread reads a batch in order; how many batches the engine reads at once is not known: the default
  depth. Of a load that is abandoned nothing is used. Hash directories as above.
- `hf3fs-slab`: 3FS itself, its ring of requests, its replication. One worker moves the 8 entries of a batch in order.
- `mooncake-bucket`: the cluster's memory pool: blocks wait for the end of the interval without taking memory, up to a
  quarter of the storage tier, and then their requests wait. What is evicted gives its space back at once, not with its
  bucket. How many objects are in flight is not known: the default depth.
- `kvbm-slab`: what is in flight is one batch of 16, but the next one begins as soon as there is room. Second uses are
  remembered for the latest million of blocks. Eviction is not known: the default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mlpstorage.config import (
    DirectMode,
    Eviction,
    IoEngineName,
    IoPriority,
    Layout,
    StorePolicy,
    TouchOrder,
    WriteOverflow,
)
from mlpstorage.spec.load_timeout import LoadTimeout

UNBOUNDED_QUEUE_GIB = 1024.0
"""Of a write queue that something else bounds (time, an interval); a quarter of the storage tier is always a bound."""

_FILE_LAYOUTS = (Layout.FILE, Layout.SLAB, Layout.BUCKET)


def _profile(**values: object) -> Mapping[str, object]:
    return MappingProxyType(values)


PROFILES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # 16 tokens, one block a file, <hhh>/<hh>/<hash>; direct where a probe finds it possible, the whole object in
        # one call; 16 threads prefer reads and 16 writes; temporary name, rename, no fsync; no eviction.
        "vllm-fs": _profile(
            block_tokens=16,
            layout=Layout.FILE,
            file_levels=(3, 2),
            direct=DirectMode.AUTO,
            io_depth=32,
            io_priority=IoPriority.SPLIT,
            eviction=Eviction.NONE,
        ),
        # 256 tokens, flat files; 4 threads, loads before deletes before stores; the batch of a request is serial; LRU,
        # the tail first; no block is written twice at once (which holds for all).
        "lmcache-disk": _profile(
            block_tokens=256,
            layout=Layout.FILE,
            file_levels=(),
            io_depth=4,
            io_priority=IoPriority.STRICT,
            load_batch=0,
            eviction=Eviction.LRU,
            touch=TouchOrder.TAIL,
        ),
        # 256 tokens, one file a rank; 64 threads; the write queue holds about 30 s of writes, what exceeds it is
        # dropped; no eviction.
        "llmd-fs": _profile(
            block_tokens=256,
            layout=Layout.FILE,
            io_depth=64,
            write_overflow=WriteOverflow.DROP,
            write_queue_s=30.0,
            write_queue_gib=UNBOUNDED_QUEUE_GIB,
            eviction=Eviction.NONE,
        ),
        # 64 tokens, one file a rank; batches of 128 pages; loads only if more than 256 tokens hit; a load is abandoned
        # after min(30 s, 2 s + 0.1 s per 1,024 tokens); LRU.
        "sglang-file": _profile(
            block_tokens=64,
            layout=Layout.FILE,
            load_batch=128,
            min_load_tokens=256,
            load_timeout=LoadTimeout(base_s=2.0, per_1024_tokens_s=0.1, most_s=30.0),
            eviction=Eviction.LRU,
        ),
        # 64 tokens, a slab, one file a rank; 16 workers, 8 entries a batch; slots are reused.
        "hf3fs-slab": _profile(
            block_tokens=64,
            layout=Layout.SLAB,
            io_depth=16,
            load_batch=8,
            write_batch=8,
            eviction=Eviction.LRU,
        ),
        # 512 tokens, buckets of 256 MB or 500 keys; direct; offloads every 10 s; watermarks 0.90 and 0.80.
        "mooncake-bucket": _profile(
            block_tokens=512,
            layout=Layout.BUCKET,
            direct=DirectMode.ALWAYS,
            write_interval_s=10.0,
            write_queue_gib=UNBOUNDED_QUEUE_GIB,
            eviction=Eviction.LRU,
            evict_above=0.9,
            evict_to=0.8,
        ),
        # 16 to 64 tokens (the engine's own block; 32 is the middle), a preallocated slab aligned to 4 KiB; direct;
        # batches of 16; stored from the second use on.
        "kvbm-slab": _profile(
            block_tokens=32,
            layout=Layout.SLAB,
            direct=DirectMode.ALWAYS,
            io_depth=16,
            write_batch=16,
            store_policy=StorePolicy.SECOND_USE,
        ),
    }
)
"""The profiles by name: values of the spec's fields."""


def values_beside(name: object, given: Mapping[str, Any]) -> Mapping[str, object]:
    """The values of a profile, without those that would contradict what was given; none where there is no such profile.

    What drives objects in flight has two names, of which one may be given; what has no files knows no direct I/O; and
    where evictions end follows where they begin.

    Args:
        name: The profile, unchecked.
        given: Values of the spec's fields that beat the profile's, unchecked.
    """
    values = dict(PROFILES.get(name, {})) if isinstance(name, str) else {}
    if "io_threads" in given and given.get("io_engine") != IoEngineName.URING:
        values.pop("io_depth", None)
    if given.get("layout", Layout.FILE) not in _FILE_LAYOUTS:
        values.pop("direct", None)
    if "evict_above" in given:
        values.pop("evict_to", None)
    return values
