"""Processor time of the process, and waits for processors, against the kernel's own files and against starvation."""

import os
import time
from pathlib import Path

import pytest

from mlpstorage.measure.process import cpu_s, thread_waits_ns, waited_s


def tasks(directory: Path, threads: dict[int, str | None]) -> Path:
    """A directory like `/proc/self/task`; None for a thread without the file."""
    for thread, text in threads.items():
        (directory / str(thread)).mkdir(parents=True)
        if text is not None:
            (directory / str(thread) / "schedstat").write_text(text, encoding="ascii")
    return directory


def test_waits_are_the_second_field_of_each_thread(tmp_path: Path) -> None:
    """Run, waited, slices: 5 ns and 7 ns."""
    assert thread_waits_ns(tasks(tmp_path, {11: "100 5 3\n", 12: "0 7 1\n"})) == {11: 5, 12: 7}


def test_a_kernel_that_keeps_no_waits_tells_none(tmp_path: Path) -> None:
    """No file, or one of zeros only although threads have run, or no such directory."""
    assert thread_waits_ns(tasks(tmp_path / "no-file", {11: None})) is None
    assert thread_waits_ns(tasks(tmp_path / "zeros", {11: "0 0 0\n", 12: "0 0 0\n"})) is None
    assert thread_waits_ns(tmp_path / "missing") is None


def test_what_threads_waited_between_two_moments() -> None:
    """One that began in between counts from 0, one that ended is left out, in seconds."""
    before, after = {1: 5_000_000_000, 2: 1_000_000_000}, {1: 6_500_000_000, 3: 250_000_000}
    assert waited_s(before, after) == 1.75
    assert waited_s(None, after) is None
    assert waited_s(before, None) is None


def test_processor_time_is_that_of_the_process_clock() -> None:
    """At least what this thread used, and the kernel's own clock of the process bounds it from both sides."""
    before_s, clock_before_s = cpu_s(), time.process_time()
    until_s = time.thread_time() + 0.05
    while time.thread_time() < until_s:
        pass
    used_s = cpu_s() - before_s
    assert 0.04 <= used_s <= time.process_time() - clock_before_s + 0.02


@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/schedstat").exists(), reason="this kernel keeps no waits for processors"
)
def test_the_running_process_has_waits_of_each_of_its_threads() -> None:
    """Every thread of the process is there, and none waited longer than the machine has been up."""
    waits_ns = thread_waits_ns()
    assert waits_ns is not None
    assert os.getpid() in waits_ns
    assert all(0 <= wait_ns <= time.clock_gettime_ns(time.CLOCK_BOOTTIME) for wait_ns in waits_ns.values())
