"""Whose a place of objects is: what a claim of it offers, and whether what an earlier run left there can be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlpstorage.config import Layout
from mlpstorage.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFormat:
    """What the objects of a place are; a run can use objects that another left only where all of it is equal.

    Attributes:
        layout: How they lie.
        namespaces: Of their keys, one a kv rank (see `storage.keys`).
        object_bytes: Bytes of an object's payload.
        block_tokens: Tokens of a block.
        levels: Layout `file`: digits of each level of hash directories; empty for others.
    """

    layout: Layout
    namespaces: tuple[str, ...]
    object_bytes: int
    block_tokens: int
    levels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What was deleted: the files of `run_id`, and their sizes."""

    run_id: str
    files: int
    bytes: int


class Claim(Protocol):
    """A place that this process holds for a run."""

    @property
    def place(self) -> str:
        """The place, for messages."""
        ...

    @property
    def cleared(self) -> Removed | None:
        """What a dead run had left and the claim deleted; None if nothing was found."""
        ...

    @property
    def reused(self) -> bool:
        """Whether objects of an earlier run are there, to be listed."""
        ...

    def run_begins(self) -> None:
        """The run really begins: from here on the marker says whether its objects are to be kept."""
        ...

    def remove_objects(self) -> Removed:
        """Delete all objects; no store may use them any more."""
        ...

    def release(self) -> None:
        """Give the place back. Calling it again does nothing."""
        ...


def format_document(cache_format: CacheFormat) -> dict[str, object]:
    """A format as a marker holds it in JSON."""
    return {
        "layout": cache_format.layout.value,
        "namespaces": list(cache_format.namespaces),
        "object_bytes": cache_format.object_bytes,
        "block_tokens": cache_format.block_tokens,
        "levels": list(cache_format.levels),
    }


def parsed_format(document: Mapping[str, Any]) -> CacheFormat:
    """A format from a marker.

    Raises:
        ValueError: It is none.
    """
    try:
        return CacheFormat(
            layout=Layout(document["layout"]),
            namespaces=tuple(map(str, document["namespaces"])),
            object_bytes=int(document["object_bytes"]),
            block_tokens=int(document["block_tokens"]),
            levels=tuple(map(int, document["levels"])),
        )
    except (KeyError, TypeError) as error:
        raise ValueError("the format lacks something") from error


def kept_by_other(place: str, run_id: str) -> ConfigurationError:
    """The error of a fresh claim of a place whose objects an earlier run was told to keep."""
    return ConfigurationError(
        f"{place} holds the cache that run {run_id} was to keep (--keep-cache); --reuse-cache uses it, and without "
        "--keep-cache deletes it at the end; or choose another place with --cache-dir. Nothing was deleted"
    )


def check_reusable(place: str, run_id: str, *, wanted: CacheFormat, found: CacheFormat) -> None:
    """Check that a run can use what an earlier one left.

    Raises:
        ConfigurationError: Something of the format differs; the message tells what, both values, and the flags.
    """
    differing = _differences(wanted, found)
    if differing:
        raise ConfigurationError(
            f"--reuse-cache: {place} holds objects of run {run_id} that this run cannot use: {'; '.join(differing)}. "
            "Give the values they were written with, or another --cache-dir; nothing was deleted"
        )


def _differences(wanted: CacheFormat, found: CacheFormat) -> list[str]:
    rows: list[tuple[str, str, str]] = [
        ("--layout", wanted.layout.value, found.layout.value),
        ("--model, --tensor-parallel", _namespaces_text(wanted.namespaces), _namespaces_text(found.namespaces)),
        ("--block-tokens", str(wanted.block_tokens), str(found.block_tokens)),
    ]
    if wanted.layout is found.layout:
        rows.append(("--file-levels", _levels_text(wanted.levels), _levels_text(found.levels)))
    differing = [row for row in rows if row[1] != row[2]]
    if not differing and wanted != found:  # the same model by name, but of another shape
        differing = [("bytes of an object (--model)", str(wanted.object_bytes), str(found.object_bytes))]
    return [f"{what} is {mine} here and was {theirs} there" for what, mine, theirs in differing]


def _namespaces_text(namespaces: Sequence[str]) -> str:
    return f"{namespaces[0]!r} in {len(namespaces)} parts" if len(namespaces) != 1 else repr(namespaces[0])


def _levels_text(levels: Sequence[int]) -> str:
    return ",".join(map(str, levels)) or "flat"
