"""Runs over two hosts without a common file system, started by each MPI launcher, and what ends such runs."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pydantic
import pytest

from mlpstorage.launch.mpi import Dialect
from tests.mpi.hosts import NETWORK, NODES, UNKNOWN, Hosts, UnavailableError, eventually, running
from tests.mpi.launchers import Launcher, launcher
from tests.mpi.launchers import UnavailableError as NoLauncherError
from tests.trace_files import mooncake

BIN = Path(sys.executable).parent
BOUND_S = 30.0
"""In so many seconds a run that fails must have ended, by the issue."""

TINY = shlex.split(
    "--num-users 2 --generation-mode none --gpu-mem-gb 0 --cpu-mem-gb 0.02 --storage-gb 0.1 "
    "--block-tokens 64 --warmup 0.2"
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Two hosts for ranks, and a third that launches them."""

    hosts: Hosts
    launcher: Launcher
    results: Path

    def command(self, *words: str, nodes: str = " ".join(NODES.values()), ranks: int = 4) -> list[str]:
        """The words of a run of four ranks."""
        where = ["--hosts", *nodes.split(), "--num-processes", str(ranks), "--mpi-bin", str(self.launcher.path)]
        where += ["--results-dir", str(self.results), "--cache-dir", str(self.hosts.place / "cache")]
        model = [] if "--model-config" in words else ["--model", "tiny-1b"]
        return [str(BIN / "mlpstorage"), "kvcache", "run", *where, *model, *TINY, *words]

    def environment(self) -> dict[str, str]:
        """That of the launching host."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return kept | {"TMPDIR": str(self.hosts.place / "tmp")} | dict(self.launcher.environment(self.hosts.agent))

    def start(self, *words: str, nodes: str = " ".join(NODES.values()), ranks: int = 4) -> "subprocess.Popen[str]":
        """Start a run on the launching host."""
        command = self.command("--allow-run-as-root", *words, nodes=nodes, ranks=ranks)
        return self.hosts.start(command, self.environment())

    def playing(self, *words: str) -> "subprocess.Popen[str]":
        """Start a long run; returns when all ranks play."""
        process = self.start(*(words or ("--duration", "600")))
        eventually(lambda: self._told() or process.poll() is not None, "the ranks play")
        assert process.poll() is None, process.communicate()
        return process

    def _told(self) -> bool:
        return bool(self.series())

    def series(self) -> str:
        """The time series of the only run, as far as it is written."""
        return "".join(path.read_text() for path in self.results.glob("kv_cache/*/run/*/timeseries.jsonl"))

    def run_directory(self) -> Path:
        """The only result directory."""
        (directory,) = self.results.glob("kv_cache/*/run/*")
        return directory

    def metadata(self) -> dict[str, Any]:
        """The metadata of the only run, or of the only invocation that was refused before it had a directory."""
        (path,) = self.results.glob("**/*metadata.json")
        document: dict[str, Any] = json.loads(path.read_text())
        return document


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The hosts, for all tests of this file."""
    try:
        with running(tmp_path_factory.mktemp("hosts")) as made:
            yield made
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=list(Dialect), ids=lambda dialect: dialect.name.lower())
def cluster(request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path) -> Iterator[Cluster]:
    """The hosts with one of the launchers; whatever a test leaves on them is ended, links are raised."""
    try:
        found = launcher(request.param)
    except NoLauncherError as error:
        pytest.skip(str(error))
    yield Cluster(hosts, found, tmp_path / "results")
    hosts.end()


def only(*dialects: Dialect) -> pytest.MarkDecorator:
    """For what does not depend on the launcher, or takes long: with these only."""
    return pytest.mark.parametrize("cluster", dialects, indirect=True, ids=lambda dialect: dialect.name.lower())


def failed(process: "subprocess.Popen[str]", cluster: Cluster, exit_code: int) -> str:
    """What a run says that ends with `exit_code` within the bound, as failed, with nothing left on any host."""
    _, stderr = process.communicate(timeout=BOUND_S)
    assert process.returncode == exit_code, stderr
    metadata = cluster.metadata()
    assert (metadata["status"], metadata["exit_code"]) == ("failed", exit_code)
    eventually(lambda: not cluster.hosts.survivors(), "no process is left on any host")
    (line,) = (line for line in stderr.splitlines() if line.startswith("mlpstorage: error: "))
    return line


def test_four_ranks_on_two_hosts(cluster: Cluster) -> None:
    """The results of all ranks are on the launching host, though it shares no file system with theirs."""
    process = cluster.start("--duration", "2")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    directory, metadata = cluster.run_directory(), cluster.metadata()
    summary = json.loads((directory / "summary.json").read_text())
    ranks = [json.loads((directory / "ranks" / f"rank_{number}.json").read_text()) for number in range(4)]
    assert sorted(rank["host"] for rank in ranks) == ["nodea", "nodea", "nodeb", "nodeb"]
    assert sorted((host["host"], host["ranks"]) for host in summary["hosts"]) == [("nodea", 2), ("nodeb", 2)]
    host_lines = [json.loads(line) for line in (directory / "timeseries_hosts.jsonl").read_text().splitlines()]
    assert {line["host"] for line in host_lines} == {"nodea", "nodeb"}
    assert metadata["hosts"] == list(NODES.values())
    assert re.search(r"\d+\.\d+\.\d+$", metadata["software"]["mpi"])
    assert re.search(r"nodea.*nodeb|nodeb.*nodea", json.dumps(metadata["cluster_information"]))
    for name in ("read_bytes", "written_bytes"):
        assert all(rank["storage_total"][name] > 0 for rank in ranks)
        assert summary["storage_total"][name] == sum(rank["storage_total"][name] for rank in ranks)
    listed = [str(BIN / "mlpstorage"), "history", "list", "--json", "--results-dir", str(cluster.results)]
    (shown,) = json.loads(subprocess.run(listed, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert (shown["num_processes"], len(shown["hosts"]), shown["status"]) == (4, 2, "complete")
    assert no_cache_file(cluster)
    assert not cluster.hosts.survivors()


@only(Dialect.OPEN_MPI_5)
def test_two_hosts_share_a_directory(cluster: Cluster, tmp_path: Path) -> None:
    """A directory of both hosts, one cache in it: each rank finds blocks that the other one, elsewhere, has written."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for host in cluster.hosts.nodes.values():
        # Only the hosts' own `place` is hidden from each other.
        assert host.path(shared).samefile(shared)
    turns = [[0, *range(100 * session, 100 * session + turn)] for turn in range(1, 6) for session in (1, 2, 3)]
    rows = [(150 * number, 512 * len(chain) + 1, [*chain, 9_000 + number]) for number, chain in enumerate(turns)]
    trace = mooncake(tmp_path / "trace.jsonl", rows)
    words = f"--trace {trace} --block-tokens 512 --duration 60 --warmup 0 --cpu-mem-gb 0 --storage-gb 2"
    words += f" --cache-scope shared --placement round-robin --cache-dir {shared}"
    process = cluster.start(*words.split(), ranks=2)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    summary = json.loads((cluster.run_directory() / "summary.json").read_text())
    assert sorted((host["host"], host["ranks"]) for host in summary["hosts"]) == [("nodea", 1), ("nodeb", 1)]
    # Of neighbouring turns of a session, three requests apart, one is played on each host.
    assert 0 < summary["hit_ratio"]["blocks"]["cross_rank"] <= summary["hit_ratio"]["blocks"]["storage"] <= 1
    assert summary["requests"]["completed"] == len(turns)
    assert summary["storage_total"]["io_errors"] == summary["storage_total"]["verify_errors"] == 0
    assert not [path for path in shared.rglob("*") if path.is_file()]


def no_cache_file(cluster: Cluster) -> bool:
    """Whether no host has a file in the cache directory."""
    caches = [host.path(cluster.hosts.place / "cache") for host in cluster.hosts.nodes.values()]
    assert not (cluster.hosts.place / "cache").exists(), "the launching host has none: each host has its own"
    return not [path for cache in caches for path in cache.rglob("*") if path.is_file()]


def test_interrupt_ends_every_rank(cluster: Cluster) -> None:
    """SIGTERM of the command: exit 130, and within 5 seconds nothing runs on any host."""
    process = cluster.playing()
    (command,) = (one for one in cluster.hosts.launcher.processes() if "kvcache" in one.cmdline())
    command.terminate()
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == 130, stderr
    eventually(lambda: not cluster.hosts.survivors(), "no process is left on any host")
    assert cluster.metadata()["status"] == "interrupted"


def test_a_killed_rank_is_named(cluster: Cluster) -> None:
    """SIGKILL of a rank: the run fails and says which rank, on which host, by which signal.

    A rank of Open MPI 5 may notice before the launcher and end the job: then only the hosts are known.
    """
    process = cluster.playing()
    cluster.hosts.nodes["nodeb"].ranks()[0].kill()
    told = failed(process, cluster, 6)
    named = r"rank [0-3] on nodeb was killed by signal 9"
    if cluster.launcher.dialect is Dialect.OPEN_MPI_5:
        named += r"|rank [0-3] or [0-3] on nodeb has died|a rank on one of nodea, nodeb has died"
    assert re.search(named, told), told


MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 256,
    "vocab_size": 1000,
}


def waiting_for_a_file(cluster: Cluster) -> "subprocess.Popen[str]":
    """Start a run whose model file is a pipe that nobody writes to on nodeb; returns when a rank waits for it."""
    model = cluster.hosts.place / "model.json"
    model.write_text(json.dumps(MODEL))
    for name, host in cluster.hosts.nodes.items():
        there = host.path(model)
        there.unlink(missing_ok=True)
        if name == "nodeb":
            os.mkfifo(there)
        else:
            there.write_bytes(model.read_bytes())
    process = cluster.start("--model-config", str(model), "--duration", "20")
    ranks = cluster.hosts.nodes["nodeb"].ranks
    eventually(lambda: any(map(opens_a_pipe, ranks())) or process.poll() is not None, "a rank waits for the file")
    assert process.poll() is None, process.communicate()
    return process


def opens_a_pipe(rank: psutil.Process) -> bool:
    """Whether the process waits in the kernel for the other end of a pipe."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{rank.pid}/wchan").read_text() == "wait_for_partner"
    return False


@only(Dialect.MPICH)
def test_a_rank_whose_storage_hangs_before_the_run_is_named(cluster: Cluster) -> None:
    """Two ranks wait for ever for a file of their host: the others, which wait for them, are not taken to hang."""
    told = failed(waiting_for_a_file(cluster), cluster, 7)
    assert re.search(r"error: rank [0-3] on nodeb(, rank [0-3] on nodeb)?: nothing has gone on there for", told), told


@only(Dialect.OPEN_MPI_4)
def test_a_rank_that_is_stopped_before_the_run_is_named(cluster: Cluster) -> None:
    """SIGSTOP of a rank that waits for another, which is still preparing."""
    process = waiting_for_a_file(cluster)
    cluster.hosts.nodes["nodea"].ranks()[-1].suspend()
    told = failed(process, cluster, 7)
    assert re.search(r"error: rank [0-3] on nodea: not heard of for 1\d s", told), told


@only(Dialect.OPEN_MPI_5)
def test_a_rank_that_is_stopped_while_it_cleans_up_is_named(cluster: Cluster) -> None:
    """SIGSTOP of a rank at the first directory that it removes: the run fails, its results are there and whole."""
    if shutil.which("strace") is None:
        pytest.skip("stopping a rank at a system call needs strace: apt-get install strace")
    process = cluster.playing("--duration", "8")
    # Of the window enough is over for results: a tracer slows down the rank.
    eventually(lambda: '"t_s":4' in cluster.series() or process.poll() is not None, "half of the window is over")
    stopped = cluster.hosts.nodes["nodeb"].ranks()[0].pid
    inject = ["--follow-forks", f"--attach={stopped}", "--trace=rmdir,unlinkat", "--output=/dev/null"]
    tracer = subprocess.Popen([shutil.which("strace") or "", *inject, "--inject=rmdir,unlinkat:signal=SIGSTOP:when=1"])
    try:
        told = failed(process, cluster, 7)
    finally:
        tracer.terminate()
        tracer.wait(60)
    assert re.search(r"error: rank [0-3] on nodeb: not heard of for 1\d s.*results are whole", told), told
    summary = json.loads((cluster.run_directory() / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert all(rank["storage_total"]["write_ops"] > 0 for rank in ranks_of(cluster))


def ranks_of(cluster: Cluster) -> list[dict[str, Any]]:
    """The rank files of the only run."""
    return [json.loads((cluster.run_directory() / "ranks" / f"rank_{number}.json").read_text()) for number in range(4)]


@only(Dialect.MPICH)
def test_a_stopped_rank_is_named(cluster: Cluster) -> None:
    """SIGSTOP of a rank: the others notice that it is silent, and all end, the stopped one too."""
    process = cluster.playing()
    cluster.hosts.nodes["nodeb"].ranks()[0].suspend()
    told = failed(process, cluster, 7)
    assert re.search(r"rank [0-3] on nodeb: not heard of", told), told


@pytest.mark.parametrize(
    ("cluster", "name"),
    [(Dialect.OPEN_MPI_5, "nodea"), (Dialect.OPEN_MPI_4, "nodeb")],
    indirect=["cluster"],
    ids=["open_mpi_5-nodea", "open_mpi_4-nodeb"],
)
def test_a_lost_network_is_noticed(cluster: Cluster, name: str) -> None:
    """The link of a host goes down: the run fails and names a host, and the ranks of the host itself end too."""
    process = cluster.playing()
    cluster.hosts.set_link(name, "down")
    told = failed(process, cluster, 7)
    assert re.search(r"rank [0-3] on node[ab]: not heard of", told), told


@pytest.mark.parametrize(
    ("address", "why"),
    [(UNKNOWN, "No route to host"), ("nosuchhost", "(Name or service|Temporary failure)")],
)
def test_an_unknown_host_is_named(cluster: Cluster, address: str, why: str) -> None:
    """A host that nobody answers for: the run fails with the host's name and ssh's reason."""
    # MPICH leaves daemons behind where a name is unknown: such a name is refused before it is started.
    exit_code = 5 if cluster.launcher.dialect is Dialect.MPICH and address == "nosuchhost" else 6
    told = failed(cluster.start("--duration", "2", nodes=f"{NETWORK}.2 {address}"), cluster, exit_code)
    assert re.search(f"host {address} cannot be reached: {why}", told), told


@pytest.fixture
def masked(cluster: Cluster) -> Iterator[Callable[[Path, str], None]]:
    """Puts another directory or file, made by a shell script, in the place of one; on nodeb, until the test's end."""
    enter = ["nsenter", f"--target={cluster.hosts.nodes['nodeb'].pid}", "--mount", "--pid", "bash", "-ec"]
    covered: list[Path] = []

    def mask(path: Path, script: str) -> None:
        words = (
            f"made=$(mktemp -d -p {cluster.hosts.place / 'tmp'})/mask; path={path}; {script}; mount --bind $made $path"
        )
        subprocess.run([*enter, words], check=True, timeout=60)
        covered.append(path)

    yield mask
    # Whatever still runs there would be cut off from its files.
    cluster.hosts.end()
    for path in reversed(covered):
        subprocess.run([*enter, f"umount --lazy {path}"], check=True, timeout=60)


def test_a_missing_interpreter_is_named(cluster: Cluster, masked: Callable[[Path, str], None]) -> None:
    """One host lacks Python: the run fails, names the host and the program, and says what to install."""
    masked(BIN, "cp -a $path $made; rm $made/python*")
    told = failed(cluster.start("--duration", "2"), cluster, 3)
    assert re.search(rf"host (nodeb|{NODES['nodeb']}) has no {sys.executable}", told), told
    assert "Install mlpstorage" in told


def test_a_missing_package_is_named(cluster: Cluster, masked: Callable[[Path, str], None]) -> None:
    """One host has no mpi4py: the run fails, names the host and the package and says how to install it."""
    import mpi4py  # noqa: PLC0415 - an optional package

    masked(Path(mpi4py.__path__[0]), "mkdir $made")
    told = failed(cluster.start("--duration", "2"), cluster, 5)
    assert "error: host nodeb has no Python package mpi4py" in told


@only(Dialect.OPEN_MPI_4)
def test_a_missing_package_of_ours_is_named(cluster: Cluster, masked: Callable[[Path, str], None]) -> None:
    """One host has mpi4py, but not what mlpstorage needs: found only when a rank imports it."""
    masked(Path(pydantic.__path__[0]), "mkdir $made")
    told = failed(cluster.start("--duration", "2"), cluster, 5)
    assert "error: host nodeb has no Python package pydantic" in told


@only(Dialect.OPEN_MPI_4, Dialect.MPICH)
def test_another_version_is_named(cluster: Cluster, masked: Callable[[Path, str], None]) -> None:
    """One host has another version: nothing begins, and the error names rank, host and both versions."""
    import mlpstorage  # noqa: PLC0415 - its file is needed

    masked(Path(mlpstorage.__file__), "sed 's/__version__ = .*/__version__ = \"0.0.1\"/' $path > $made")
    told = failed(cluster.start("--duration", "2"), cluster, 5)
    assert re.search(rf"rank \d on nodeb has mlpstorage 0\.0\.1, rank 0 on nodea has {mlpstorage.__version__}", told)


@only(Dialect.OPEN_MPI_5, Dialect.OPEN_MPI_4)
def test_a_host_without_room_is_named(cluster: Cluster, masked: Callable[[Path, str], None]) -> None:
    """The cache directory of one host is too small: nothing begins, the error names rank, host and both sizes."""
    cache = cluster.hosts.nodes["nodeb"].path(cluster.hosts.place / "cache")
    cache.mkdir(exist_ok=True)
    masked(cluster.hosts.place / "cache", "mkdir $made; mount -t tmpfs -o size=64m small $made")
    told = failed(cluster.start("--duration", "2"), cluster, 5)
    assert re.search(r"rank \d on nodeb: not enough space: the plan needs .* free", told), told


@only(Dialect.OPEN_MPI_5, Dialect.MPICH)
def test_a_host_that_cannot_write_is_named(cluster: Cluster, masked: Callable[[Path, str], None]) -> None:
    """The cache directory of one host is mounted read-only: nothing begins, the error names rank and host."""
    cache = cluster.hosts.nodes["nodeb"].path(cluster.hosts.place / "cache")
    cache.mkdir(exist_ok=True)
    masked(cluster.hosts.place / "cache", "mkdir $made; mount -t tmpfs -o ro,size=1g readonly $made")
    told = failed(cluster.start("--duration", "2"), cluster, 4)
    assert re.search(r"rank \d on nodeb: .*Read-only file system", told), told


def refused(cluster: Cluster, command: list[str], environment: Mapping[str, str], exit_code: int) -> str:
    """What a run says that is refused before anything starts."""
    process = cluster.hosts.start(command, environment)
    _, stderr = process.communicate(timeout=BOUND_S)
    assert process.returncode == exit_code, stderr
    assert cluster.metadata()["status"] == "failed"
    assert not list(cluster.results.glob("kv_cache/*/run/*"))
    return stderr


@only(Dialect.OPEN_MPI_4, Dialect.OPEN_MPI_5)
def test_root_is_told_the_flag(cluster: Cluster) -> None:
    """Open MPI does not run as root by itself, and the error names the flag."""
    assert "--allow-run-as-root" in refused(cluster, cluster.command(), cluster.environment(), 5)


def test_more_ranks_than_slots_are_refused(cluster: Cluster) -> None:
    """Slots are respected whatever the launcher would do; the error names the flag that lifts the limit."""
    nodes = " ".join(f"{address}:1" for address in NODES.values())
    command = cluster.command("--allow-run-as-root", nodes=nodes)
    assert "--oversubscribe" in refused(cluster, command, cluster.environment(), 5)
