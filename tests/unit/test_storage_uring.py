"""The ring engine on real files: what it moves, what it says of errors, and what it leaves behind.

What every engine promises is tested in `tests/conformance/test_io_engines.py`.
"""

import errno
import os
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mlpstorage.config import MIB, PAGE_BYTES, DirectMode, IoPriority, Verify, WriteSync
from mlpstorage.storage.arena import DramArena
from mlpstorage.storage.base import Moved, ShortObjectError
from mlpstorage.storage.descriptor import DescriptorStore, Transfer
from mlpstorage.storage.file_store import FileStore
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.ops import Chain, Lane, Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.storage.payload import Payload, PayloadBuffer, VerifyError
from mlpstorage.storage.slab_store import SlabStore
from mlpstorage.storage.uring import UringEngine, probe_uring

KEYS = ObjectKeys("tiny-1b|0|full")
OBJECT_BYTES = 8 * PAGE_BYTES
LARGE_OBJECT_BYTES = MIB
"""Copies of it are not done by the ring's thread."""

WAIT_S = 60
"""Far more than any wait takes: a test that hangs fails by it, none passes by it."""

REFUSAL = probe_uring()
needs_ring = pytest.mark.skipif(REFUSAL is not None, reason=f"no ring: {REFUSAL}")

MakeEngine = Callable[..., UringEngine]


class Batch:
    """Receives what became of a batch."""

    def __init__(self) -> None:
        self._done: list[OpDone] = []
        self._arrived = threading.Event()

    def __call__(self, done: list[OpDone]) -> None:
        """Be told that the batch is finished."""
        self._done = done
        self._arrived.set()

    def result(self) -> list[OpDone]:
        """Wait for the batch."""
        assert self._arrived.wait(WAIT_S), "the batch never finished"
        return self._done


class PromptFiles(FileStore):
    """Files, of which the store says that it makes them in no time: the ring's thread then does all but syncs."""

    @property
    def prompt(self) -> bool:
        """See `DescriptorStore.prompt`."""
        return True


class PieceStore(FileStore):
    """Files whose reads give half an object at first: they are on pipes, which the test fills in two pieces."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, KEYS, OBJECT_BYTES)
        self.rest: list[Callable[[], None]] = []
        self.begun = threading.Semaphore(0)

    def begin_read(self, object_id: int) -> Transfer:
        """Read from a pipe what is in the file."""
        transfer = super().begin_read(object_id)
        out, into = os.pipe()
        os.dup2(out, transfer.descriptor)
        os.close(out)
        data = self.path(object_id).read_bytes()
        half = len(data) // 2
        assert os.write(into, data[:half]) == half

        def give_rest() -> None:
            assert os.write(into, data[half:]) == len(data) - half
            os.close(into)

        self.rest.append(give_rest)
        self.begun.release()
        return transfer


class CountingPayload(Payload):
    """Payloads that count the buffers that are made."""

    made = 0

    def new_buffer(self) -> PayloadBuffer:
        """Make a buffer."""
        self.made += 1
        return super().new_buffer()


@pytest.fixture(params=["file", "prompt", "slab"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileStore | SlabStore]:
    """An open store of small objects, of each kind that makes a difference."""
    made = make_store(request.param, tmp_path / "objects")
    yield made
    made.close()


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    """An open store of small objects in files."""
    made = make_store("file", tmp_path / "objects")
    assert isinstance(made, FileStore)
    return made


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Makes engines that are started, and closes them in the end."""
    engines: list[UringEngine] = []

    def make(
        store: DescriptorStore,
        depth: int = 4,
        arena: DramArena | None = None,
        payload: Payload | None = None,
        priority: IoPriority = IoPriority.SPLIT,
    ) -> UringEngine:
        payload = payload or Payload(KEYS, store.stored_bytes, Verify.FULL, buffers=depth)
        engines.append(UringEngine(store, payload, arena, depth, priority))
        engines[-1].start()
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def make_store(layout: str, root: Path, object_bytes: int = OBJECT_BYTES) -> FileStore | SlabStore:
    """An open store."""
    makers: dict[str, Callable[[], FileStore | SlabStore]] = {
        "file": lambda: FileStore(root, KEYS, object_bytes),
        "prompt": lambda: PromptFiles(root, KEYS, object_bytes),
        "slab": lambda: SlabStore(root, KEYS, object_bytes, slots=300),
    }
    made = makers[layout]()
    made.open()
    return made


def each(kind: OpKind, object_ids: Sequence[int]) -> list[tuple[Op]]:
    """One chain an object."""
    return [(Op(kind, object_id),) for object_id in object_ids]


def run(engine: UringEngine, chains: Sequence[Chain], lane: Lane = Lane.LOAD) -> list[OpDone]:
    """Run a batch and wait for it."""
    batch = Batch()
    engine.submit(chains, lane, batch)
    return batch.result()


def errors(done: Sequence[OpDone]) -> list[Exception | None]:
    """The errors of operations."""
    return [one.error for one in done]


def open_descriptors() -> dict[str, str]:
    """What this process has open, by number."""
    found: dict[str, str] = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[path.name] = str(path.readlink())
        except FileNotFoundError:  # the one by which the directory was read
            continue
    return found


def run_python(program: str) -> str:
    """What a program prints, in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_no_package() -> None:
    """The engine's module does not import the package of the ring, which may be missing."""
    assert run_python("import sys, mlpstorage.storage.uring; print('liburing' in sys.modules)") == "False"


def test_probe_names_a_missing_package() -> None:
    """Without the package the probe says so, and how to get it."""
    found = run_python(
        """
        import sys
        sys.modules["liburing"] = None
        from mlpstorage.storage.uring import probe_uring
        print(probe_uring())
        """
    )
    assert "liburing cannot be loaded" in found
    assert "mlpstorage[uring]" in found


@needs_ring
@pytest.mark.parametrize(
    ("error_number", "expected"), [(errno.EPERM, "is not permitted here"), (errno.ENOSYS, "has no io_uring")]
)
def test_probe_names_a_refusal(error_number: int, expected: str) -> None:
    """Where a seccomp filter, as of containers, refuses io_uring_setup, the probe tells, and leaves nothing open."""
    found = run_python(
        f"""
        import ctypes, os, struct
        from mlpstorage.storage.uring import probe_uring
        before = len(os.listdir("/proc/self/fd"))
        # linux/filter.h: load the number of the system call; 425 is io_uring_setup on every architecture.
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | {error_number}), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
        filter = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(program)))
        libc = ctypes.CDLL(None, use_errno=True)
        NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
        assert libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
        if libc.prctl(SECCOMP, FILTER, filter, 0, 0):
            print("skip: the kernel takes no seccomp filter")
        else:
            print(probe_uring())
            assert len(os.listdir("/proc/self/fd")) == before
        """
    )
    if found.startswith("skip"):
        pytest.skip(found)
    assert expected in found


@needs_ring
@pytest.mark.parametrize("depth", [1, 2, 32])
def test_round_trip(store: FileStore | SlabStore, make_engine: MakeEngine, depth: int) -> None:
    """What is written is read again, every byte checked, with as many buffers as the depth at most."""
    payload = CountingPayload(KEYS, store.stored_bytes, Verify.FULL, buffers=depth)
    engine, object_ids = make_engine(store, depth, payload=payload), range(200)
    written = run(engine, each(OpKind.WRITE, object_ids), Lane.STORE)
    assert errors(written) == [None] * 200
    assert store.exists(object_ids) == [True] * 200
    read = run(engine, each(OpKind.READ, object_ids))
    assert errors(read) == [None] * 200
    assert [one.verified_bytes for one in read] == [OBJECT_BYTES] * 200
    assert {one.direct for one in written + read} == {store.direct}
    assert 1 <= payload.made <= depth
    assert errors(run(engine, each(OpKind.DELETE, object_ids), Lane.STORE)) == [None] * 200
    assert store.exists(object_ids) == [False] * 200


@needs_ring
def test_bytes_are_where_they_belong(files: FileStore, make_engine: MakeEngine) -> None:
    """Each page of an object's file begins with the first half of the file's name and the page's number."""
    run(make_engine(files), each(OpKind.WRITE, range(20)), Lane.STORE)
    found = [path for path in files.root.rglob("*") if path.is_file()]
    assert len(found) == 20
    for path in found:
        data = path.read_bytes()
        assert len(data) == OBJECT_BYTES
        heads = [data[first : first + 16] for first in range(0, OBJECT_BYTES, PAGE_BYTES)]
        assert heads == [bytes.fromhex(path.name[:16]) + struct.pack("<Q", page) for page in range(8)]


@needs_ring
def test_short_reads_are_continued(tmp_path: Path, make_engine: MakeEngine) -> None:
    """A read that gives a part of an object goes on behind it, and takes until all is there."""
    store = PieceStore(tmp_path / "objects")
    store.open()
    engine = make_engine(store)
    assert errors(run(engine, each(OpKind.WRITE, [1, 2]), Lane.STORE)) == [None, None]
    batch = Batch()
    engine.submit(each(OpKind.READ, [1, 2]), Lane.LOAD, batch)
    for _ in range(2):
        assert store.begun.acquire(timeout=WAIT_S)
    for give in store.rest:
        give()
    done = batch.result()
    assert [(one.error, one.verified_bytes) for one in done] == [(None, OBJECT_BYTES)] * 2


@needs_ring
@pytest.mark.parametrize("size_bytes", [0, 100, PAGE_BYTES, 3 * PAGE_BYTES, 3 * PAGE_BYTES + 1, OBJECT_BYTES - 1])
def test_truncated_file(files: FileStore, make_engine: MakeEngine, size_bytes: int) -> None:
    """Of a file that ends too early the error tells its path and how much of it is there."""
    engine = make_engine(files)
    run(engine, each(OpKind.WRITE, [1, 2]), Lane.STORE)
    os.truncate(files.path(1), size_bytes)
    bad, good = run(engine, each(OpKind.READ, [1, 2]))
    assert isinstance(bad.error, ShortObjectError)
    assert str(files.path(1)) in str(bad.error)
    assert f"{size_bytes} of {OBJECT_BYTES} bytes" in str(bad.error)
    assert (bad.verified_bytes, bad.direct) == (0, None)
    assert (good.error, good.verified_bytes) == (None, OBJECT_BYTES)


@needs_ring
def test_damaged_object(store: FileStore | SlabStore, make_engine: MakeEngine) -> None:
    """A byte that changed on storage is found, and told of the object; what follows in its chain is not done."""
    engine = make_engine(store)
    run(engine, each(OpKind.WRITE, [1, 2]), Lane.STORE)
    transfer = store.begin_read(1)
    path, offset_bytes = Path(f"/proc/self/fd/{transfer.descriptor}").readlink(), transfer.offset_bytes
    store.end_read(transfer)
    with path.open("r+b") as file:
        file.seek(offset_bytes + 5 * PAGE_BYTES + 1234)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    bad, skipped, good = run(engine, [(Op(OpKind.READ, 1), Op(OpKind.DELETE, 1)), (Op(OpKind.READ, 2),)])
    assert isinstance(bad.error, VerifyError)
    assert (bad.error.object_id, bad.error.page, bad.error.checksum) == (1, 5, True)
    assert bad.direct is store.direct
    assert isinstance(skipped.error, OperationSkippedError)
    assert good.error is None
    assert store.exists([1]) == [True]


@needs_ring
@pytest.mark.parametrize("depth", [1, 8])
def test_thousands_that_are_missing(store: FileStore | SlabStore, make_engine: MakeEngine, depth: int) -> None:
    """Operations that fail before anything is transferred do not pile up, however many they are."""
    done = run(make_engine(store, depth), each(OpKind.READ, range(5000)))
    assert {type(one.error) for one in done} == {FileNotFoundError}
    assert len(done) == 5000


@needs_ring
@pytest.mark.parametrize("direct", [DirectMode.AUTO, DirectMode.NEVER])
@pytest.mark.parametrize("layout", [FileStore, PromptFiles])
def test_full_file_system(tmp_path: Path, make_engine: MakeEngine, layout: type[FileStore], direct: DirectMode) -> None:
    """A write for which there is no room fails with ENOSPC and its path, and leaves neither a file nor a descriptor."""
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=4m,huge=never", "none", str(root)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting takes root")
    try:
        store = layout(root / "objects", KEYS, 5 * PAGE_BYTES * 8, direct=direct)
        store.open()
        engine = make_engine(store)
        before = open_descriptors()
        done = run(engine, each(OpKind.WRITE, range(40)), Lane.STORE)
        after = open_descriptors()
        written = [one.op.object_id for one in done if one.error is None]
        refused = [one for one in done if one.error is not None]
        # 4 MiB hold 25 objects of 160 KiB, less what the directories take.
        assert 20 <= len(written) <= 25
        for one in refused:
            assert isinstance(one.error, OSError)
            assert one.error.errno == errno.ENOSPC
            assert one.error.filename == str(store.path(one.op.object_id))
        assert after == before
        assert {path for path in store.root.rglob("*") if path.is_file()} == {store.path(one) for one in written}
        assert errors(run(engine, each(OpKind.READ, written))) == [None] * len(written)
        engine.close()
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(root)], check=True)


@needs_ring
def test_file_size_limit(tmp_path: Path) -> None:
    """A write that the system cuts short is continued, until it says why it takes no more: a real short write."""
    found = run_python(
        f"""
        import resource, signal, threading
        from pathlib import Path
        from mlpstorage.config import DirectMode
        from mlpstorage.storage.file_store import FileStore
        from mlpstorage.storage.keys import ObjectKeys
        from mlpstorage.storage.ops import Lane, Op, OpKind
        from mlpstorage.storage.payload import Payload
        from mlpstorage.storage.uring import UringEngine
        store = FileStore(Path({str(tmp_path / "objects")!r}), ObjectKeys("x"), 65536, direct=DirectMode.NEVER)
        store.open()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20480, 20480))
        engine = UringEngine(store, Payload(ObjectKeys("x"), store.stored_bytes), None, 2)
        engine.start()
        over = threading.Event()
        def tell(done):
            print(done[0].error.errno, [path for path in store.root.rglob("*") if path.is_file()])
            over.set()
        engine.submit([(Op(OpKind.WRITE, 1),)], Lane.STORE, tell)
        over.wait()
        engine.close()
        """
    )
    assert found == f"{errno.EFBIG} []"


@needs_ring
@pytest.mark.parametrize("object_bytes", [OBJECT_BYTES, LARGE_OBJECT_BYTES])
def test_copies(tmp_path: Path, make_engine: MakeEngine, object_bytes: int) -> None:
    """Payloads go into slots of the arena and come out; a slot that holds another object is an error."""
    store = make_store("file", tmp_path / "objects", object_bytes)
    engine = make_engine(store, 2, DramArena(2, object_bytes))
    chains = [[Op(OpKind.COPY_IN, slot, slot), Op(OpKind.COPY_OUT, slot, slot)] for slot in range(2)]
    assert errors(run(engine, chains)) == [None] * 4
    (wrong,) = run(engine, [(Op(OpKind.COPY_OUT, 0, 1),)])
    assert isinstance(wrong.error, VerifyError)
    (none,) = run(make_engine(store), [(Op(OpKind.COPY_IN, 0, 0),)])
    assert isinstance(none.error, ValueError)


@needs_ring
def test_synced_writes(tmp_path: Path, make_engine: MakeEngine) -> None:
    """Files that are synced one by one, and syncs in a chain, are written like others."""
    store = FileStore(tmp_path / "objects", KEYS, OBJECT_BYTES, write_sync=WriteSync.FILE)
    store.open()
    chains = [[Op(OpKind.WRITE, one), Op(OpKind.SYNC, one), Op(OpKind.READ, one)] for one in range(20)]
    assert errors(run(make_engine(store), chains, Lane.STORE)) == [None] * 60


@needs_ring
def test_what_a_buffered_read_finds_cached(tmp_path: Path, make_engine: MakeEngine) -> None:
    """A read through the page cache tells how much of the object was in it beforehand, as the store counts it."""
    store = FileStore(tmp_path / "objects", KEYS, OBJECT_BYTES, direct=DirectMode.NEVER)
    store.open()
    engine = make_engine(store)
    run(engine, each(OpKind.WRITE, [1]), Lane.STORE)
    (warm,) = run(engine, each(OpKind.READ, [1]))
    transfer = store.begin_read(1)
    expected: Moved = transfer.moved
    store.end_read(transfer)
    assert warm.error is None
    assert (warm.direct, warm.page_cache_bytes, warm.retries) == expected
    assert expected.page_cache_bytes in {OBJECT_BYTES, None}


@needs_ring
def test_lanes_take_turns_in_one_slot(files: FileStore, make_engine: MakeEngine) -> None:
    """With one operation at a time stores are begun while loads wait, and loads while stores do."""
    engine, begun = make_engine(files, 1), threading.Event()
    run(engine, each(OpKind.WRITE, [0]), Lane.STORE)
    may_go = threading.Event()

    def block(_done: list[OpDone]) -> None:
        begun.set()
        assert may_go.wait(WAIT_S)

    engine.submit(each(OpKind.READ, [0]), Lane.LOAD, block)
    assert begun.wait(WAIT_S)
    order: list[Lane] = []
    over = [Batch(), Batch()]
    for _ in range(10):
        engine.submit(each(OpKind.READ, [0]), Lane.LOAD, lambda _done: order.append(Lane.LOAD))
        engine.submit(each(OpKind.READ, [0]), Lane.STORE, lambda _done: order.append(Lane.STORE))
    engine.submit([()], Lane.LOAD, over[0])
    engine.submit([()], Lane.STORE, over[1])
    may_go.set()
    for batch in over:
        batch.result()
    assert sorted(order) == [Lane.LOAD] * 10 + [Lane.STORE] * 10
    assert all(order[turn] != order[turn + 1] for turn in range(0, 20, 2))


@needs_ring
def test_strict_priority(files: FileStore, make_engine: MakeEngine) -> None:
    """With strict priority all loads that wait go before all stores."""
    engine, begun, may_go = make_engine(files, 2, priority=IoPriority.STRICT), threading.Event(), threading.Event()
    run(engine, each(OpKind.WRITE, [0]), Lane.STORE)

    def block(_done: list[OpDone]) -> None:
        begun.set()
        assert may_go.wait(WAIT_S)

    engine.submit(each(OpKind.READ, [0]), Lane.LOAD, block)
    assert begun.wait(WAIT_S)
    stores, loads = Batch(), Batch()
    engine.submit(each(OpKind.READ, [0] * 20), Lane.STORE, stores)
    engine.submit(each(OpKind.READ, [0] * 20), Lane.LOAD, loads)
    may_go.set()
    last_load_ns = max(one.start_ns for one in loads.result())
    assert min(one.start_ns for one in stores.result()) >= last_load_ns


@needs_ring
def test_callers_fault_is_shown(files: FileStore, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `on_done` raises is shown like the error of any thread, and the engine goes on."""
    shown: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda raised: shown.append(str(raised.exc_value)))
    engine = make_engine(files)

    def raise_it(_done: list[OpDone]) -> None:
        raise KeyError("mine")

    engine.submit(each(OpKind.WRITE, [1]), Lane.STORE, raise_it)
    assert errors(run(engine, [(Op(OpKind.WRITE, 2), Op(OpKind.READ, 2))])) == [None, None]
    engine.close()
    assert shown == ["'mine'"]


@needs_ring
def test_broken_ring(store: FileStore | SlabStore, make_engine: MakeEngine) -> None:
    """Once the kernel takes nothing more, transfers fail with what it said, none hangs, and nothing is left open.

    Files are written without a ring.
    """
    engine = make_engine(store)
    assert errors(run(engine, each(OpKind.WRITE, range(8)), Lane.STORE)) == [None] * 8
    before = open_descriptors()
    with Path(os.devnull).open("rb") as other:
        os.dup2(other.fileno(), engine._ring._ring.ring_fd)
    done = run(engine, [*each(OpKind.READ, range(8)), *each(OpKind.WRITE, range(100, 108))])
    moved_by_ring = done if store.prompt else done[:8]
    assert {type(one.error) for one in moved_by_ring} == {OSError}
    assert len({one.error.errno for one in moved_by_ring if isinstance(one.error, OSError)}) == 1
    assert [one.error for one in done[len(moved_by_ring) :]] == [None] * (16 - len(moved_by_ring))
    assert store.exists(range(100, 108)) == [not store.prompt] * 8
    assert errors(run(engine, each(OpKind.DELETE, range(8)))) == [None] * 8
    assert open_descriptors().keys() == before.keys()


@needs_ring
def test_nothing_is_left(store: FileStore | SlabStore) -> None:
    """An engine that was closed, after work, without any, or unstarted, has left no thread and nothing open."""
    threads, before = set(threading.enumerate()), open_descriptors()
    for object_ids in (range(0), range(50)):
        engine = UringEngine(store, Payload(KEYS, store.stored_bytes), None, 8)
        engine.start()
        assert errors(run(engine, each(OpKind.WRITE, object_ids), Lane.STORE)) == [None] * len(object_ids)
        engine.close()
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            engine.submit([], Lane.LOAD, Batch())
    unstarted = UringEngine(store, Payload(KEYS, store.stored_bytes), None, 8)
    unstarted.close()
    assert set(threading.enumerate()) == threads
    assert open_descriptors() == before


@needs_ring
def test_close_from_the_report(files: FileStore) -> None:
    """Who is told of a batch may close the engine, which then ends after what is under way."""
    engine = UringEngine(files, Payload(KEYS, files.stored_bytes), None, 2)
    engine.start()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("io-")]
    closed = threading.Event()

    def close(_done: list[OpDone]) -> None:
        engine.close()
        closed.set()

    engine.submit(each(OpKind.WRITE, [1]), Lane.STORE, close)
    assert closed.wait(WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
    assert len(threads) == 3
    assert not any(thread.is_alive() for thread in threads)


@needs_ring
def test_batches_before_the_start(files: FileStore) -> None:
    """What is handed over before the engine is started is done then."""
    engine, batch = UringEngine(files, Payload(KEYS, files.stored_bytes), None, 2), Batch()
    engine.submit([[Op(OpKind.WRITE, 1), Op(OpKind.READ, 1)]], Lane.STORE, batch)
    assert engine.queued_ops(Lane.STORE) == 2
    engine.start()
    assert errors(batch.result()) == [None, None]
    engine.close()


@needs_ring
def test_start_that_fails(files: FileStore) -> None:
    """Where the kernel gives no ring the start says so and leaves nothing open or running."""
    found = run_python(
        f"""
        import os, resource, threading
        from pathlib import Path
        from mlpstorage.storage.file_store import FileStore
        from mlpstorage.storage.keys import ObjectKeys
        from mlpstorage.storage.payload import Payload
        from mlpstorage.storage.uring import UringEngine, probe_uring
        store = FileStore(Path({str(files.root)!r}), ObjectKeys("x"), 65536)
        assert probe_uring() is None
        engine = UringEngine(store, Payload(ObjectKeys("x"), 65536), None, 2)
        before = len(os.listdir("/proc/self/fd"))
        # Room for the eventfd, none for the ring: the numbers up to the one that listing uses are taken.
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, before))
        try:
            engine.start()
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before, before))
            print(error.errno, len(os.listdir("/proc/self/fd")) - before, threading.active_count())
            engine.close()
        """
    )
    assert found == f"{errno.EMFILE} 0 1"
