"""Ranks that share one cache directory, started by a real MPI launcher: what they find together, what they leave."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlpstorage.config import Layout
from mlpstorage.storage.cache_dir import CacheDirectory
from mlpstorage.storage.claim import CacheFormat
from tests.swift import RawClient
from tests.trace_files import mooncake

BIN = Path(sys.executable).parent
SEARCH = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 256,
    "vocab_size": 1000,
}
"""2 x 2 layers x 1 head x 64 x 2 bytes: 512 a token, 256 KiB a block of 512 tokens."""

BLOCK_GIB = 2**-12

BLOCK_BYTES = 256 * 1024

GAP_MS = 200
"""Between two requests of a trace: mostly longer than a write takes."""

Chains = list[list[int]]


@dataclass(frozen=True, slots=True)
class Shell:
    """A place with a model, a trace and a cache directory."""

    place: Path

    bucket: str | None = None

    @property
    def cache(self) -> Path:
        """The cache directory."""
        return self.place / "cache"

    def command(self, ranks: int, storage_blocks: int, *flags: str, scope: str = "shared") -> list[str]:
        """Play the trace with so many ranks, each of which may store so many blocks."""
        (self.place / "model.json").write_text(json.dumps(MODEL))
        words = (
            f"kvcache run --model-config {self.place}/model.json --trace {self.place}/trace.jsonl --duration 60 "
            "--warmup 0 --generation-mode none --decisions completion --gpu-mem-gb 0 --cpu-mem-gb 0 "
            f"--storage-gb {storage_blocks * BLOCK_GIB} --cache-scope {scope} "
            f"--cache-dir {self.cache if self.bucket is None else f's3://{self.bucket}/kv'} "
            f"--num-processes {ranks} --oversubscribe --allow-run-as-root --results-dir {self.place}/results --json"
        )
        return [str(BIN / "mlpstorage"), *words.split(), *flags]

    def run(
        self, ranks: int, storage_blocks: int, *flags: str, scope: str = "shared"
    ) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        command = self.command(ranks, storage_blocks, *flags, scope=scope)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    def summary(self, ranks: int, storage_blocks: int, *flags: str, scope: str = "shared") -> dict[str, Any]:
        """The summary of such a run, which is complete."""
        ended = self.run(ranks, storage_blocks, *flags, scope=scope)
        assert ended.returncode == 0, ended.stderr
        summary: dict[str, Any] = json.loads(ended.stdout)["summary"]
        assert summary["storage_total"]["io_errors"] == summary["storage_total"]["verify_errors"] == 0
        assert summary["requests"]["failed"] == 0
        return summary

    def files(self) -> list[str]:
        """All files in the cache directory."""
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file())


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A place where MPI can be had."""
    if shutil.which("mpirun", path=SEARCH) is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("no mpirun or no mpi4py: install mlpstorage[mpi]")
    return Shell(tmp_path)


def chats(sessions: int, turns: int) -> Chains:
    """Conversations that take turns; each grows by a block a turn, and all begin with the same block."""
    return [
        [0, *(100 * session + block for block in range(1, turn + 2))]
        for turn in range(turns)
        for session in range(1, sessions + 1)
    ]


def write_trace(place: Path, chains: Chains) -> None:
    """A trace of prompts of full blocks, far apart in time."""
    rows = [(GAP_MS * number, 512 * len(chain) + 1, [*chain, 10_000 + number]) for number, chain in enumerate(chains)]
    mooncake(place / "trace.jsonl", rows)


def leading_runs(chains: Sequence[Sequence[int]]) -> int:
    """Blocks that a cache without limit finds: this test's own count."""
    seen: set[int] = set()
    found = 0
    for chain in chains:
        for block in chain:
            if block not in seen:
                break
            found += 1
        seen.update(chain)
    return found


def found_in_time(summary: dict[str, Any], chains: Chains) -> int:
    """Blocks that a run without eviction found, and those that it would have found had every write been instant.

    A block that is asked for again before it is written is computed again, and written again or not at all. So how
    often that was is what was written and left out beyond one write of each block, whatever the moments were.
    """
    blocks = sum(map(len, chains))
    distinct = len({block for chain in chains for block in chain})
    counted = summary["storage_total"]
    assert counted["delete_ops"] == counted["writes_dropped"] == 0
    found: int = round(summary["hit_ratio"]["blocks"]["total"] * blocks)
    again: int = counted["write_ops"] + counted["dedup_skipped_bytes"] // BLOCK_BYTES - distinct
    assert again >= 0
    return found + again


def test_ranks_find_together_what_one_finds_alone(shell: Shell) -> None:
    """Dealt to three ranks that share, an open loop finds as many blocks as one rank with their room together.

    Both are what a cache without limit finds, but for blocks that were still being written when they were asked for.
    """
    chains = chats(sessions=4, turns=4)
    write_trace(shell.place, chains)
    alone = shell.summary(1, 36)
    shared = shell.summary(3, 12, "--placement", "round-robin")
    assert alone["requests"]["completed"] == shared["requests"]["completed"] == len(chains)
    assert found_in_time(alone, chains) == found_in_time(shared, chains) == leading_runs(chains) > 0
    assert alone["hit_ratio"]["blocks"]["cross_rank"] == 0
    assert 0 < shared["hit_ratio"]["blocks"]["cross_rank"] <= shared["hit_ratio"]["blocks"]["storage"]
    assert 0 < shared["hit_ratio"]["tokens"]["cross_rank"] <= shared["hit_ratio"]["tokens"]["storage"]
    assert alone["storage_total"]["exists_ops"] == 0
    assert shared["storage_total"]["exists_ops"] > 0
    assert shared["latency"]["existence_check"]["count"] > 0
    assert not shell.cache.exists()


def test_ranks_that_do_not_share_find_less(shell: Shell) -> None:
    """Dealt one after the other, no request of a conversation comes to a rank that has all of it."""
    chains = chats(sessions=4, turns=2)
    write_trace(shell.place, chains)
    private = shell.summary(3, 36, "--placement", "round-robin", scope="private")
    # Each rank finds what it has seen itself, at most: its own requests are every third.
    most = sum(leading_runs(chains[rank::3]) for rank in range(3))
    assert private["hit_ratio"]["blocks"]["total"] * sum(map(len, chains)) <= most + 0.5 < leading_runs(chains)
    assert private["hit_ratio"]["blocks"]["cross_rank"] == private["storage_total"]["exists_ops"] == 0


def test_equal_prefixes_meet_on_one_rank(shell: Shell) -> None:
    """Placed by prefix, a rank finds its own conversations, and of the others' nothing but the block that all share."""
    chains = chats(sessions=4, turns=3)
    write_trace(shell.place, chains)
    placed = shell.summary(2, 40, "--placement", "prefix")
    assert found_in_time(placed, chains) == leading_runs(chains)
    assert 0 < placed["hit_ratio"]["blocks"]["cross_rank"] * sum(map(len, chains)) < len(chains)


def test_a_cache_that_all_share_is_kept_and_reused(shell: Shell) -> None:
    """One rank lists it, all use it, each deletes of its own part; what is not the run's stays."""
    chains = chats(sessions=3, turns=2)
    write_trace(shell.place, chains)
    distinct = len({block for chain in chains for block in chain})
    shell.cache.mkdir()
    (shell.cache / "notes.txt").write_text("somebody's")
    shell.summary(2, 40, "--keep-cache", "--placement", "round-robin")
    assert len([name for name in shell.files() if len(Path(name).name) == 32]) == distinct
    refused = shell.run(2, 40)
    assert refused.returncode == 5
    assert "holds the cache that run" in refused.stderr
    again = shell.summary(2, 40, "--reuse-cache", "--keep-cache", "--placement", "round-robin")
    assert again["reuse"]["objects"] == distinct
    assert again["hit_ratio"]["blocks"]["total"] == 1.0
    assert again["hit_ratio"]["blocks"]["cross_rank"] > 0
    assert again["storage_total"]["write_ops"] == 0
    # Of ten blocks each of two ranks may keep two.
    small = shell.summary(2, 2, "--reuse-cache", "--placement", "round-robin")
    assert small["storage_total"]["delete_ops"] >= distinct - 4
    assert shell.files() == ["notes.txt"]


def test_a_directory_that_is_in_use_ends_all_ranks(shell: Shell) -> None:
    """Only rank 0 finds out; the others do not wait for ever, and what is there stays."""
    write_trace(shell.place, chats(sessions=3, turns=1))
    other = CacheDirectory.claim(
        shell.cache,
        "another-run",
        format=CacheFormat(layout=Layout.FILE, namespaces=("x|0|0",), object_bytes=4096, block_tokens=1, levels=()),
    )
    before = shell.files()
    ended = shell.run(3, 40)
    assert ended.returncode == 5
    assert "is in use by run another-run" in ended.stderr
    assert shell.files() == before
    other.release()


def test_a_rank_that_cannot_begin_ends_all(shell: Shell) -> None:
    """The trace has nothing for the third rank: the others, who hold and have joined the place, give it back."""
    write_trace(shell.place, chats(sessions=2, turns=1))
    ended = shell.run(3, 40, "--placement", "round-robin")
    assert ended.returncode == 5
    assert "nothing left for rank 2 of 3" in ended.stderr
    assert not shell.cache.exists()


def test_what_killed_ranks_left_is_cleared(shell: Shell) -> None:
    """A dead run's objects in the shared directory are found by its marker, and deleted before the next begins."""
    write_trace(shell.place, chats(sessions=3, turns=1))
    program = (
        "import os, sys, pathlib\n"
        "from mlpstorage.config import Layout\n"
        "from mlpstorage.storage.cache_dir import CacheDirectory\n"
        "from mlpstorage.storage.claim import CacheFormat\n"
        "f = CacheFormat(layout=Layout.FILE, namespaces=('x|0|0',), object_bytes=4096, block_tokens=1, levels=())\n"
        "c = CacheDirectory.claim(pathlib.Path(sys.argv[1]), 'dead-run', format=f)\n"
        "(c.objects / ('0' * 32)).write_bytes(bytes(4096))\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program, shell.cache], check=False, timeout=60)
    assert shell.files()
    ended = shell.run(2, 40)
    assert ended.returncode == 0, ended.stderr
    assert "cleared 1 files" in ended.stderr
    assert not shell.cache.exists()


def test_a_rank_that_is_killed_ends_all_and_leaves_nothing(shell: Shell) -> None:
    """Whether or not the holder of the place still could clear it away: the launcher does."""
    write_trace(shell.place, chats(sessions=12, turns=25))
    command = shell.command(3, 400, "--placement", "round-robin")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until_s = time.monotonic() + 60
        while not any(len(Path(name).name) == 32 for name in shell.files()):
            assert process.poll() is None
            assert time.monotonic() < until_s
        below = psutil.Process(process.pid).children(recursive=True)
        ranks = [one for one in below if "mlpstorage.kvcache.rank" in one.cmdline() and "-m" in one.cmdline()[:2]]
        assert len(ranks) == 3
        ranks[-1].kill()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode not in {0, None}
    assert "Traceback" not in stderr
    assert not shell.cache.exists()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert alive == []


def test_ranks_share_a_prefix_of_a_bucket(shell: Shell, s3_bucket: str) -> None:
    """As they do a directory: found by HEAD, kept, listed by one, reused by all, and deleted by one at the end."""
    bucket = Shell(shell.place, s3_bucket)
    chains = chats(sessions=3, turns=2)
    write_trace(shell.place, chains)
    distinct = len({block for chain in chains for block in chain})
    filled = bucket.summary(2, 40, "--keep-cache", "--placement", "round-robin")
    assert found_in_time(filled, chains) == leading_runs(chains)
    assert filled["storage_total"]["exists_ops"] > 0
    again = bucket.summary(2, 40, "--reuse-cache", "--placement", "round-robin")
    assert again["reuse"]["objects"] == distinct
    assert again["hit_ratio"]["blocks"]["total"] == 1.0
    assert again["hit_ratio"]["blocks"]["cross_rank"] > 0
    raw = RawClient(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    assert raw.sizes(s3_bucket, "") == {}
