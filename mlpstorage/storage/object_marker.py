"""The object that says which run holds a prefix of a bucket, and whose objects lie there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from mlpstorage.cluster.process import process_alive
from mlpstorage.errors import ConfigurationError
from mlpstorage.storage.claim import CacheFormat, format_document, parsed_format
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.marker import MARKER_NAME, RUN_ID
from mlpstorage.storage.object_client import ObjectClient, cause_of

if TYPE_CHECKING:
    from obstore import PutMode

_TOOL: Final = "mlpstorage"
_LIMIT_BYTES = 1 << 20
_PROCESS_FIELDS = ("pid", "host", "boot_id", "start_ticks")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMarker:
    """Who claimed a prefix.

    Attributes:
        run_id: The run.
        token: Tells this claim from every other.
        process: Process that holds the prefix, as `cluster.process.this_process` describes it.
        released: Whether it gave the prefix back, and left objects.
        created: When the prefix was claimed, in seconds since the epoch.
        objects: Name of the objects' prefix below this one: the run's own id, or that of the run whose objects it uses.
        leftovers: Such names of dead runs whose objects are still to be deleted.
        keep: Whether the objects are to outlive the run; until it begins, whether they are to outlive its claim.
        format: What the objects are.
    """

    run_id: str
    token: str
    process: Mapping[str, object]
    released: bool
    created: float
    objects: str
    leftovers: tuple[str, ...]
    keep: bool
    format: CacheFormat

    @property
    def holder(self) -> str:
        """The run, for messages."""
        return f"run {self.run_id} (process {self.process['pid']} on {self.process['host']})"

    @property
    def held(self) -> bool | None:
        """Whether the run still has the prefix; None where that cannot be told from here."""
        return False if self.released else process_alive(self.process)


def marker_location(location: S3Location) -> S3Location:
    """Where the marker of a prefix is."""
    return location / MARKER_NAME


def read_prefix_marker(client: ObjectClient, location: S3Location) -> tuple[PrefixMarker | None, str | None]:
    """The marker of a prefix and its entity tag; None and None if there is none.

    Raises:
        ConfigurationError: There is an object of that name that no run of this tool wrote.
        OSError: See `ObjectClient.tried`. A server that does not answer at all is soon given up.
    """
    import obstore  # noqa: PLC0415 - an optional package

    where = marker_location(location)

    def get() -> tuple[bytes, str | None]:
        found = obstore.get(client.s3, where.prefix)
        content = b"" if found.meta["size"] > _LIMIT_BYTES else bytes(found.bytes())
        return content, found.meta["e_tag"]

    try:
        (content, version), _ = client.tried("get", where.prefix, get, patient=False)
    except FileNotFoundError:
        return None, None
    try:
        return _parsed(json.loads(content)), version
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"{where} is not a marker that mlpstorage wrote, so nothing here is safe to delete; "
            "delete it yourself, or choose another place with --cache-dir"
        ) from error


def put_prefix_marker(
    client: ObjectClient, location: S3Location, marker: PrefixMarker, mode: "PutMode" = "overwrite"
) -> None:
    """Write a marker. Where `mode` has a condition that is not met nothing is written, and nothing raised.

    A server that knows no conditions writes it in any case. What became of it the caller must read.

    Raises:
        OSError: See `ObjectClient.tried`.
    """
    import obstore  # noqa: PLC0415 - an optional package

    key = marker_location(location).prefix
    content = json.dumps(_document(marker)).encode()

    def put() -> None:
        try:
            obstore.put(client.s3, key, content, mode=mode, use_multipart=False)
        except client.library_errors as error:
            status = cause_of(error).status
            if status == HTTPStatus.NOT_IMPLEMENTED:
                obstore.put(client.s3, key, content, use_multipart=False)
            elif status != HTTPStatus.PRECONDITION_FAILED:
                raise

    client.tried("put", key, put)


def _document(marker: PrefixMarker) -> dict[str, object]:
    return {
        "tool": _TOOL,
        "run_id": marker.run_id,
        "token": marker.token,
        **{name: marker.process[name] for name in _PROCESS_FIELDS},
        "released": marker.released,
        "created": marker.created,
        "objects": marker.objects,
        "leftovers": list(marker.leftovers),
        "keep": marker.keep,
        "format": format_document(marker.format),
    }


def _parsed(document: dict[str, Any]) -> PrefixMarker:
    """A marker from its JSON; raises ValueError, TypeError or KeyError where it is none."""
    if document["tool"] != _TOOL:
        raise ValueError("the marker of another tool")
    return PrefixMarker(
        run_id=_name(document["run_id"]),
        token=str(document["token"]),
        process={name: document[name] for name in _PROCESS_FIELDS},
        released=document["released"] is True,
        created=float(document["created"]),
        objects=_name(document["objects"]),
        leftovers=tuple(map(_name, document["leftovers"])),
        keep=document["keep"] is True,
        format=parsed_format(document["format"]),
    )


def _name(text: object) -> str:
    if not isinstance(text, str) or not RUN_ID.fullmatch(text):
        raise ValueError("not the name of a run")
    return text
