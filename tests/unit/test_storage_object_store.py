"""Objects in a bucket of a real server: parts, retries, what is refused, and what goes wrong."""

import contextlib
import os
import re
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from mlpstorage.config import MIB
from mlpstorage.errors import AccessError, ConfigurationError
from mlpstorage.storage.base import BlockStore, Moved, ShortObjectError, aligned_memory
from mlpstorage.storage.keys import ObjectKeys
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.object_store import ObjectStore

if TYPE_CHECKING:
    from tests.swift import RawClient, S3Server

KEYS = ObjectKeys("tiny-1b|0|full", "tiny-1b|1|full")
OBJECT_BYTES = 2 * MIB
PART_BYTES = 5 * MIB
"""The smallest that S3 takes."""

_MOST_CONNECTIONS = 32
_PATIENCE_S = 60.0
"""Longest wait for a step of a healthy program."""


class Relay:
    """A network between client and server that cuts connections in mid-transfer.

    Args:
        port: Of the server.
        cuts: Connections to cut.
        after_bytes: How many bytes of answers (or, with `uploads`, of requests) pass on such a connection first.
        uploads: See `after_bytes`.
    """

    def __init__(self, port: int, *, cuts: int = 0, after_bytes: int = MIB, uploads: bool = False) -> None:
        self.requests: list[str] = []
        self._server = ("127.0.0.1", port)
        self._cuts = cuts
        self._after_bytes = after_bytes
        self._uploads = uploads
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []

    @property
    def endpoint(self) -> str:
        """Its address for S3 clients."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        """Pass on connections until it is ended."""
        with contextlib.ExitStack() as open_sockets, ThreadPoolExecutor(_MOST_CONNECTIONS * 2) as threads:
            while True:
                try:
                    client = open_sockets.enter_context(self._listener.accept()[0])
                except OSError:
                    break
                server = open_sockets.enter_context(socket.create_connection(self._server))
                self._sockets += client, server
                threads.submit(self._pass_on, client, server, up=True)
                threads.submit(self._pass_on, server, client, up=False)
            _shut_down(*self._sockets)

    def end(self) -> None:
        """Take no more connections, and cut those that are open."""
        _shut_down(self._listener)
        self._listener.close()

    def _pass_on(self, source: socket.socket, target: socket.socket, *, up: bool) -> None:
        passed_bytes = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if up and (line := re.match(rb"([A-Z]+) \S+ HTTP/1.1\r\n", data)):
                    ranges = re.search(rb"\r\nrange: (\S+)", data, re.IGNORECASE)
                    self.requests.append((line[1] + b" " + (ranges[1] if ranges else b"")).decode().strip())
                passed_bytes += len(data)
                if up is self._uploads and passed_bytes > self._after_bytes and self._cuts:
                    self._cuts -= 1
                    break
                target.sendall(data)
        _shut_down(source, target)


def _shut_down(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def running(relay: Relay) -> Iterator[Relay]:
    """A relay at work."""
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield relay
    finally:
        relay.end()
        thread.join(_PATIENCE_S)


def make_store(bucket: str, object_bytes: int = OBJECT_BYTES, **options: float) -> ObjectStore:
    """An open store below the prefix `kv/run`."""
    part_bytes = int(options.pop("part_bytes", PART_BYTES))
    store = ObjectStore(S3Location(bucket, "kv/run"), KEYS, object_bytes, part_bytes=part_bytes, **options)  # type: ignore[arg-type]
    store.open()
    return store


def random_object(store: BlockStore) -> memoryview:
    """An object's worth of random bytes."""
    memory = aligned_memory(store.stored_bytes)
    memory[:] = os.urandom(store.stored_bytes)
    return memory


def key_of(object_id: int) -> str:
    """Where in the bucket an object must lie."""
    return f"kv/run/{KEYS.name(object_id)}"


@pytest.fixture
def raw(s3_server: "S3Server") -> "RawClient":
    """A client that shares no code with the store."""
    return s3_server.raw


@pytest.fixture
def port(s3_server: "S3Server") -> int:
    """The server's port."""
    found = urlsplit(s3_server.endpoint).port
    assert found
    return found


def test_store_fulfils_the_contract(s3_bucket: str) -> None:
    """The store is a `BlockStore`, for mypy and at run time; what it cannot do it says."""
    contract: BlockStore = make_store(s3_bucket, 1)
    assert (contract.object_bytes, contract.stored_bytes) == (1, 4096)
    flags = contract.capabilities
    assert (flags.shared, flags.lasting, flags.holds_data) == (True, True, True)
    assert (flags.direct, flags.aligned, flags.descriptors) == (False, False, False)
    assert contract.capacity().total_bytes is None
    assert contract.capacity().free_bytes is None
    assert contract.drop_page_cache([1]) == 0
    contract.sync(1)


@pytest.mark.parametrize("object_bytes", [1, 1_124_352, 2 * MIB, 5 * MIB, 5 * MIB + 1, 40 * MIB])
def test_round_trip(s3_bucket: str, raw: "RawClient", object_bytes: int) -> None:
    """What is written is what the bucket holds and what is read, in one piece or in parts."""
    store = make_store(s3_bucket, object_bytes)
    written = random_object(store)
    assert store.write(3, written) == Moved(direct=None, page_cache_bytes=0, retries=0)
    assert raw.get(s3_bucket, key_of(3)) == bytes(written)
    assert raw.sizes(s3_bucket) == {key_of(3): store.stored_bytes}
    found = aligned_memory(store.stored_bytes)
    # Whether the server had it in its memory cannot be known.
    assert store.read(3, found) == Moved(direct=None, page_cache_bytes=None, retries=0)
    assert found == written


def test_default_parts(s3_bucket: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an option an object of 40 MiB is moved in three parts, the first two of 16 MiB."""
    with running(Relay(port)) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        store = ObjectStore(S3Location(s3_bucket, "kv/run"), KEYS, 40 * MIB)
        store.open()
        buffer = random_object(store)
        relay.requests.clear()
        store.write(3, buffer)
        assert sorted(relay.requests) == ["POST", "POST", "PUT", "PUT", "PUT"]
        relay.requests.clear()
        store.read(3, buffer)
        ranges = ["GET bytes=0-16777215", "GET bytes=16777216-33554431", "GET bytes=33554432-41943039"]
        assert sorted(relay.requests) == ranges


def test_large_objects_are_read_as_ranges(s3_bucket: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the size of a part a read is one request for each; up to it, one request for the whole."""
    with running(Relay(port)) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        for object_bytes, expected in (
            (PART_BYTES, ["GET"]),
            (12 * MIB, ["GET bytes=0-5242879", "GET bytes=10485760-12582911", "GET bytes=5242880-10485759"]),
        ):
            store = make_store(s3_bucket, object_bytes)
            written = random_object(store)
            store.write(3, written)
            relay.requests.clear()
            found = aligned_memory(object_bytes)
            store.read(3, found)
            assert sorted(relay.requests) == expected
            assert found == written


def test_a_read_holds_no_second_object(s3_bucket: str) -> None:
    """An object of 32 MiB passes through the interpreter's memory in pieces, of which little is held at once."""
    store = make_store(s3_bucket, 32 * MIB, part_bytes=64 * MIB)
    store.write(3, random_object(store))
    found = aligned_memory(store.stored_bytes)
    tracemalloc.start()
    try:
        store.read(3, found)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 256 * 1024 < peak_bytes < 4 * MIB


def test_threads_share_a_store(s3_bucket: str) -> None:
    """Eight threads, each with a buffer of its own, write and read different objects at the same time."""
    store = make_store(s3_bucket)

    def round_trip(object_id: int) -> bool:
        written, found = random_object(store), aligned_memory(store.stored_bytes)
        store.write(object_id, written)
        store.read(object_id, found)
        return found == written

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(round_trip, range(24))) == [True] * 24


def test_missing_objects(s3_bucket: str, raw: "RawClient") -> None:
    """Reading or deleting an object that is not there says so, also where S3 itself does not tell."""
    store = make_store(s3_bucket)
    buffer = random_object(store)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=KEYS.name(3)):
            store.read(3, buffer)
        with pytest.raises(FileNotFoundError, match=KEYS.name(3)):
            store.delete(3)
        store.write(3, buffer)
        assert store.delete(3) == Moved()
        assert raw.sizes(s3_bucket) == {}


def test_deleting_what_another_wrote(s3_bucket: str, raw: "RawClient") -> None:
    """An object that this process never saw is found and deleted."""
    make_store(s3_bucket).write(3, random_object(make_store(s3_bucket)))
    assert len(raw.sizes(s3_bucket)) == 1
    make_store(s3_bucket).delete(3)
    assert raw.sizes(s3_bucket) == {}


@pytest.mark.parametrize("left_bytes", [0, 4096, 5 * MIB, 12 * MIB - 1])
def test_a_truncated_object(s3_bucket: str, raw: "RawClient", left_bytes: int) -> None:
    """An object that is shorter than was written is an error of its own, in whichever part it ends."""
    store = make_store(s3_bucket, 12 * MIB)
    raw.put(s3_bucket, key_of(3), bytes(left_bytes))
    with pytest.raises(ShortObjectError, match=f"of {12 * MIB} bytes are there.*{key_of(3)}"):
        store.read(3, aligned_memory(store.stored_bytes))


def test_a_truncated_small_object(s3_bucket: str, raw: "RawClient") -> None:
    """Likewise for one that is read with one request."""
    store = make_store(s3_bucket)
    raw.put(s3_bucket, key_of(3), bytes(OBJECT_BYTES - 1))
    with pytest.raises(ShortObjectError, match=f"{OBJECT_BYTES - 1} of {OBJECT_BYTES} bytes are there"):
        store.read(3, aligned_memory(store.stored_bytes))


def test_exists_is_a_batch(s3_bucket: str) -> None:
    """Which of many objects are there, in the order of the question."""
    store = make_store(s3_bucket, 1)
    for object_id in range(0, 40, 2):
        store.write(object_id, random_object(store))
    assert store.exists(range(40)) == [True, False] * 20
    assert store.exists([1]) == [False]
    assert store.exists([]) == []


def test_listing(s3_bucket: str, raw: "RawClient") -> None:
    """Whole objects are found again by a new store, damaged ones deleted, foreign ones left and counted."""
    first = make_store(s3_bucket, 4096)
    for object_id in (5, 0, 3):
        first.write(object_id, random_object(first))
    raw.put(s3_bucket, key_of(8), bytes(4095))
    raw.put(s3_bucket, key_of(9), bytes(8192))
    other = ObjectKeys("other|0|full").name(1)
    foreign = {f"kv/run/{other}": 4096, "kv/run/note": 1, f"kv/run/a/{KEYS.name(3)}": 4096, f"kv/run2/{other}": 4096}
    for key, size_bytes in foreign.items():
        raw.put(s3_bucket, key, bytes(size_bytes))
    second = make_store(s3_bucket, 4096)
    listing = second.listing()
    assert sorted(listing.object_ids) == [0, 3, 5]
    assert (listing.damaged, listing.foreign) == (2, 3)
    assert raw.sizes(s3_bucket) == {**foreign, **{key_of(object_id): 4096 for object_id in (0, 3, 5)}}
    second.delete(5)
    assert sorted(second.listing().object_ids) == [0, 3]


def test_open_leaves_nothing_and_close_can_be_repeated(s3_bucket: str, raw: "RawClient") -> None:
    """Opening probes the place and leaves it as it was; a closed store takes no operation."""
    store = make_store(s3_bucket)
    assert raw.sizes(s3_bucket) == {}
    store.close()
    store.close()
    with pytest.raises(ValueError, match="not open"):
        store.read(3, aligned_memory(OBJECT_BYTES))


def test_wrong_credentials(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening with a wrong secret is an access error that names the variables, not the secret."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-s3cr3t")
    with pytest.raises(AccessError, match="AWS_SECRET_ACCESS_KEY") as refused:
        make_store(s3_bucket)
    assert str(refused.value).startswith(f"s3://{s3_bucket}/kv/run: ")
    assert "wr0ng-s3cr3t" not in str(refused.value)


def test_no_such_bucket(s3_bucket: str) -> None:
    """Opening in a bucket that is not there is a matter of configuration; nothing is created."""
    with pytest.raises(ConfigurationError, match="there is no such bucket"):
        make_store(f"{s3_bucket}-not")


def test_no_server(s3_server: "S3Server", s3_bucket: str) -> None:
    """Opening where nobody answers tells the address."""
    with s3_server.stopped(), pytest.raises(ConfigurationError, match=f"{s3_server.endpoint}: Connection refused"):
        make_store(s3_bucket)


@pytest.mark.parametrize("what", ["read", "write", "delete", "exists", "listing"])
def test_a_server_that_stops(s3_server: "S3Server", s3_bucket: str, what: str) -> None:
    """An operation on a server that went away is tried again, and fails in the end; what it was is told."""
    store = make_store(s3_bucket, 4096, limit_s=1.0)
    buffer = random_object(store)
    store.write(3, buffer)
    operations = {
        "read": lambda: store.read(3, buffer),
        "write": lambda: store.write(3, buffer),
        "delete": lambda: store.delete(3),
        "exists": lambda: store.exists([3]),
        "listing": store.listing,
    }
    with s3_server.stopped(), pytest.raises(OSError, match=r"failed after \d+ tries in \d\.\d s") as failed:
        operations[what]()
    message = str(failed.value)
    assert f"at {s3_server.endpoint}: Connection refused" in message
    assert f"s3://{s3_bucket}/kv/run" in message
    assert "testing" not in message
    assert isinstance(failed.value.__cause__, Exception)


@pytest.mark.parametrize("object_bytes", [4096, 12 * MIB])
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_server_that_hangs(s3_server: "S3Server", s3_bucket: str, object_bytes: int, what: str) -> None:
    """A server that takes connections and never answers is asked twice, and then given up."""
    make_store(s3_bucket, object_bytes).write(3, random_object(make_store(s3_bucket, object_bytes)))
    store = make_store(s3_bucket, object_bytes, limit_s=3.0)
    buffer = random_object(store)
    operation = store.read if what == "read" else store.write
    with s3_server.hung(), pytest.raises(OSError, match=r"failed after 2 tries .*no answer in time"):
        operation(3, buffer)


def test_a_server_that_comes_back(s3_server: "S3Server", s3_bucket: str, port: int) -> None:
    """A read that began while the server was away succeeds when it is back in time, and its retries are counted."""
    store = make_store(s3_bucket, limit_s=60.0)
    written, found = random_object(store), aligned_memory(OBJECT_BYTES)
    store.write(3, written)
    with ThreadPoolExecutor(1) as threads:
        with s3_server.stopped(), socket.create_server(("127.0.0.1", port)) as listener:
            read = threads.submit(store.read, 3, found)
            listener.settimeout(_PATIENCE_S)
            listener.accept()[0].close()  # so the first try has failed
        moved = read.result(_PATIENCE_S)
    assert moved.retries > 0
    assert found == written


def test_retries_of_the_question_before_a_delete_count(
    s3_server: "S3Server", s3_bucket: str, port: int, raw: "RawClient"
) -> None:
    """Where the store asks for an object before it deletes it, the tries of both requests are the operation's."""
    make_store(s3_bucket).write(3, random_object(make_store(s3_bucket)))
    store = make_store(s3_bucket, limit_s=60.0)
    with ThreadPoolExecutor(1) as threads:
        with s3_server.stopped(), socket.create_server(("127.0.0.1", port)) as listener:
            delete = threads.submit(store.delete, 3)
            listener.settimeout(_PATIENCE_S)
            listener.accept()[0].close()  # so the first try of the question has failed
        moved = delete.result(_PATIENCE_S)
    assert moved.retries > 0
    assert raw.sizes(s3_bucket) == {}


@pytest.mark.parametrize("object_bytes", [4 * MIB, 12 * MIB])
@pytest.mark.parametrize("cuts", [1, 2])
def test_a_connection_cut_in_mid_read(
    s3_bucket: str, port: int, monkeypatch: pytest.MonkeyPatch, object_bytes: int, cuts: int
) -> None:
    """A body that breaks off is fetched again; each time counts as a retry, and the data are right."""
    store = make_store(s3_bucket, object_bytes)
    written, found = random_object(store), aligned_memory(object_bytes)
    store.write(3, written)
    with running(Relay(port, cuts=cuts)) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        assert make_store(s3_bucket, object_bytes).read(3, found).retries == cuts
    assert found == written


@pytest.mark.parametrize("object_bytes", [4 * MIB, 12 * MIB])
def test_a_connection_cut_in_mid_write(
    s3_bucket: str, port: int, raw: "RawClient", monkeypatch: pytest.MonkeyPatch, object_bytes: int
) -> None:
    """An upload that breaks off is done again from its beginning, and counted."""
    with running(Relay(port, cuts=1, uploads=True)) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        store = make_store(s3_bucket, object_bytes)
        written = random_object(store)
        assert store.write(3, written).retries == 1
    assert raw.get(s3_bucket, key_of(3)) == bytes(written)


def test_a_write_that_fails_leaves_no_object(
    s3_bucket: str, port: int, raw: "RawClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every try breaks off nothing can be found under the object's name."""
    with running(Relay(port, cuts=1000, uploads=True)) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        store = make_store(s3_bucket, limit_s=2.0)
        with pytest.raises(OSError, match="put failed after"):
            store.write(3, random_object(store))
    assert raw.sizes(s3_bucket) == {}


def test_a_bucket_deleted_under_the_run(s3_bucket: str, raw: "RawClient") -> None:
    """A bucket that vanishes fails the operation at once, and not as a missing object."""
    store = make_store(s3_bucket)
    raw.request("DELETE", f"/{s3_bucket}")
    with pytest.raises(OSError, match=r"put failed after one try .*NoSuchBucket") as failed:
        store.write(3, random_object(store))
    assert not isinstance(failed.value, FileNotFoundError)


def test_one_wrong_byte_is_read_as_it_is(s3_bucket: str, raw: "RawClient") -> None:
    """The store gives what the server holds; to see that it is wrong is the payload's part."""
    store = make_store(s3_bucket)
    written = random_object(store)
    store.write(3, written)
    planted = bytearray(written)
    planted[1_000_000] ^= 1
    raw.put(s3_bucket, key_of(3), bytes(planted))
    found = aligned_memory(OBJECT_BYTES)
    store.read(3, found)
    assert found == planted
