"""Layouts, profiles and storage options from the command line: what each really does to the storage."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Cli

PAGE_BYTES = 4096
TINY_OBJECT_BYTES = 24_576 * 64
"""Of tiny-1b, 64 tokens: a whole number of pages."""
PROFILES: dict[str, dict[str, Any]] = {
    "vllm-fs": {"block_tokens": 16, "layout": "file", "io_depth": 32, "eviction": "none", "file_levels": [3, 2]},
    "lmcache-disk": {"block_tokens": 256, "layout": "file", "io_depth": 4, "io_priority": "strict", "load_batch": 0},
    "llmd-fs": {"layout": "file", "io_depth": 64, "write_overflow": "drop", "eviction": "none"},
    "sglang-file": {"block_tokens": 64, "layout": "file", "load_batch": 128, "min_load_tokens": 256},
    "hf3fs-slab": {"block_tokens": 64, "layout": "slab", "io_depth": 16, "load_batch": 8},
    "mooncake-bucket": {"block_tokens": 512, "layout": "bucket", "write_interval_s": 10.0, "evict_above": 0.9},
    "kvbm-slab": {"layout": "slab", "store_policy": "second-use"},
}
"""What production-io facts say of each, by name of the parameter."""


def without(words: list[str], flag: str) -> list[str]:
    """The words without a flag and its value."""
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


@pytest.mark.parametrize("layout", ["file", "slab", "bucket"])
def test_layout_moves_what_it_says(cli: Cli, layout: str, direct_file_system: str) -> None:
    """Each layout on a file system writes and reads whole objects, directly and verified, and leaves nothing."""
    run = cli.play("--layout", layout, "--cache-dir", cli.cache)
    total, storage = run.summary["storage_total"], run.summary["storage"]
    assert direct_file_system
    assert storage["read_ops"] > 0
    assert total["read_bytes"] == total["read_ops"] * TINY_OBJECT_BYTES
    assert total["written_bytes"] == total["write_ops"] * TINY_OBJECT_BYTES
    assert total["verified_bytes"] == total["read_bytes"]
    assert total["direct_files"] == total["read_ops"] + total["write_ops"]
    assert (total["buffered_files"], total["page_cache_bytes"], total["io_errors"]) == (0, 0, 0)
    assert not cli.cache.exists()


@pytest.mark.parametrize("layout", ["file", "slab", "bucket"])
def test_kernel_agrees_with_what_a_layout_counts(cli: Cli, layout: str, direct_file_system: str) -> None:
    """The kernel's count of the rank's I/O is what the layout says that it moved; tables and markers are small."""
    run = cli.play("--layout", layout, "--cache-dir", cli.cache)
    total, client = run.summary["storage_total"], run.summary["client"]
    assert direct_file_system
    moved_bytes = total["read_bytes"] + total["written_bytes"]
    assert total["read_bytes"] > 0
    assert client["os_read_bytes"] + client["os_written_bytes"] == pytest.approx(moved_bytes, rel=0.02)


def test_null_layout_moves_nothing(cli: Cli) -> None:
    """The null layout counts objects, and the kernel sees no storage I/O to speak of."""
    run = cli.play("--layout", "null")
    total, client = run.summary["storage_total"], run.summary["client"]
    assert total["read_ops"] > 0
    assert total["verified_bytes"] == 0
    assert client["os_read_bytes"] + client["os_written_bytes"] < total["written_bytes"] / 100
    assert run.metadata["parameters"]["verify"] == "off"


@pytest.mark.parametrize("name", PROFILES)
def test_profile_sets_its_parameters(cli: Cli, name: str) -> None:
    """A profile's values stand in the metadata with `profile` as their source, but for what a flag overrides."""
    words = cli.load("--profile", name, "--storage-gb", "2", "--io-priority", "split", "--what-if", "--json")
    ended = cli.run(*without(words, "--block-tokens"))
    assert ended.returncode == 0, ended.stderr
    metadata = json.loads(ended.stdout)["metadata"]
    parameters, sources = metadata["parameters"], metadata["parameter_sources"]
    for key, value in PROFILES[name].items():
        if key == "io_priority":
            continue
        assert parameters[key] == value, key
        assert sources[key] in {"profile", "default"}, key
    assert "profile" in sources.values()
    assert (parameters["io_priority"], sources["io_priority"]) == ("split", "flag")
    assert parameters["profile"] == name


def test_profile_runs_with_its_own_blocks(cli: Cli) -> None:
    """A run by a profile stores objects of the profile's size, in the profile's layout."""
    ended = cli.run(*without(cli.load("--profile", "hf3fs-slab", "--cache-dir", cli.cache), "--block-tokens"))
    assert ended.returncode == 0, ended.stderr
    run = cli.only_run()
    total = run.summary["storage_total"]
    assert total["read_ops"] > 0
    assert total["read_bytes"] == total["read_ops"] * 24_576 * 64
    assert run.metadata["parameters"]["layout"] == "slab"
    assert run.metadata["parameter_sources"]["layout"] == "profile"


def test_tensor_parallel_splits_blocks(cli: Cli) -> None:
    """With two kv ranks a block is two objects of half the size; an MLA model keeps one copy."""
    split = cli.play("--tensor-parallel", "2").summary["storage_total"]
    assert split["write_ops"] > 0
    assert split["written_bytes"] == split["write_ops"] * TINY_OBJECT_BYTES // 2
    mla = cli.play("--model", "deepseek-v3", "--tensor-parallel", "8", "--block-tokens", "16").summary["storage_total"]
    assert mla["write_ops"] > 0
    assert mla["written_bytes"] == mla["write_ops"] * 70_272 * 16
    assert mla["padding_bytes"] == (mla["write_ops"] + mla["read_ops"]) * 2048


def test_direct_never_is_buffered_and_says_what_the_page_cache_held(cli: Cli) -> None:
    """Without direct I/O nearly all that was just written is in the page cache, and the result says so."""
    run = cli.play("--direct", "never")
    storage, total = run.summary["storage"], run.summary["storage_total"]
    assert storage["read_ops"] > 0
    assert total["direct_files"] == 0
    assert total["buffered_files"] == total["read_ops"] + total["write_ops"]
    assert 0 < storage["page_cache_bytes"] <= storage["read_bytes"]
    assert run.summary["dropped_page_cache_bytes"] is not None


def test_direct_always_is_refused_where_the_file_system_refuses(cli: Cli, buffered_file_system: Path) -> None:
    """`--direct always` ends with 5 and names the directory on a file system without direct I/O; `auto` runs."""
    refused = cli.run(*cli.load("--cache-dir", buffered_file_system / "c", "--direct", "always", "--storage-gb", "0.1"))
    assert refused.returncode == 5, refused.stderr
    assert "direct" in refused.stderr
    assert str(buffered_file_system) in refused.stderr
    run = cli.play("--cache-dir", buffered_file_system / "c", "--storage-gb", "0.1")
    total = run.summary["storage_total"]
    assert total["direct_files"] == 0
    assert total["buffered_files"] == total["read_ops"] + total["write_ops"] > 0


@pytest.mark.parametrize(("mode", "calls"), [("file", ("fdatasync", "fsync")), ("batch", ("fdatasync", "fsync"))])
def test_write_sync_really_syncs(cli: Cli, mode: str, calls: tuple[str, ...], strace: tuple[str, ...]) -> None:
    """With `--write-sync` the system sees a sync for each object (file), or one behind each batch (batch)."""
    trace = cli.place / "strace"
    words = (*strace, "-f", "-o", str(trace), "-e", f"trace={','.join(calls)}")
    ended = cli.run(*cli.load("--write-sync", mode, "--cache-dir", cli.cache), prefix=words)
    assert ended.returncode == 0, ended.stderr
    total = cli.only_run().summary["storage_total"]
    seen = sum(f"{call}(" in line for line in trace.read_text().splitlines() for call in calls)
    assert total["write_ops"] > 0
    assert seen >= total["write_ops"] if mode == "file" else seen >= total["sync_ops"] > 0


def test_io_depth_is_the_number_of_threads(cli: Cli) -> None:
    """With the engine of threads one thread drives one object: the depth and the threads are one number."""
    run = cli.play("--io-depth", "3")
    assert run.metadata["parameters"]["io_threads"] == 3
    refused = cli.run(*cli.load("--io-depth", "3", "--io-threads", "4"))
    assert refused.returncode == 2
    assert "--io-threads" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layout", "object"), "s3://"),
        (("--reuse-cache",), "--cache-dir"),
        (("--tensor-parallel", "3"), "--tensor-parallel"),
        (("--layout", "null", "--verify", "full"), "--verify"),
        (("--evict-above", "0.5", "--evict-to", "0.8"), "--evict-to"),
        (("--profile", "nonesuch"), "--profile"),
        (("--load-timeout", "soon"), "--load-timeout"),
        (("--cache-dir", "s3://b"), "bucket"),
    ],
)
def test_options_that_do_not_fit_are_refused(cli: Cli, words: tuple[str, ...], said: str) -> None:
    """A combination that makes no sense ends with 2 and a line that names what to change; nothing is created."""
    ended = cli.run(*cli.load(*words))
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert not cli.results.exists()


def test_written_data_neither_compresses_nor_repeats(cli: Cli) -> None:
    """Zstd -1 shrinks a sample of the objects by less than 1 %, and of all their pages no two are equal."""
    cli.play("--cache-dir", cli.cache, "--keep-cache", "--storage-gb", "1")
    files = sorted(cli.objects())[:400]
    assert len(files) > 100
    pages = [
        content[start : start + PAGE_BYTES]
        for content in (path.read_bytes() for path in files)
        for start in range(0, len(content), PAGE_BYTES)
    ]
    assert len(set(pages)) == len(pages)
    sample = b"".join(path.read_bytes() for path in files[:64])
    shrunk = subprocess.run(["zstd", "-1", "-c"], input=sample, capture_output=True, check=True).stdout  # noqa: S607 - wherever it is
    assert len(shrunk) > 0.99 * len(sample)


@pytest.fixture
def strace() -> tuple[str, ...]:
    """The word that starts strace, where it can trace."""
    try:
        subprocess.run(["strace", "-o", os.devnull, "true"], check=True, capture_output=True)  # noqa: S607 - wherever it is
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"strace cannot trace here: {error}")
    return ("strace",)
