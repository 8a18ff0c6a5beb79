"""The engine on virtual time with all that it needs around it, to ask it something and see what it did.

bench = EngineBench(replace(PLAIN, storage_blocks=2))

async def play() -> None:
    await bench.ask_and_settle(1, 2)
    assert await bench.ask_and_settle(1, 2, 3) == 2

run_virtual(play())
assert bench.ids(OpKind.READ) == [1, 2]
"""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

from mlpstorage.config import (
    Decisions,
    Eviction,
    GenerationMode,
    Promotion,
    StorePolicy,
    TouchOrder,
    WriteOverflow,
    WriteSync,
)
from mlpstorage.kvcache.engine import Engine
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.pacing import Pacing
from mlpstorage.kvcache.recorder import Recorder
from mlpstorage.kvcache.request import Request
from mlpstorage.measure.clock import NS
from mlpstorage.plan.compute import ConstantCompute
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.ops import OpKind
from mlpstorage.testing.virtual import ModelledIO, VirtualClock

MS = NS // 1000

PLAIN = EngineConfig(
    block_tokens=4,
    kv_ranks=1,
    object_bytes=4096,
    gpu_blocks=0,
    cpu_blocks=0,
    storage_blocks=1000,
    touch=TouchOrder.TAIL,
    prefix_caching=True,
    # Were it waited for, a prompt token would take 1 ms, and an output token after the first 10 ms.
    pacing=Pacing(
        mode=GenerationMode.NONE,
        compute=ConstantCompute(prefill_tokens_per_s=1000.0, decode_tokens_per_s=100.0),
    ),
    promote=Promotion.ALWAYS,
    decisions=Decisions.COMPLETION,
    store_policy=StorePolicy.ALWAYS,
    eviction=Eviction.LRU,
    evict_above=1.0,
    evict_to=1.0,
    write_overflow=WriteOverflow.BLOCK,
    write_queue_blocks=1000,
    write_queue_s=None,
    write_batch=16,
    write_interval_s=0.0,
    write_sync=WriteSync.NONE,
    load_batch=1,
    min_load_tokens=0,
    load_timeout=None,
)
"""A storage tier alone, with no policy that does anything but the plain thing, and no time for computation."""


@dataclass(slots=True)
class EngineBench:
    """An engine over modelled I/O, and what came of it; every moment lies inside the measured window.

    Attributes:
        config: The engine's.
        io: The I/O.
        failures: What the engine reported as failed.
        arena: Slots of the DRAM tier, without memory.
        recorder: The counts.
        engine: The engine.
    """

    config: EngineConfig = PLAIN
    io: ModelledIO = field(default_factory=ModelledIO)
    failures: list[Exception] = field(default_factory=list)
    arena: DramArena = field(init=False)
    recorder: Recorder = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        """Put the parts together."""
        self.io.kv_ranks = self.config.kv_ranks
        self.arena = DramArena(self.config.cpu_blocks, 0)
        self.recorder = Recorder(
            object_bytes=self.config.object_bytes,
            stored_bytes=self.config.object_bytes,
            ttft_target_ns=NS,
            window_ns=(0, 1 << 62),
        )
        self.io.on_operations = self.recorder.operations
        self.engine = Engine(
            self.config,
            blocks=self.io,
            arena=self.arena,
            recorder=self.recorder,
            clock=VirtualClock(),
            on_failure=self.failures.append,
        )

    async def ask(self, *block_ids: int, output_tokens: int = 1, prompt_tokens: int | None = None) -> None:
        """Serve a request that arrives now."""
        tokens = len(block_ids) * self.config.block_tokens if prompt_tokens is None else prompt_tokens
        await self.engine.serve(request(block_ids, tokens, output_tokens), now_ns())

    async def ask_and_settle(self, *block_ids: int) -> int:
        """Serve a request, let its writes end; returns how many blocks it found."""
        before = self.hits
        await self.ask(*block_ids)
        await self.engine.settle()
        return self.hits - before

    @property
    def hits(self) -> int:
        """Blocks found by all requests."""
        found = self.recorder.total_requests.hit_blocks
        return found.gpu + found.cpu + found.storage

    def ids(self, kind: OpKind) -> list[int]:
        """Objects of the operations of a kind that succeeded, in the order of their ends."""
        return [done.op.object_id for done in self.io.done_of(kind)]

    def times_ms(self, kind: OpKind) -> list[tuple[float, float]]:
        """When each of those operations began and ended."""
        return [(done.start_ns / MS, done.end_ns / MS) for done in self.io.done_of(kind)]


def request(block_ids: Sequence[int], prompt_tokens: int, output_tokens: int = 1) -> Request:
    """A request of an open loop."""
    return Request(
        arrival_s=0.0,
        think_s=0.0,
        user=0,
        session=0,
        turn=0,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        block_ids=tuple(block_ids),
    )


def now_ns() -> int:
    """The virtual time."""
    return VirtualClock().now_ns()


def sleep_ms(time_ms: float) -> Awaitable[None]:
    """Let virtual time pass."""
    return VirtualClock().sleep_until(now_ns() + round(time_ms * MS))
