"""The digest of logical operations: what it hangs on, and what it does not."""

import hashlib
from collections.abc import Collection
from dataclasses import replace

import pytest

from mlpstorage.config import Decisions, Eviction, GenerationMode, StorePolicy, TouchOrder
from mlpstorage.kvcache.engine_config import EngineConfig
from mlpstorage.kvcache.operations import Operation, OperationsDigest
from mlpstorage.storage.ops import OpKind
from mlpstorage.testing.engine_bench import MS, PLAIN, EngineBench
from mlpstorage.testing.virtual import ModelledIO, run_virtual

Done = tuple[Operation, Collection[int]]


def digest(*operations: Done) -> str:
    """Of these operations."""
    it = OperationsDigest()
    for operation, values in operations:
        it.add(operation, values)
    return it.hexdigest()


def test_the_digest_is_sha_256_over_words_of_64_bits() -> None:
    """The name of the operation, the number of values, the values, little-endian."""
    words = (2).to_bytes(8, "little") + (7).to_bytes(8, "little") + (2**64 - 1).to_bytes(8, "little")
    assert digest((Operation.LOAD, [7, 2**64 - 1])) == hashlib.sha256(b"load" + words).hexdigest()
    assert digest() == hashlib.sha256().hexdigest()


def test_every_kind_every_value_every_order_and_every_border_shows() -> None:
    """All of these differ."""
    of_each_kind: list[list[Done]] = [[(kind, [1, 2])] for kind in Operation]
    histories: list[list[Done]] = [
        [],
        [(Operation.LOAD, [])],
        *of_each_kind,
        [(Operation.LOAD, [2, 1])],
        [(Operation.LOAD, [1, 3])],
        [(Operation.LOAD, [1]), (Operation.LOAD, [2])],
        [(Operation.LOAD, [1, 2]), (Operation.LOAD, [])],
        [(Operation.STORE, [1]), (Operation.DELETE, [2])],
        [(Operation.DELETE, [2]), (Operation.STORE, [1])],
    ]
    digests = {digest(*history) for history in histories}
    assert len(digests) == len(histories)


def test_a_digest_can_be_asked_for_in_between() -> None:
    """It changes nothing."""
    it = OperationsDigest()
    it.add(Operation.STORE, [1])
    assert it.hexdigest() == digest((Operation.STORE, [1]))
    it.add(Operation.DELETE, [1])
    assert it.hexdigest() == digest((Operation.STORE, [1]), (Operation.DELETE, [1]))


# Of an engine

CHAINS = ((1, 2), (1, 2, 3), (8, 9), (1, 2, 3), (4,), (8, 9))


def played(config: EngineConfig, io: ModelledIO | None = None, chains: Collection[tuple[int, ...]] = CHAINS) -> str:
    """The digest of an engine that serves the requests one after the other."""
    bench = EngineBench(config, io or ModelledIO())

    async def play() -> None:
        for chain in chains:
            await bench.ask_and_settle(*chain)

    run_virtual(play())
    assert bench.failures == bench.io.misuses == []
    return bench.engine.operations_digest


def test_an_engine_s_operations_worked_by_hand() -> None:
    """A tier of two: 1 and 2 are stored, found and read; 3 takes the room of the tail, whose next use finds nothing.

    A look-up is the blocks asked for and those found on the GPU, in DRAM and on storage.
    """
    expected = digest(
        (Operation.LOOK_UP, (2, 0, 0, 0)),
        (Operation.STORE, (1, 2)),
        (Operation.LOOK_UP, (2, 0, 0, 2)),
        (Operation.LOAD, (1, 2)),
        (Operation.LOOK_UP, (1, 0, 0, 0)),
        (Operation.DELETE, (2,)),
        (Operation.STORE, (3,)),
        (Operation.LOOK_UP, (1, 0, 0, 0)),
        (Operation.DELETE, (1,)),
        (Operation.STORE, (2,)),
    )
    assert played(replace(PLAIN, storage_blocks=2), chains=((1, 2), (1, 2), (3,), (2,))) == expected


@pytest.mark.parametrize("decisions", Decisions)
def test_the_digest_hangs_on_what_is_done_and_not_on_how(decisions: Decisions) -> None:
    """Other speeds, other numbers of objects, other batches of reads: the same blocks are found, read and stored."""
    config = replace(PLAIN, decisions=decisions, storage_blocks=4)
    slow = ModelledIO(servers=1, latency_ns=dict.fromkeys(OpKind, 7 * MS))
    realistic = replace(PLAIN.pacing, mode=GenerationMode.REALISTIC)
    assert {
        played(config),
        played(config, slow),
        played(replace(config, kv_ranks=3)),
        played(replace(config, load_batch=0)),
        played(replace(config, pacing=realistic)),
    } == {played(config)}


@pytest.mark.parametrize("decisions", Decisions)
def test_whatever_changes_what_is_found_loaded_stored_or_deleted_shows(decisions: Decisions) -> None:
    """Sizes of tiers and policies: each gives a digest of its own."""
    plain = replace(PLAIN, decisions=decisions, storage_blocks=4)
    configs = [
        plain,
        replace(plain, storage_blocks=3),
        replace(plain, gpu_blocks=2),
        replace(plain, cpu_blocks=2),
        replace(plain, prefix_caching=False),
        replace(plain, touch=TouchOrder.HEAD),
        replace(plain, eviction=Eviction.NONE),
        replace(plain, evict_to=0.5),
        replace(plain, store_policy=StorePolicy.SECOND_USE),
        replace(plain, min_load_tokens=8),
    ]
    assert len({played(config) for config in configs}) == len(configs)
