"""How much of a file the page cache holds, against what other programs and the kernel's own calls tell."""

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpstorage.config import DirectMode
from mlpstorage.storage.page_cache import (
    CachedBytes,
    cached_by_cachestat,
    cached_by_mincore,
    cached_bytes,
    cached_bytes_counter,
)
from mlpstorage.storage.probe import probe_access

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE_BYTES = mmap.PAGESIZE
PAGES = 64
WAYS = [cached_by_cachestat, cached_by_mincore, cached_bytes]


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """A file of 64 pages of which none is in the page cache, to be read without readahead."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * PAGE_BYTES))
    if os.major(path.stat().st_dev) == 0:
        pytest.skip("the temporary directory is not on a block device, whose pages can be dropped")
    descriptor = os.open(path, os.O_RDWR)
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=WAYS)
def count(request: pytest.FixtureRequest, descriptor: int) -> CachedBytes:
    """Each way of counting; skips where this kernel has it not."""
    way: CachedBytes = request.param
    if way(descriptor, 0, PAGE_BYTES) is None:
        pytest.skip("this kernel does not tell in this way")
    return way


def test_what_was_read_is_counted(descriptor: int, count: CachedBytes) -> None:
    """Of a file that is not cached exactly those pages count that were read since; dropped, they no longer do."""
    assert count(descriptor, 0, PAGES * PAGE_BYTES) == 0
    for page in (0, 1, 40, 63):
        os.pread(descriptor, PAGE_BYTES, page * PAGE_BYTES)
    assert count(descriptor, 0, PAGES * PAGE_BYTES) == 4 * PAGE_BYTES
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert count(descriptor, 0, PAGES * PAGE_BYTES) == 0


def test_parts_of_a_file_are_counted(descriptor: int, count: CachedBytes) -> None:
    """Only the part that is asked for counts, at any offset, and never with more bytes than it has."""
    for page in (8, 9, 10, 63):
        os.pread(descriptor, PAGE_BYTES, page * PAGE_BYTES)
    assert count(descriptor, 0, 8 * PAGE_BYTES) == 0
    assert count(descriptor, 0, 9 * PAGE_BYTES) == PAGE_BYTES
    assert count(descriptor, 9 * PAGE_BYTES, 4 * PAGE_BYTES) == 2 * PAGE_BYTES
    assert count(descriptor, 9 * PAGE_BYTES, 100) == 100
    assert count(descriptor, 9 * PAGE_BYTES + 1000, 100) == 100
    assert count(descriptor, 11 * PAGE_BYTES, 100) == 0
    assert count(descriptor, 62 * PAGE_BYTES, 8 * PAGE_BYTES) == PAGE_BYTES, "beyond the end there is nothing"


def test_what_was_written_is_counted(tmp_path: Path, count: CachedBytes) -> None:
    """What was written through the page cache is in it; what was written directly is not."""
    if not probe_access(tmp_path, DirectMode.AUTO).direct:
        pytest.skip("the temporary directory takes no direct I/O")
    memory = mmap.mmap(-1, PAGES * PAGE_BYTES)
    for flags, expected in ((0, PAGES * PAGE_BYTES), (os.O_DIRECT, 0)):
        written = os.open(tmp_path / f"written-{flags}", os.O_RDWR | os.O_CREAT | flags)
        os.pwritev(written, (memory,), 0)
        assert count(written, 0, PAGES * PAGE_BYTES) == expected
        os.close(written)


def test_another_program_agrees(descriptor: int, count: CachedBytes, tmp_path: Path) -> None:
    """`fincore` counts the same bytes."""
    fincore = shutil.which("fincore")
    if fincore is None:
        pytest.skip("there is no fincore")
    for page in range(3, 40, 2):
        os.pread(descriptor, PAGE_BYTES, page * PAGE_BYTES)
    told = subprocess.run(
        [fincore, "--bytes", "--noheadings", "--output", "RES", str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert count(descriptor, 0, PAGES * PAGE_BYTES) == int(told.stdout) == 19 * PAGE_BYTES


def test_what_cannot_be_mapped_is_none(tmp_path: Path) -> None:
    """Of what cannot be mapped, a pipe or a directory, mincore tells nothing."""
    read_end, write_end = os.pipe()
    try:
        assert cached_by_mincore(read_end, 0, PAGE_BYTES) is None
    finally:
        os.close(read_end)
        os.close(write_end)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert cached_by_mincore(directory, 0, PAGE_BYTES) is None
    finally:
        os.close(directory)


def test_files_of_others_are_not_counted_by_mincore(tmp_path: Path) -> None:
    """The kernel says of a file that is another user's that all of it is cached: that is not passed on as true."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_BYTES))
    script = (
        "import os, sys; from mlpstorage.storage.page_cache import cached_by_mincore; "
        "file = os.open(sys.argv[1], os.O_RDONLY); before = cached_by_mincore(file, 0, 4096); os.setuid(65534); "
        "print(before, cached_by_mincore(file, 0, 4096))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert told.stdout == "4096 None\n"


def test_counter_is_the_first_that_tells_the_truth(descriptor: int) -> None:
    """On an ordinary file system what was just written is found; where nothing finds it nothing is known."""
    os.pwrite(descriptor, bytes(PAGE_BYTES), 0)
    chosen = cached_bytes_counter(descriptor, PAGE_BYTES)
    assert chosen in {cached_by_cachestat, cached_by_mincore}
    assert chosen(descriptor, 0, PAGE_BYTES) == PAGE_BYTES
    # As if the file system kept what is written elsewhere than in the page cache.
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    unknown = cached_bytes_counter(descriptor, PAGE_BYTES)
    assert unknown(descriptor, 0, PAGE_BYTES) is None


def test_overlay_is_counted_truly(tmp_path: Path) -> None:
    """On overlayfs, of whose files cachestat tells nothing, the probe finds a way that does."""
    places = {name: tmp_path / name for name in ("lower", "upper", "work", "merged")}
    for place in places.values():
        place.mkdir()
    options = f"lowerdir={places['lower']},upperdir={places['upper']},workdir={places['work']}"
    done = subprocess.run(
        ["/bin/mount", "-t", "overlay", "-o", options, "none", str(places["merged"])],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"overlayfs cannot be mounted here: {done.stderr.strip()}")
    try:
        access = probe_access(places["merged"], DirectMode.NEVER)
        path = places["merged"] / "file"
        path.write_bytes(bytes(PAGES * PAGE_BYTES))
        descriptor = os.open(path, os.O_RDONLY)
        assert access.cached_bytes(descriptor, 0, PAGES * PAGE_BYTES) == PAGES * PAGE_BYTES
        os.close(descriptor)
        assert list(places["merged"].iterdir()) == [path], "the probe leaves nothing"
    finally:
        subprocess.run(["/bin/umount", str(places["merged"])], check=True)
