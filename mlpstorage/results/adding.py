"""Sums of results: over ranks, and over trials."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from mlpstorage.results.models import Record, TierCounts

RecordT = TypeVar("RecordT", bound=Record)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; None where there is no whole."""
    return part / whole if whole else None


def sum_or_none(values: Iterable[int | None]) -> int | None:
    """The sum; None where any value could not be had, since a partial sum would pass for the whole."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def added(model: type[RecordT], parts: Sequence[RecordT]) -> RecordT:
    """The sums of records of counts, field by field; counts by tier are added likewise."""
    sums: dict[str, object] = {}
    for name in model.model_fields:
        values = [getattr(part, name) for part in parts]
        if values and isinstance(values[0], TierCounts):
            sums[name] = added(TierCounts, values)
        else:
            sums[name] = sum_or_none(values)
    return model.model_validate(sums)


def added_buckets(parts: Iterable[Mapping[int, float]]) -> dict[int, float]:
    """The sums of counts by bucket."""
    total: dict[int, float] = {}
    for part in parts:
        for bucket, weight in part.items():
            total[bucket] = total.get(bucket, 0.0) + weight
    return total


def joined_digest(digests: Sequence[str]) -> str:
    """The one digest, or the SHA-256 of all of them, in their order, one a line."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
