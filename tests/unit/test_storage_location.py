"""Places of a cache: directories, and prefixes of buckets."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlpstorage.storage.location import S3Location, parse_location


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://cache", "cache", ""),
        ("s3://cache/", "cache", ""),
        ("s3://cache/kv", "cache", "kv"),
        ("s3://my.cache-01/a/b_c/run-1.2/", "my.cache-01", "a/b_c/run-1.2"),
    ],
)
def test_a_bucket_and_its_prefix_are_told_apart(text: str, bucket: str, prefix: str) -> None:
    """What begins with s3:// is a place in a bucket; its text is the shortest that means the same."""
    location = parse_location(text)
    assert location == S3Location(bucket, prefix)
    assert str(location) == text.rstrip("/")
    assert parse_location(str(location)) == location


@pytest.mark.parametrize("text", ["/mnt/cache", "cache", "s3", "s3:/cache/kv", "S3://cache", "gs://cache/kv"])
def test_all_else_is_a_path(text: str) -> None:
    """Only the exact scheme makes a bucket of it."""
    assert parse_location(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("s3://", "no bucket"),
        ("s3:///kv", "no bucket"),
        ("s3://ab/kv", "'ab'"),
        ("s3://Cache/kv", "'Cache'"),
        ("s3://my_cache", "'my_cache'"),
        ("s3://-cache", "'-cache'"),
        ("s3://cache-", "'cache-'"),
        (f"s3://{'c' * 64}", "3 to 63"),
        ("s3://user:secret@cache/kv", "3 to 63"),
        ("s3://cache/a//b", "single slashes"),
        ("s3://cache/../b", "'..'"),
        ("s3://cache/a b", "'a b'"),
        ("s3://cache/a%20b", "'a%20b'"),
        ("s3://cache/é", "'é'"),
    ],
)
def test_what_cannot_be_a_place_is_refused(text: str, named: str) -> None:
    """The message names the part that is wrong and tells what is right."""
    with pytest.raises(ValueError, match="expected") as told:
        parse_location(text)
    assert named in str(told.value)


def test_places_below_a_place() -> None:
    """A slash goes down, as with paths, also from the whole bucket."""
    assert S3Location("cache", "kv") / "rank-0" / "run" == S3Location("cache", "kv/rank-0/run")
    assert S3Location("cache", "") / "run" == S3Location("cache", "run")


def test_a_place_can_be_a_key() -> None:
    """Equal places are one key of a mapping."""
    assert {S3Location("cache", "kv"): 1}[S3Location("cache", "") / "kv"] == 1


def test_the_client_is_not_loaded() -> None:
    """A place costs no import of the client library."""
    code = "import sys, mlpstorage.storage.location as l; assert l.S3Location; print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
