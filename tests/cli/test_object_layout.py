"""The object layout from the command line, on a real S3 server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.cli.conftest import Cli
    from tests.swift import S3Server

OBJECT_BYTES = 24_576 * 512
TURNS = 4


def small_load(cli: Cli) -> tuple[object, ...]:
    """Words of a load of few objects: prompts that grow by a block a turn, each of which finds the one before."""
    trace = cli.place / "trace.jsonl"
    with trace.open("w") as file:
        for turn in range(1, TURNS + 1):
            request = {"timestamp": 0, "input_length": 512 * turn, "output_length": 1, "hash_ids": [*range(turn)]}
            file.write(json.dumps(request | {"timestamp": turn * 1500}) + "\n")
    return ("--trace", trace, "--warmup", "0", "--duration", "30", "--storage-gb", "1")


def credentials(server: S3Server, **changes: str) -> dict[str, str]:
    """The usual AWS variables of the server's user."""
    return dict(server.environment) | changes


def test_run_on_a_bucket(cli: Cli, s3_server: S3Server) -> None:
    """A run writes, reads and verifies objects in the bucket, and leaves foreign objects and nothing else."""
    bucket = s3_server.new_bucket()
    s3_server.raw.put(bucket, "kv/notes.txt", b"keep me")
    run = cli.play("--cache-dir", f"s3://{bucket}/kv", *small_load(cli), env=credentials(s3_server))
    total = run.summary["storage_total"]
    # A block whose write takes longer than the next prompt stays away is computed and not read.
    assert total["write_ops"] == TURNS
    assert 0 < total["read_ops"] <= sum(range(TURNS))
    assert total["read_bytes"] == total["read_ops"] * OBJECT_BYTES
    assert total["verified_bytes"] == total["read_bytes"]
    assert (total["direct_files"], total["buffered_files"]) == (0, 0)
    assert total["page_cache_bytes"] is None
    assert run.metadata["parameters"]["layout"] == "object"
    assert run.metadata["cache_dir"] == f"s3://{bucket}/kv"
    assert set(s3_server.raw.sizes(bucket)) == {"kv/notes.txt"}


def test_kept_objects_are_found_and_verified(cli: Cli, s3_server: S3Server) -> None:
    """Objects kept in a bucket are found by the next run; a byte changed in one of them fails it, by name."""
    bucket = s3_server.new_bucket()
    words = ("--cache-dir", f"s3://{bucket}/kv", *small_load(cli))
    kept = cli.play(*words, "--keep-cache", env=credentials(s3_server))
    assert kept.summary["storage_total"]["write_ops"] == TURNS
    objects = [key for key, size in s3_server.raw.sizes(bucket).items() if size == OBJECT_BYTES]
    assert len(objects) == TURNS
    for key in objects:
        content = bytearray(s3_server.raw.get(bucket, key))
        content[5000] ^= 1
        s3_server.raw.put(bucket, key, bytes(content))
    found = cli.play(*words, "--reuse-cache", "--verify", "full", env=credentials(s3_server), exit_code=6)
    assert found.summary["reuse"]["objects"] == len(objects)
    assert found.summary["verify_failures"]
    named = {key.rpartition("/")[2] for key in objects}
    assert all(any(name in one for name in named) for one in found.summary["verify_failures"])
    assert not [key for key in s3_server.raw.sizes(bucket) if key.startswith("kv/")]


@pytest.mark.parametrize(
    ("changes", "exit_code", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 4, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 5, "127.0.0.1:9"),
    ],
)
def test_wrong_access_is_refused_before_the_run(
    cli: Cli, s3_server: S3Server, changes: Mapping[str, str], exit_code: int, said: str
) -> None:
    """Wrong credentials and a server that is not there end the command with a line that says so, and no secret."""
    bucket = s3_server.new_bucket()
    words = cli.load("--cache-dir", f"s3://{bucket}/kv", "--io-limit-s", "3", *small_load(cli))
    ended = cli.run(*words, env=credentials(s3_server, **changes))
    assert ended.returncode == exit_code, ended.stderr
    assert said in ended.stderr
    assert "testing" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_bucket(cli: Cli, s3_server: S3Server) -> None:
    """A bucket that is not there ends the command with 5 and its name."""
    ended = cli.run(*cli.load("--cache-dir", "s3://no-such-bucket/kv", *small_load(cli)), env=credentials(s3_server))
    assert ended.returncode == 5, ended.stderr
    assert "no-such-bucket" in ended.stderr


def test_server_that_stops_in_mid_run(cli: Cli, s3_server: S3Server) -> None:
    """Where the server goes away the run ends with 6 in bounded time, with the numbers up to then."""
    bucket = s3_server.new_bucket()
    words = cli.load("--cache-dir", f"s3://{bucket}/kv", "--io-limit-s", "2", "--storage-gb", "0.3", "--duration", "50")
    process = cli.start(*words, env=credentials(s3_server))
    cli.eventually(lambda: len(s3_server.raw.sizes(bucket)) > 3, "objects of the run")
    with s3_server.stopped():
        _, stderr = process.communicate(timeout=45)
    assert process.returncode == 6, stderr
    summary = cli.only_run().summary
    assert summary["status"] == "failed"
    assert summary["storage_total"]["io_errors"] > 0
    assert summary["storage_total"]["write_ops"] > 0
