"""Names of the files that layouts make: what a store lists, and the only names that clearing up ever deletes."""

import re
from functools import cache
from typing import Final

from mlpstorage.config import Layout
from mlpstorage.storage.keys import KEY_BYTES

HASH_DIGITS: Final = "0123456789abcdef"
"""Digits of the names of hash directories; an object lies below the first digits of its name."""

OBJECT_NAME: Final = re.compile(rf"([0-9a-f]{{{2 * KEY_BYTES}}})(\.[0-9a-f]{{8}}-[0-9]+\.tmp)?")
"""Layout `file`: an object (its key), or an object being written (its temporary name)."""

PROBE_NAME: Final = re.compile(r"\.probe-[0-9a-f]{8}")
"""Any layout: the file with which direct I/O and the page cache are tried."""

SLAB_NAME: Final = "slab"
"""Layout `slab`: the file of slots."""

SLAB_INDEX_NAME: Final = "slab.index"
"""Layout `slab`: which object each slot holds."""

BUCKET_NAME: Final = re.compile(r"bucket-[0-9]{8}")
"""Layout `bucket`: a bucket of objects."""

BUCKET_INDEX_NAME: Final = "bucket.index"
"""Layout `bucket`: which object lies where."""

LEAF_NAMES: Final = {
    Layout.FILE: OBJECT_NAME,
    Layout.SLAB: re.compile(rf"{re.escape(SLAB_NAME)}|{re.escape(SLAB_INDEX_NAME)}"),
    Layout.BUCKET: re.compile(rf"{BUCKET_NAME.pattern}|{re.escape(BUCKET_INDEX_NAME)}"),
    Layout.OBJECT: re.compile(r"(?!)"),
    Layout.NULL: re.compile(r"(?!)"),
}
"""What all files of a layout are called, in the directory that holds them; the last two make none."""


@cache
def hash_directory_name(digits: int) -> re.Pattern[str]:
    """What hash directories of a level are called that takes so many digits of an object's name."""
    return re.compile(rf"[0-9a-f]{{{digits}}}")
