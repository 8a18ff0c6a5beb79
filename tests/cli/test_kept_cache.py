"""Caches that outlive their run: kept, found again, damaged, and proof of what was read from them."""

from __future__ import annotations

import random
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Cli, Run

PAGE_BYTES = 4096
OBJECT_BYTES = 24_576 * 64
KEYS = "abcdefgh"


def mooncake(path: Path, turns: int) -> Path:
    """A trace of prompts that grow by a block a turn, so that each finds all blocks of the one before."""
    with path.open("w") as file:
        for turn in range(turns):
            hash_ids = list(range(1, turn + 2))
            file.write(
                f'{{"timestamp": {turn * 40}, "input_length": {512 * len(hash_ids)}, "output_length": 1, '
                f'"hash_ids": {hash_ids}}}\n'
            )
    return path


def fill(cli: Cli, *words: object) -> Run:
    """A run that keeps the blocks of a small trace."""
    trace = mooncake(cli.place / "trace.jsonl", 8)
    return cli.play(
        "--trace", trace, "--warmup", "0", "--duration", "20", "--cache-dir", cli.cache, "--keep-cache", *words
    )


def use(cli: Cli, *words: object, exit_code: int = 0) -> Run:
    """A run over what `fill` has kept."""
    trace = cli.place / "trace.jsonl"
    return cli.play(
        *("--trace", trace, "--warmup", "0", "--duration", "20", "--cache-dir", cli.cache, "--reuse-cache", *words),
        exit_code=exit_code,
    )


@pytest.mark.parametrize("layout", ["file", "slab", "bucket"])
def test_second_run_finds_the_firsts_objects(cli: Cli, layout: str) -> None:
    """With --keep-cache the objects stay, with --reuse-cache they are found, and without --keep-cache they then go."""
    first = fill(cli, "--layout", layout)
    written = first.summary["storage_total"]["write_ops"]
    assert written == 8
    assert first.summary["reuse"] is None
    second = use(cli, "--layout", layout)
    reuse, total = second.summary["reuse"], second.summary["storage_total"]
    assert reuse["objects"] == written
    assert reuse["bytes"] == written * 24_576 * 512
    assert (reuse["damaged_objects"], reuse["incomplete_blocks"]) == (0, 0)
    assert reuse["rebuild_s"] > 0
    assert total["write_ops"] == 0
    # Every prompt is found whole: 1 + 2 + ... + 8 blocks.
    assert total["read_ops"] == 36
    assert total["verify_errors"] == 0
    assert not cli.cache.exists()


def test_kept_cache_is_not_deleted_by_a_run_that_does_not_ask_for_it(cli: Cli) -> None:
    """A run without --reuse-cache on a kept cache ends with 5, says what to do, and deletes nothing."""
    fill(cli)
    before = sorted(cli.cache.rglob("*"))
    ended = cli.run(*cli.load("--cache-dir", cli.cache))
    assert ended.returncode == 5, ended.stderr
    assert "--reuse-cache" in ended.stderr
    assert sorted(cli.cache.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "flag"), [(("--model", "mistral-7b"), "--model"), (("--layout", "slab"), "--layout")]
)
def test_cache_of_another_kind_is_not_reused(cli: Cli, words: tuple[str, ...], flag: str) -> None:
    """What was stored under other parameters is refused by the name of the flag, and stays."""
    fill(cli)
    before = sorted(cli.cache.rglob("*"))
    trace = ("--trace", cli.place / "trace.jsonl")
    ended = cli.run(*cli.load(*trace, "--cache-dir", cli.cache, "--reuse-cache", "--storage-gb", "1", *words))
    assert ended.returncode == 5, ended.stderr
    assert flag in ended.stderr
    assert sorted(cli.cache.rglob("*")) == before
    assert_still_kept(cli)


@pytest.mark.parametrize(
    "words", [("--storage-gb", "1000000"), ("--cpu-mem-gb", "1000000"), ("--layout", "slab", "--storage-gb", "0.2")]
)
def test_refused_run_leaves_the_cache_kept(cli: Cli, words: tuple[str, ...]) -> None:
    """A run that claims a kept cache and is then refused deletes nothing of it, and leaves it marked as kept."""
    layout = ("--layout", "slab") if "slab" in words else ()
    fill(cli, *layout)
    before = sorted(cli.cache.rglob("*"))
    trace = ("--trace", cli.place / "trace.jsonl")
    ended = cli.run(*cli.load(*trace, "--cache-dir", cli.cache, "--reuse-cache", *words))
    assert ended.returncode == 5, ended.stderr
    assert sorted(cli.cache.rglob("*")) == before
    assert_still_kept(cli)


def assert_still_kept(cli: Cli) -> None:
    """A run that did not ask for the cache is refused, by the name of the flag."""
    ended = cli.run(*cli.load("--cache-dir", cli.cache))
    assert ended.returncode == 5, ended.stderr
    assert "--reuse-cache" in ended.stderr


def test_damaged_objects_are_left_out(cli: Cli) -> None:
    """A truncated object, one of another's stamps and a temporary file are left out and counted; foreign files stay."""
    fill(cli)
    objects = sorted(cli.objects())
    truncated, swapped, source = objects[0], objects[1], objects[2]
    with truncated.open("r+b") as file:
        file.truncate(4096)
    swapped.write_bytes(source.read_bytes())
    torn = objects[3].with_name(f"{objects[3].name}.0123abcd-7.tmp")
    torn.write_bytes(b"half")
    foreign = objects[4].with_name("notes.txt")
    foreign.write_text("keep me")
    run = use(cli)
    reuse = run.summary["reuse"]
    assert (reuse["objects"], reuse["damaged_objects"], reuse["foreign_entries"]) == (6, 3, 1)
    assert run.summary["storage_total"]["verify_errors"] == 0
    assert foreign.read_text() == "keep me"
    assert not torn.exists()


def test_killed_runs_objects_can_be_reused(cli: Cli) -> None:
    """What a run with --keep-cache had written when it was killed is whole, and found by the next."""
    process = cli.start(
        *cli.load("--cache-dir", cli.cache, "--keep-cache", "--duration", "60", "--storage-gb", "1", "--warmup", "0")
    )
    cli.eventually(lambda: len(cli.objects()) > 20, "objects of the run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    cli.eventually(lambda: not rank_holds(cli.cache), "the end of the killed run's rank")
    run = cli.play("--cache-dir", cli.cache, "--reuse-cache", "--storage-gb", "1", "--warmup", "0")
    assert run.summary["reuse"]["objects"] > 20
    assert run.summary["storage_total"]["verify_errors"] == 0


def rank_holds(cache: Path) -> bool:
    """Whether some process holds a rank's directory: by the kernel's table of locks."""
    inodes = {path.stat().st_ino for path in cache.glob("rank_*/.mlpstorage.lock")}
    with open("/proc/locks", encoding="ascii") as file:  # noqa: PTH123 - not a file that has a place
        return any(int(line.split()[5].rpartition(":")[2]) in inodes for line in file if "FLOCK" in line)


def plant(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def failures(run: Run) -> list[str]:
    """The failures that the summary names; the run must have failed by them."""
    summary: dict[str, Any] = run.summary
    assert run.metadata["status"] == "failed"
    assert summary["storage_total"]["verify_errors"] == len(summary["verify_failures"]) > 0
    return list(summary["verify_failures"])


def test_full_verification_finds_one_wrong_byte(cli: Cli) -> None:
    """One changed byte anywhere in one object, header or data: --verify full names object and page, exit code 6."""
    fill(cli)
    objects = sorted(cli.objects())
    chosen = random.Random(11)  # noqa: S311 - no secret
    target = chosen.choice(objects)
    size = target.stat().st_size
    # Inside the first page's header (its checksum), and anywhere between; the first and last stamps are read by
    # the listing, which would leave the object out.
    for offset in (18, chosen.randrange(2 * PAGE_BYTES + 24, size - PAGE_BYTES), size - 1):
        plant(target, offset)
        run = use(cli, "--verify", "full", "--keep-cache", exit_code=6)
        named = failures(run)
        assert all(target.name in one for one in named)
        assert all(re.search(rf"page {offset // PAGE_BYTES}\b", one) for one in named)
        assert run.summary["requests"]["completed"] > 0, "the run went on to its end"
        # The failed object was thrown out, and written anew by the request that computed it.
        fill_again = use(cli, "--verify", "full", "--keep-cache")
        assert fill_again.summary["storage_total"]["verify_errors"] == 0


def test_page_of_an_older_write_is_found_by_its_stamp(cli: Cli) -> None:
    """A page that an earlier run had written to the same object is found, and named."""
    fill(cli)
    target = min(cli.objects())
    before = target.read_bytes()
    use(cli)
    fill(cli)
    (written_again,) = [path for path in cli.objects() if path.name == target.name]
    now = written_again.read_bytes()
    offset = 4 * PAGE_BYTES
    written_again.write_bytes(now[:offset] + before[offset : offset + PAGE_BYTES] + now[offset + PAGE_BYTES :])
    (named,) = set(failures(use(cli, "--verify", "stamp", exit_code=6)))
    assert target.name in named
    assert "page 4" in named


def test_stamps_do_not_see_a_wrong_byte_but_a_swapped_or_stale_page(cli: Cli) -> None:
    """--verify stamp finds pages of another object, or of another place in the object; off finds nothing."""
    fill(cli)
    objects = sorted(cli.objects())
    first, second = objects[0].read_bytes(), objects[1].read_bytes()
    middle = 3 * PAGE_BYTES
    stale = second[middle : middle + PAGE_BYTES]
    objects[0].write_bytes(first[:middle] + stale + first[middle + PAGE_BYTES :])
    assert use(cli, "--verify", "off", "--keep-cache").summary["storage_total"]["verify_errors"] == 0
    (named,) = set(failures(use(cli, "--verify", "stamp", "--keep-cache", exit_code=6)))
    assert objects[0].name in named
    assert "page 3" in named
    content = objects[1].read_bytes()
    swapped = (
        content[: 5 * PAGE_BYTES] + content[6 * PAGE_BYTES : 7 * PAGE_BYTES] + content[5 * PAGE_BYTES : 6 * PAGE_BYTES]
    )
    objects[1].write_bytes(swapped + content[7 * PAGE_BYTES :])
    (named,) = set(failures(use(cli, "--verify", "stamp", "--keep-cache", exit_code=6)))
    assert objects[1].name in named
    assert "page 5" in named
    plant(objects[2], 9 * PAGE_BYTES + 2000)
    assert use(cli, "--verify", "stamp").summary["storage_total"]["verify_errors"] == 0
