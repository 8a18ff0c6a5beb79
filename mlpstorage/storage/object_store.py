"""Objects in an S3 bucket: one object of the bucket each, `<prefix>/<name>`.

What the client itself costs: a write hands the library one copy of the payload, in parts of at most `part_bytes`. A
read takes the body as it comes, in pieces of some 256 KiB that the library makes, and copies each into the buffer: no
second object is ever held in memory. Transfers are not hashed; the proof of what was read is `storage.payload`'s.

What the client cannot know is whether the server took an object from its memory. Nothing is cached on this side.
"""

import errno
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING

from mlpstorage.config import MIB
from mlpstorage.storage.base import Capabilities, Capacity, Listing, Moved, ShortObjectError, padded_bytes
from mlpstorage.storage.keys import KEY_BYTES, ObjectKeys
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.names import OBJECT_NAME
from mlpstorage.storage.object_client import LIMIT_S, ObjectClient, cause_of, connect, note_retries, told

if TYPE_CHECKING:
    from obstore import GetOptions

PART_BYTES = 16 * MIB
"""Default size of the parts that larger objects are moved in; S3 takes no smaller one than 5 MiB."""

_PIECE_BYTES = 256 * 1024
"""What of a body is copied at once. Larger pieces are fresh memory each time, whose page faults cost more than the
copy; smaller ones take the interpreter too often."""

_HEAD_REQUESTS = 16
"""Questions that a batch of `exists` asks at once."""


class ObjectStore:
    """A block store over a prefix of a bucket.

    Objects larger than a part are uploaded in parts, and read as ranges, `concurrency` at once. Such an upload that
    fails may leave parts that are no object and that only the bucket's own rules clear ("abort incomplete multipart
    uploads"). Any write whose answer never came may still take place later, whole.

    S3 says the same of the deletion of an object that is there and of one that is not. So the store remembers what it
    wrote or listed (about 75 bytes of memory an object), and asks the server about others before it deletes them. An
    object of its own that another process deleted is not noticed.

    Attributes:
        location: The prefix.
        object_bytes: Bytes of an object's payload.
        stored_bytes: Bytes of an object in the bucket: the payload, padded to full pages.
    """

    __slots__ = (
        "_client",
        "_concurrency",
        "_keys",
        "_known",
        "_limit_s",
        "_part_bytes",
        "_prefix",
        "location",
        "object_bytes",
        "stored_bytes",
    )

    def __init__(
        self,
        location: S3Location,
        keys: ObjectKeys,
        object_bytes: int,
        *,
        part_bytes: int = PART_BYTES,
        concurrency: int = 4,
        limit_s: float = LIMIT_S,
    ) -> None:
        self.location = location
        self.object_bytes = object_bytes
        self.stored_bytes = padded_bytes(object_bytes)
        self._keys = keys
        self._prefix = (location / "").prefix
        self._part_bytes = part_bytes
        self._concurrency = concurrency
        self._limit_s = limit_s
        self._known: set[int] = set()
        self._client: ObjectClient | None = None

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do."""
        return Capabilities(direct=False, aligned=False, descriptors=False, shared=True, lasting=True, holds_data=True)

    def open(self) -> None:
        """Connect, and see that objects can be listed, written and deleted.

        Raises:
            ConfigurationError: There is no such bucket, no server, no package, or the environment lacks something.
            AccessError: The server refuses the credentials, or they do not suffice.
        """
        client = connect(self.location.bucket, self._limit_s)
        with told(self.location):
            client.check(self.location)
        self._client = client

    def read(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.read`."""
        client, key = self._opened(), self._key(object_id)
        if self.stored_bytes <= self._part_bytes:
            _, retries = client.tried("get", key, lambda: self._get(client, key, buffer, 0))
        else:
            retries = self._read_parts(client, key, buffer)
        return Moved(page_cache_bytes=None, retries=retries)

    def write(self, object_id: int, buffer: memoryview) -> Moved:
        """See `BlockStore.write`."""
        import obstore  # noqa: PLC0415 - an optional package

        client, key = self._opened(), self._key(object_id)
        _, retries = client.tried(
            "put",
            key,
            lambda: obstore.put(
                client.s3,
                key,
                buffer,
                use_multipart=self.stored_bytes > self._part_bytes,
                chunk_size=self._part_bytes,
                max_concurrency=self._concurrency,
            ),
        )
        self._known.add(object_id)
        return Moved(retries=retries)

    def delete(self, object_id: int) -> Moved:
        """See `BlockStore.delete`."""
        import obstore  # noqa: PLC0415 - an optional package

        client, key = self._opened(), self._key(object_id)
        retries = 0
        try:
            self._known.remove(object_id)
        except KeyError:
            _, retries = client.tried("head", key, lambda: obstore.head(client.s3, key))
        _, retries = client.tried("delete", key, lambda: obstore.delete(client.s3, key), retries=retries)
        return Moved(retries=retries)

    def sync(self, object_id: int) -> None:
        """Nothing to do: a server answers a write when the object is safe by its own rules."""

    def exists(self, object_ids: Sequence[int]) -> list[bool]:
        """See `BlockStore.exists`."""
        client = self._opened()
        if len(object_ids) == 1:
            return [self._is_there(client, object_ids[0])]
        with ThreadPoolExecutor(_HEAD_REQUESTS) as threads:
            return list(threads.map(lambda object_id: self._is_there(client, object_id), object_ids))

    def listing(self) -> Listing:
        """See `BlockStore.listing`. An object is damaged where its size is wrong; no stamps are read."""
        client = self._opened()
        found: list[tuple[float, int]] = []
        damaged: list[str] = []
        foreign = 0
        for page in client.pages(self.location.prefix):
            for entry in page:
                object_id = self._object_id(entry["path"])
                if object_id is None:
                    foreign += 1
                elif entry["size"] != self.stored_bytes:
                    damaged.append(entry["path"])
                else:
                    found.append((entry["last_modified"].timestamp(), object_id))
        client.delete_all(damaged)
        found.sort()
        object_ids = tuple(object_id for _, object_id in found)
        self._known.update(object_ids)
        return Listing(object_ids=object_ids, damaged=len(damaged), foreign=foreign)

    def drop_page_cache(self, object_ids: Sequence[int]) -> int | None:  # noqa: ARG002 - there is nothing to drop
        """See `BlockStore.drop_page_cache`: no page of this host holds any of them."""
        return 0

    def capacity(self) -> Capacity:
        """S3 tells no limit."""
        return Capacity(total_bytes=None, free_bytes=None)

    def close(self) -> None:
        """See `BlockStore.close`."""
        self._client = None
        self._known.clear()

    def _opened(self) -> ObjectClient:
        if self._client is None:
            raise ValueError("the store is not open")
        return self._client

    def _key(self, object_id: int) -> str:
        return self._prefix + self._keys.name(object_id)

    def _object_id(self, key: str) -> int | None:
        """Which object of this store has a key; None where none has."""
        name = key.removeprefix(self._prefix)
        if len(name) != 2 * KEY_BYTES or not OBJECT_NAME.fullmatch(name):
            return None
        return self._keys.object_id(bytes.fromhex(name))

    def _is_there(self, client: ObjectClient, object_id: int) -> bool:
        import obstore  # noqa: PLC0415 - an optional package

        key = self._key(object_id)
        try:
            client.tried("head", key, lambda: obstore.head(client.s3, key))
        except FileNotFoundError:
            return False
        return True

    def _read_parts(self, client: ObjectClient, key: str, buffer: memoryview) -> int:
        """Read an object as ranges, several at once, and each again where it failed; returns the number of retries."""
        begin_s = time.monotonic()
        part_bytes = self._part_bytes
        retries: list[int] = []

        def read_part(start_bytes: int) -> None:
            part = buffer[start_bytes : start_bytes + part_bytes]
            try:
                _, tried = client.tried("get", key, lambda: self._get(client, key, part, start_bytes), begin_s=begin_s)
            except OSError as error:
                retries.append(getattr(error, "retries", 0))
                raise
            retries.append(tried)

        starts = range(0, self.stored_bytes, part_bytes)
        try:
            with ThreadPoolExecutor(min(self._concurrency, len(starts))) as threads:
                for _ in threads.map(read_part, starts):
                    pass
        except OSError as error:
            note_retries(error, sum(retries))
            raise
        return sum(retries)

    def _get(self, client: ObjectClient, key: str, buffer: memoryview, start_bytes: int) -> None:
        """Fill `buffer` with an object's bytes from `start_bytes` on."""
        import obstore  # noqa: PLC0415 - an optional package

        whole = len(buffer) == self.stored_bytes
        options: GetOptions = {} if whole else {"range": (start_bytes, start_bytes + len(buffer))}
        try:
            found = obstore.get(client.s3, key, options=options)
        except client.library_errors as error:
            if cause_of(error).status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise self._truncated(client, key, f"at most {start_bytes}") from error
            raise
        if found.meta["size"] < self.stored_bytes:
            raise self._truncated(client, key, str(found.meta["size"]))
        filled_bytes = 0
        for piece in found.stream(min_chunk_size=_PIECE_BYTES):
            end_bytes = filled_bytes + len(piece)
            if end_bytes > len(buffer):
                break
            buffer[filled_bytes:end_bytes] = piece
            filled_bytes = end_bytes
        if filled_bytes != len(buffer):
            raise self._truncated(client, key, str(start_bytes + filled_bytes))

    def _truncated(self, client: ObjectClient, key: str, size_bytes: str) -> ShortObjectError:
        message = f"the object is truncated: {size_bytes} of {self.stored_bytes} bytes are there"
        return ShortObjectError(errno.EIO, message, client.where(key))
