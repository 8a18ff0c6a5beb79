"""The engine over real I/O threads and real files: what lies on storage is what the tiers say, and wrong bytes show."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mlpstorage.config import DirectMode, Verify, WriteSync
from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.threaded_io import ThreadedIO
from mlpstorage.measure.clock import NS, MonotonicClock
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.payload import Payload
from mlpstorage.storage.pool import IoPool
from mlpstorage.testing.engine_bench import PLAIN, request

KEYS = ObjectKeys("tiny|0|0", "tiny|1|0")
OBJECT_BYTES = 3 * 4096
CONFIG = replace(
    PLAIN,
    kv_ranks=2,
    object_bytes=OBJECT_BYTES,
    cpu_blocks=2,
    storage_blocks=6,
    load_batch=2,
    write_sync=WriteSync.BATCH,
)


@dataclass(slots=True)
class Rig:
    """An engine on a directory."""

    directory: Path
    config: EngineConfig
    failures: list[Exception] = field(default_factory=list)
    recorder: Recorder = field(init=False)
    engine: Engine = field(init=False)

    def run(self, work: Callable[["Rig"], Awaitable[None]]) -> None:
        """Do work with the engine, and let it settle."""
        asyncio.run(self._run(work))

    async def ask(self, *block_ids: int) -> int:
        """Serve a request, let its writes end; returns how many blocks it found."""
        found = self.recorder.total_requests.hit_blocks
        before = found.gpu + found.cpu + found.storage
        tokens = len(block_ids) * self.config.block_tokens
        await self.engine.serve(request(block_ids, tokens), MonotonicClock().now_ns())
        await self.engine.settle()
        return found.gpu + found.cpu + found.storage - before

    def files(self, block_id: int) -> list[Path]:
        """The files of a block's objects."""
        names = [KEYS.name(object_id) for object_id in KEYS.block_objects(block_id)]
        return [path for name in names for path in self.directory.rglob(f"*{name}*")]

    async def _run(self, work: Callable[["Rig"], Awaitable[None]]) -> None:
        store = FileStore(self.directory, KEYS, OBJECT_BYTES, direct=DirectMode.AUTO)
        store.open()
        payload = Payload(KEYS, store.stored_bytes, Verify.FULL, buffers=4)
        arena = DramArena(self.config.cpu_blocks, self.config.kv_ranks * store.stored_bytes)
        pool = IoPool(store, payload, arena, 4)
        pool.start()
        self.recorder = Recorder(
            object_bytes=OBJECT_BYTES, stored_bytes=store.stored_bytes, ttft_target_ns=NS, window_ns=(0, 1 << 62)
        )
        self.engine = Engine(
            self.config,
            blocks=ThreadedIO(pool, self.recorder.operations),
            arena=arena,
            recorder=self.recorder,
            clock=MonotonicClock(),
            on_failure=self.failures.append,
        )
        try:
            await work(self)
            await self.engine.settle()
        finally:
            pool.close()
            store.close()
            arena.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """An engine with two kv ranks, a DRAM tier and a small storage tier, whose blocks are checked to the last byte."""
    directory = tmp_path / "objects"
    directory.mkdir()
    it = Rig(directory, CONFIG)
    yield it
    assert it.failures == []


def test_the_files_are_those_of_the_blocks_that_the_tier_holds(rig: Rig) -> None:
    """Six blocks fit: of three chains of three the first loses its files, the last is found, in DRAM and on storage."""

    async def work(rig: Rig) -> None:
        for first in (0, 10, 20):
            await rig.ask(first, first + 1, first + 2)
        assert await rig.ask(20, 21, 22) == 3

    rig.run(work)
    held = [block for block in range(30) if rig.files(block)]
    assert held == [10, 11, 12, 20, 21, 22]
    assert all(len(rig.files(block)) == 2 for block in held)
    counted = rig.recorder.window
    assert (counted.write_ops, counted.sync_ops, counted.delete_ops) == (18, 18, 6)
    # Two blocks of the last chain were copied out of DRAM, the third was read.
    assert rig.recorder.requests.hit_blocks.cpu == 2
    assert (counted.read_ops, counted.verified_bytes) == (2, 2 * OBJECT_BYTES)
    assert counted.verify_errors == counted.io_errors == 0
    assert rig.recorder.payload_ns > 0


def test_one_wrong_byte_fails_its_request_and_takes_its_block_off_storage(rig: Rig) -> None:
    """A byte of the second object is flipped: the request fails, both files go, the next request writes them anew."""

    async def work(rig: Rig) -> None:
        await rig.ask(1, 2, 3)
        path = rig.files(3)[1]
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
        assert await rig.ask(1, 2, 3) == 0
        assert rig.files(3) == []
        assert await rig.ask(1, 2, 3) == 2
        assert len(rig.files(3)) == 2
        assert await rig.ask(1, 2, 3) == 3

    rig.run(work)
    assert (rig.recorder.requests.failed, rig.recorder.requests.completed) == (1, 3)
    assert rig.recorder.verify_failures == 1
    assert KEYS.name(3 * 2 + 1) in rig.recorder.failures[0]
    assert "page 1" in rig.recorder.failures[0]
