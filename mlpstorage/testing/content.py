"""What the conformance suites write and what they expect to read: made and compared here, by no code of the product.

An object's content is what `storage.payload` describes, made in the plain way: each page begins with three
little-endian 64-bit words (the object's stamp, the page's number, the xxh3 hash of the rest), and the rest is random. A
version, which is not written anywhere, chooses the random bytes, so that what replaces an object differs from it.
"""

import random
import struct

from xxhash import xxh3_64_intdigest

from mlpstorage.config import PAGE_BYTES
from mlpstorage.storage.keys import ObjectKeys

HEADER = struct.Struct("<QQQ")
"""Stamp, page number, hash of the rest of the page."""


def make_content(keys: ObjectKeys, object_id: int, stored_bytes: int, version: int = 0) -> bytes:
    """The bytes of one version of an object; the same arguments always give the same bytes."""
    stamp = keys.stamp(object_id)
    draw = random.Random(f"{stamp:x}/{version}").randbytes  # noqa: S311 - it need not be secret, but repeatable
    pages: list[bytes] = []
    for page in range(stored_bytes // PAGE_BYTES):
        rest = draw(PAGE_BYTES - HEADER.size)
        pages += HEADER.pack(stamp, page, xxh3_64_intdigest(rest)), rest
    return b"".join(pages)


def difference(found: memoryview | bytes, expected: bytes) -> str | None:
    """Where two contents differ, in words; None where they do not."""
    found = bytes(found)
    if found == expected:
        return None
    if len(found) != len(expected):
        return f"{len(found)} bytes were found where {len(expected)} were expected"
    pages = range(0, len(expected), PAGE_BYTES)
    wrong = [start for start in pages if found[start : start + PAGE_BYTES] != expected[start : start + PAGE_BYTES]]
    page = found[wrong[0] : wrong[0] + HEADER.size]
    stamp, number, _ = HEADER.unpack(page)
    belongs_stamp, belongs_number, _ = HEADER.unpack_from(expected, wrong[0])
    return (
        f"{len(wrong)} of {len(pages)} pages differ; the first is page {belongs_number}, where stamp "
        f"{belongs_stamp:016x} page {belongs_number} belongs and stamp {stamp:016x} page {number} stands"
    )


def page_problem(content: memoryview | bytes, stamp: int) -> str | None:
    """Why some content is not whole pages of the object with this stamp, each with the right hash; None if it is."""
    content = bytes(content)
    if not content:
        return "there are no pages"
    for number, start in enumerate(range(0, len(content), PAGE_BYTES)):
        header = HEADER.unpack_from(content, start)
        belongs = stamp, number, xxh3_64_intdigest(content[start + HEADER.size : start + PAGE_BYTES])
        if header != belongs:
            return f"page {number}: stamp, number and hash are {header}, but should be {belongs}"
    return None
