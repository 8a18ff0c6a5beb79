"""Whose a prefix of a bucket is: one run's at a time, and only what runs of this tool made is ever deleted.

    <prefix>/.mlpstorage.json    the marker: which run it is, which process on which host, where its objects are
    <prefix>/<run id>/...        the objects, put there by `ObjectStore`

S3 has no lock that ends with the process that holds it. The marker stands in for one: it holds the prefix until it is
given back, or until the process that wrote it is seen to be gone. That can be told on the same host only, so the marker
of a killed run bars all other hosts until its launcher (`clear_prefix`) or someone who knows removes it.

The marker is written on condition that nobody else has written it meanwhile. Not every server keeps that promise when
two ask at the same time (OpenStack Swift lets both win, and one of the markers stays), so it is read again a moment
later.
"""

import contextlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlpstorage.cluster.process import this_process
from mlpstorage.errors import ConfigurationError, RunError
from mlpstorage.storage.claim import CacheFormat, Removed, check_reusable, kept_by_other
from mlpstorage.storage.keys import KEY_BYTES
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.marker import RUN_ID
from mlpstorage.storage.object_client import ObjectClient, connect, told
from mlpstorage.storage.object_marker import PrefixMarker, marker_location, put_prefix_marker, read_prefix_marker

if TYPE_CHECKING:
    from obstore import ObjectMeta

_OBJECT_NAME = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")
_SETTLE_S = 0.25
"""How long after a marker was written it is read again. Runs that both found the place free write their markers within
the time of one small request; a server that takes longer than this for one can still let both in."""


class ObjectPrefix:
    """A prefix of a bucket that this process holds for a run, a `Claim`; made by `claim`.

    Attributes:
        objects: Where the objects are, the location of an `ObjectStore`.
        cleared: What a dead run had left and the claim deleted; None if nothing was found.
        reused: Whether the objects are those of an earlier run.
    """

    __slots__ = ("_client", "_earlier", "_keep", "_location", "_marker", "cleared", "objects", "reused")

    def __init__(
        self,
        location: S3Location,
        client: ObjectClient,
        marker: PrefixMarker,
        *,
        keep: bool,
        cleared: Removed | None,
        earlier: PrefixMarker | None,
    ) -> None:
        self.objects = location / marker.objects
        self.cleared = cleared
        self.reused = earlier is not None
        self._keep = keep
        self._earlier = earlier  # whose objects are used, until the run begins
        self._location = location
        self._client = client
        self._marker: PrefixMarker | None = marker

    @classmethod
    def claim(
        cls,
        location: S3Location,
        run_id: str,
        *,
        format: CacheFormat,  # noqa: A002 - the word for it
        keep: bool = False,
        reuse: bool = False,
    ) -> "ObjectPrefix":
        """Take a prefix for a run, and clear or take over what an earlier run left there.

        Args:
            location: The prefix. Its bucket must be there.
            run_id: The run; its objects lie below a name of this.
            format: What the run's objects are.
            keep: Leave the objects where they are when the prefix is given back, or the process is killed. Holds from
                `run_begins` on; before that what is there is kept if it was to be.
            reuse: Use the objects that an earlier run left, were they to be kept or was it killed. Without this what a
                dead run left is cleared, unless it was to be kept.

        Raises:
            ConfigurationError: Another run holds the prefix, or held it on another host and did not give it back; it
                left objects that were to be kept or that cannot be reused; there is something of the run's name that
                is not this run's; or the bucket cannot be used.
            AccessError: The server refuses access.
        """
        if not RUN_ID.fullmatch(run_id):
            raise ConfigurationError(f"run id {run_id!r}: expected letters, digits, '.', '_' and '-'")
        client = connect(location.bucket)
        with told(location):
            earlier, version = read_prefix_marker(client, location)
            objects, leftovers = _allowed(client, location, earlier, run_id, format, reuse=reuse)
            reused = earlier if earlier is not None and earlier.objects == objects else None
            marker = PrefixMarker(
                run_id=run_id,
                token=secrets.token_hex(8),
                process=this_process(),
                released=False,
                created=time.time(),
                objects=objects,
                leftovers=leftovers,
                # Until the run begins: one that is refused, or killed, takes nothing from what was to be kept, and
                # keeps nothing.
                keep=reused is not None and (keep or reused.keep),
                format=format,
            )
            _take(client, location, marker, version)
            cleared = _clear(client, location, marker, earlier)
        marker = replace(marker, leftovers=())
        reused = None if reused is None else replace(reused, leftovers=())
        return cls(location, client, marker, keep=keep, cleared=cleared, earlier=reused)

    @property
    def place(self) -> str:
        """The prefix, for messages."""
        return str(self._location)

    def run_begins(self) -> None:
        """The run really begins: from here on the marker says whether its objects are to be kept.

        Raises:
            AccessError: The marker may not be written.
            ConfigurationError: It is another run's by now.
            RunError: The server does not do it.
        """
        if self._marker is None:
            raise ValueError("the prefix was given back")
        marker = replace(self._marker, keep=self._keep)
        with told(self._location, RunError):
            found, _ = read_prefix_marker(self._client, self._location)
            if found is None or found.token != marker.token:
                who = found.holder if found else "someone who deleted its marker"
                raise ConfigurationError(f"{self._location} was meanwhile taken from this run by {who}")
            put_prefix_marker(self._client, self._location, marker)
        self._marker = marker
        self._earlier = None

    def remove_objects(self) -> Removed:
        """Delete the objects; no store may use them any more.

        Raises:
            AccessError: They may not be deleted.
            RunError: The server does not do it.
        """
        marker = self._marker
        if marker is None:
            raise ValueError("the prefix was given back")
        with told(self._location, RunError):
            return _remove(self._client, self._location, marker.run_id, [marker.objects])

    def release(self) -> None:
        """Give the prefix back. Calling it again does nothing.

        Objects that are still there stay, and with them the marker. The next claim, from whatever host, clears them, or
        uses them; if they were to be kept it does nothing but use them. Where they are an earlier run's and this one
        has not begun, the marker is that run's again.

        Raises:
            AccessError: The marker may not be changed.
            RunError: The server does not do it.
        """
        marker, self._marker = self._marker, None
        if marker is not None:
            with told(self._location, RunError):
                _give_back(self._client, self._location, marker.token, self._earlier or marker)


def clear_prefix(location: S3Location, run_id: str) -> Removed | None:
    """Delete what a run left below a prefix when it was killed; None, and nothing done, while a process holds it.

    Objects that were to be kept are. Whether a process on another host still runs cannot be told: that it does not the
    caller knows, who started it.

    Raises:
        AccessError: The leftovers may not be deleted.
        ConfigurationError: The marker is none that this tool wrote.
        RunError: The server does not do it.
    """
    removed = Removed(run_id=run_id, files=0, bytes=0)
    client = connect(location.bucket)
    with told(location, RunError):
        marker, _ = read_prefix_marker(client, location)
        if marker is None or marker.run_id != run_id:
            return removed
        if marker.held:
            return None
        places = marker.leftovers if marker.keep else (marker.objects, *marker.leftovers)
        removed = _remove(client, location, run_id, places)
        _give_back(client, location, marker.token, replace(marker, leftovers=()))
    return removed


def _allowed(
    client: ObjectClient,
    location: S3Location,
    earlier: PrefixMarker | None,
    run_id: str,
    cache_format: CacheFormat,
    *,
    reuse: bool,
) -> tuple[str, tuple[str, ...]]:
    """Which name the objects of a run have below a prefix with that marker, and which are first to be cleared.

    Raises:
        ConfigurationError: The run may not take the prefix.
    """
    leftovers: tuple[str, ...] = ()
    if earlier is not None:
        _refuse_held(location, earlier)
        if reuse:
            check_reusable(str(location), earlier.run_id, wanted=cache_format, found=earlier.format)
            return earlier.objects, earlier.leftovers
        if earlier.keep and any(_own(client, location / earlier.objects)):
            raise kept_by_other(str(location), earlier.run_id)
        leftovers = (earlier.objects, *earlier.leftovers)
    objects = location / run_id
    if any(client.pages(objects.prefix)):
        raise ConfigurationError(
            f"{objects} is there already and is not this run's; delete it, or choose another place with --cache-dir"
        )
    return run_id, leftovers


def _refuse_held(location: S3Location, earlier: PrefixMarker) -> None:
    held = earlier.held
    if held:
        raise ConfigurationError(
            f"{location} is in use by {earlier.holder}; wait for it to end, or choose another place with --cache-dir"
        )
    if held is None:
        raise ConfigurationError(
            f"{location} is in use by {earlier.holder}, and it cannot be told from this host whether that still runs. "
            f"If it is known to be dead, delete the objects below {location / earlier.objects} and the object "
            f"{marker_location(location)}; or choose another place with --cache-dir"
        )


def _take(client: ObjectClient, location: S3Location, marker: PrefixMarker, version: str | None) -> None:
    """Put a marker in the place of the one that was found (`version`, its entity tag), or of none.

    Raises:
        ConfigurationError: Another run was faster.
    """
    put_prefix_marker(client, location, marker, "create" if version is None else {"e_tag": version})
    time.sleep(_SETTLE_S)
    winner, _ = read_prefix_marker(client, location)
    if winner is None or winner.token != marker.token:
        who = winner.holder if winner else "a run that has already ended"
        raise ConfigurationError(
            f"{location} was taken at the same moment by {who}; choose another place with --cache-dir"
        )


def _clear(
    client: ObjectClient, location: S3Location, marker: PrefixMarker, earlier: PrefixMarker | None
) -> Removed | None:
    """Delete what dead runs left below a prefix that this run holds; returns what it was, None if there was nothing."""
    if earlier is None or not marker.leftovers:
        return None
    try:
        removed = _remove(client, location, earlier.run_id, marker.leftovers)
        put_prefix_marker(client, location, replace(marker, leftovers=()))
    except BaseException:
        # Whoever comes next, from whatever host, may go on from here; kept is what was to be kept before.
        with contextlib.suppress(OSError):
            put_prefix_marker(client, location, replace(marker, released=True, keep=marker.keep and earlier.keep))
        raise
    return removed


def _own(client: ObjectClient, objects: S3Location) -> Iterator[Sequence["ObjectMeta"]]:
    """The objects below a run's prefix that a store can have made, in pages; a page may be empty."""
    prefix = (objects / "").prefix
    for page in client.pages(objects.prefix):
        yield [entry for entry in page if _OBJECT_NAME.fullmatch(entry["path"].removeprefix(prefix))]


def _remove(client: ObjectClient, location: S3Location, run_id: str, places: Sequence[str]) -> Removed:
    """Delete the objects of runs."""
    files, size_bytes = 0, 0
    for name in places:
        for page in _own(client, location / name):
            client.delete_all([entry["path"] for entry in page])
            files += len(page)
            size_bytes += sum(entry["size"] for entry in page)
    return Removed(run_id=run_id, files=files, bytes=size_bytes)


def _give_back(client: ObjectClient, location: S3Location, token: str, marker: PrefixMarker) -> None:
    """Delete the marker of the claim with that token or, where objects remain, leave `marker`, as one given back.

    A marker that is another's by now, because someone deleted this run's, is left alone.
    """
    found, _ = read_prefix_marker(client, location)
    if found is None or found.token != token:
        return
    if any(_own(client, location / marker.objects)):
        put_prefix_marker(client, location, replace(marker, released=True))
    else:
        client.delete_all([marker_location(location).prefix])
