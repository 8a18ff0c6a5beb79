"""Where a cache lies: a directory, or a prefix in an S3 bucket."""

import re
from dataclasses import dataclass
from pathlib import Path

_SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
"""Names that S3 takes ("General purpose bucket naming rules" of its user guide), but for those that look like IPv4."""

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
"""Of the characters that S3 calls safe in keys those that no client, shell or server writes in another way."""


@dataclass(frozen=True, slots=True)
class S3Location:
    """A place in a bucket; its text is `s3://bucket/prefix`.

    Attributes:
        bucket: Name of the bucket.
        prefix: Beginning of the keys, without a slash at either end; empty for the whole bucket.
    """

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    def __truediv__(self, name: str) -> "S3Location":
        """The place `name` below this one, as with a `Path`."""
        return S3Location(self.bucket, f"{self.prefix}/{name}" if self.prefix else name)


def parse_location(text: str) -> Path | S3Location:
    """A place from what a user writes: `s3://bucket/prefix`, or else the path of a directory.

    Raises:
        ValueError: It begins with `s3://`, and what follows is no bucket, or no prefix that is safe everywhere.
    """
    if not text.startswith(_SCHEME):
        return Path(text)
    bucket, _, prefix = text.removeprefix(_SCHEME).partition("/")
    if not bucket:
        raise ValueError(f"{text!r} names no bucket; expected s3://bucket/prefix")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"{bucket!r} is no name of a bucket: expected 3 to 63 lower-case letters, digits, '.' and '-', "
            "with a letter or digit at both ends"
        )
    prefix = prefix.removesuffix("/")
    for segment in prefix.split("/") if prefix else ():
        if segment in {".", ".."} or not _SEGMENT.fullmatch(segment):
            raise ValueError(
                f"{segment!r} in {text!r}: expected parts of letters, digits, '.', '_' and '-' between single slashes"
            )
    return S3Location(bucket, prefix)
