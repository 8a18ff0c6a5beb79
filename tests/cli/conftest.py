"""What tests of the installed command share: running it, waiting for what it does, reading what it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = Path(sys.executable).parent / "mlpstorage"
"""The installed command."""

TINY: Mapping[str, str] = {
    "--model": "tiny-1b",
    "--num-users": "6",
    "--generation-mode": "none",
    "--duration": "0.8",
    "--warmup": "0.2",
    "--gpu-mem-gb": "0",
    "--cpu-mem-gb": "0",
    "--storage-gb": "0.3",
    "--block-tokens": "64",
}
"""A load whose objects of 1.5 MiB all go to storage and come back from there."""

PATIENCE_S = 60.0
"""Longest wait for something that a healthy program does within a second or two."""


@dataclass(frozen=True, slots=True)
class Run:
    """A result directory."""

    directory: Path

    @property
    def metadata_path(self) -> Path:
        """The one metadata file."""
        (path,) = self.directory.glob("*_metadata.json")
        return path

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata."""
        return _document(self.metadata_path)

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers."""
        return _document(self.directory / "summary.json")

    @property
    def series(self) -> list[dict[str, Any]]:
        """The time series."""
        return [json.loads(line) for line in (self.directory / "timeseries.jsonl").read_text().splitlines()]

    def rank(self, number: int) -> dict[str, Any]:
        """What one rank measured."""
        return _document(self.directory / "ranks" / f"rank_{number}.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cli:
    """The command, with a directory of its own to work in; results go to `results`, cache files to `cache`."""

    place: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def results(self) -> Path:
        """The results directory; not there at first."""
        return self.place / "results"

    @property
    def cache(self) -> Path:
        """A cache directory; not there at first."""
        return self.place / "cache"

    def run(
        self, *words: object, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            [*prefix, str(PROGRAM), *map(str, words)],
            cwd=self.place,
            env=environment(env),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    def load(self, *words: object) -> list[str]:
        """The words of a tiny `kvcache run`; a flag of TINY that `words` name is theirs. A trace has its own blocks."""
        given = {str(word) for word in words}
        if "--trace" in given:
            given.add("--block-tokens")
        base = [word for flag, value in TINY.items() if flag not in given for word in (flag, value)]
        return ["kvcache", "run", "--results-dir", str(self.results), *base, *map(str, words)]

    def play(self, *words: object, exit_code: int = 0, env: Mapping[str, str] | None = None) -> Run:
        """Run a tiny `kvcache run` that ends with `exit_code`; returns its result directory."""
        before = set(self.runs())
        ended = self.run(*self.load(*words), env=env)
        assert ended.returncode == exit_code, ended.stderr
        (run,) = set(self.runs()) - before
        return run

    def start(self, *words: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start the command; the test's end kills what the test has not ended."""
        process = subprocess.Popen(
            [str(PROGRAM), *map(str, words)],
            cwd=self.place,
            env=environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def runs(self) -> list[Run]:
        """The result directories."""
        return [Run(path.parent) for path in sorted(self.results.glob("kv_cache/*/run/*/kv_cache_*_metadata.json"))]

    def only_run(self) -> Run:
        """The one result directory."""
        (run,) = self.runs()
        return run

    def objects(self) -> list[Path]:
        """The finished cache files below `cache`."""
        return [path for path in self.cache.glob("rank_*/*/?/?/*") if not path.name.endswith(".tmp")]

    def history(self) -> list[dict[str, Any]]:
        """What `history list --json` shows."""
        ended = self.run("history", "list", "--json", "--results-dir", self.results)
        assert ended.returncode == 0, ended.stderr
        shown: list[dict[str, Any]] = json.loads(ended.stdout)
        return shown

    @staticmethod
    def eventually(condition: Callable[[], object], what: str) -> None:
        """Return as soon as `condition` is true; fail where it stays false."""
        _eventually(condition, what)

    def kill_started(self) -> None:
        """Kill what is left of what `start` started, its children included."""
        for process in self.started:
            family = [process.pid]
            with contextlib.suppress(psutil.NoSuchProcess):
                family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            if process.poll() is None:
                for pid in family:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.communicate()


def environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """This environment without settings of the product, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLPSTORAGE_")}
    return kept | dict(more or {})


def _document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _eventually(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        pause.wait(0.02)


@pytest.fixture(scope="session")
def new_cli() -> Callable[[Path], Cli]:
    """Makes a `Cli` that works in a given directory."""
    return lambda place: Cli(place=place)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """The command, in the test's own directory."""
    it = Cli(place=tmp_path)
    yield it
    it.kill_started()


@pytest.fixture(scope="session")
def unprivileged() -> tuple[str, ...]:
    """Words before a command that take from root its right to pass over permission bits."""
    if os.geteuid() != 0:
        return ()
    dropped = "-dac_override,-dac_read_search"
    words = ("setpriv", "--bounding-set", dropped, "--inh-caps", dropped)
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"root passes over permissions, and setpriv cannot change that: {error}")
    return words


@pytest.fixture(scope="session")
def direct_file_system(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of the file system of temporary directories, where it is one that surely takes direct I/O."""
    place = tmp_path_factory.getbasetemp()
    found = subprocess.run(["stat", "-f", "-c", "%T", str(place)], check=True, capture_output=True, text=True)  # noqa: S607 - coreutils, wherever they are
    name = found.stdout.strip()
    if name not in {"ext2/ext3", "xfs"}:
        pytest.skip(f"{place} is on {name}, not on ext4 or xfs")
    return name


@pytest.fixture
def buffered_file_system(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system that refuses direct I/O (ramfs, which also tells no size)."""
    place = tmp_path / "ramfs"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(place)], check=False, capture_output=True, text=True)  # noqa: S607 - wherever it is
    if mounted.returncode:
        pytest.skip(f"only root can mount a file system without direct I/O: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)  # noqa: S607 - likewise
