"""The mpirun command, and real ranks that it starts."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlpstorage.errors import ConfigurationError, MissingFileError, UsageError
from mlpstorage.launch.mpi import (
    Dialect,
    check_root,
    dialect_of,
    find_mpi,
    mpi_command,
    mpi_environment,
    mpi_library,
    split_mpi_params,
    version_line,
)
from mlpstorage.spec.hosts import parse_hosts

PROGRAM = ["python", "-m", "mpi4py", "-m", "rank"]


def command(hosts: str, num_processes: int, *, oversubscribe: bool = False) -> list[str]:
    """The command for `hosts` without any other option."""
    return mpi_command(
        mpi_bin="mpirun",
        num_processes=num_processes,
        hosts=parse_hosts([hosts]),
        oversubscribe=oversubscribe,
        allow_run_as_root=False,
        mpi_params=[],
        program=PROGRAM,
    )


def host_words(hosts: str, num_processes: int, *, oversubscribe: bool = False) -> str:
    """What stands behind `-host`."""
    words = command(hosts, num_processes, oversubscribe=oversubscribe)
    return words[words.index("-host") + 1]


def test_two_hosts() -> None:
    """The exact form that others rely on, ranks split evenly."""
    prefix = ["mpirun", "-n", "8", "-host", "host1:4,host2:4", "--bind-to", "none", "--map-by", "node"]
    assert command("host1,host2", 8) == [*prefix, *PROGRAM]


def test_one_host_maps_by_socket() -> None:
    """One host: ranks go round its sockets."""
    prefix = ["mpirun", "-n", "3", "-host", "127.0.0.1:3", "--bind-to", "none", "--map-by", "socket"]
    assert command("127.0.0.1", 3) == [*prefix, *PROGRAM]


def test_options_follow_in_order() -> None:
    """Flags, then extra parameters, then the program; the launcher is named as the user named it."""
    words = mpi_command(
        mpi_bin="/opt/my mpi/mpiexec",
        num_processes=2,
        hosts=parse_hosts(["a", "b"]),
        oversubscribe=True,
        allow_run_as_root=True,
        mpi_params=["--mca", "btl", "tcp,self"],
        program=["python", "-c", "print('a b')"],
    )
    prefix = ["/opt/my mpi/mpiexec", "-n", "2", "-host", "a:1,b:1", "--bind-to", "none", "--map-by", "node"]
    options = ["--oversubscribe", "--allow-run-as-root", "--mca", "btl", "tcp,self"]
    assert words == [*prefix, *options, "python", "-c", "print('a b')"]


OPEN_MPI_WORDS = (
    "mpirun -n 5 -host a:3,b:2 --bind-to none --map-by node --oversubscribe --allow-run-as-root --tag x "
    "-x OPENBLAS_NUM_THREADS=1 -x MPI4PY_LIBMPI=/opt/lib/libmpi.so"
)
MPICH_WORDS = (
    "mpirun -n 5 -hosts a:3,b:2 -bind-to none --tag x "
    "-genv OPENBLAS_NUM_THREADS 1 -genv MPI4PY_LIBMPI /opt/lib/libmpi.so"
)


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (Dialect.OPEN_MPI_4, OPEN_MPI_WORDS),
        (Dialect.OPEN_MPI_5, OPEN_MPI_WORDS),
        (
            Dialect.MPICH,
            MPICH_WORDS,
        ),
    ],
)
def test_each_dialect_has_its_words(dialect: Dialect, expected: str) -> None:
    """The exact argv of each launcher, with every option; a variable that the parameters set is left to them."""
    words = mpi_command(
        mpi_bin="mpirun",
        num_processes=5,
        hosts=parse_hosts(["a", "b"]),
        oversubscribe=True,
        allow_run_as_root=True,
        mpi_params=["--tag", "x"],
        program=PROGRAM,
        dialect=dialect,
        environment={"OPENBLAS_NUM_THREADS": "1", "MPI4PY_LIBMPI": "/opt/lib/libmpi.so"},
    )
    assert words == [*expected.split(), *PROGRAM]


def test_a_variable_that_the_user_hands_on_is_theirs() -> None:
    """Open MPI refuses a variable that comes twice with two values."""
    words = mpi_command(
        mpi_bin="mpirun",
        num_processes=1,
        hosts=parse_hosts(["a"]),
        oversubscribe=False,
        allow_run_as_root=False,
        mpi_params=["-x", "OPENBLAS_NUM_THREADS=4"],
        program=PROGRAM,
        environment={"OPENBLAS_NUM_THREADS": "1"},
    )
    assert [word for word in words if "OPENBLAS" in word] == ["OPENBLAS_NUM_THREADS=4"]


@pytest.mark.parametrize(
    ("hosts", "num_processes", "expected"),
    [
        ("a,b", 4, "a:2,b:2"),
        ("a:4,b:4", 2, "a:1,b:1"),
        ("a:4,b:1,c:2", 6, "a:3,b:1,c:2"),
        ("a:1,b:1", 5, "a:3,b:2"),
    ],
)
def test_mpich_is_given_what_each_host_runs(hosts: str, num_processes: int, expected: str) -> None:
    """Hydra fills host after host, so each is given its even share: of free slots first, then of what is too much."""
    words = mpi_command(
        mpi_bin="mpiexec",
        num_processes=num_processes,
        hosts=parse_hosts([hosts]),
        oversubscribe=True,
        allow_run_as_root=False,
        mpi_params=[],
        program=PROGRAM,
        dialect=Dialect.MPICH,
    )
    assert words[words.index("-hosts") + 1] == expected


@pytest.mark.parametrize(
    ("told", "dialect", "line"),
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to ...", Dialect.OPEN_MPI_4, "mpirun (Open MPI) 4.1.4"),
        ("mpirun.openmpi (OpenRTE) 4.1.4\n", Dialect.OPEN_MPI_4, "mpirun.openmpi (OpenRTE) 4.1.4"),
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to ...", Dialect.OPEN_MPI_5, "mpirun (Open MPI) 5.0.11"),
        ("prterun (PRRTE) 3.0.9\n", Dialect.OPEN_MPI_5, "prterun (PRRTE) 3.0.9"),
        (
            "HYDRA build details:\n    Version:                                 5.0.2\n    Release Date: ...",
            Dialect.MPICH,
            "MPICH (Hydra) 5.0.2",
        ),
        ("slurm 23.11", None, "slurm 23.11"),
    ],
)
def test_the_dialect_is_found_from_the_version(told: str, dialect: Dialect | None, line: str) -> None:
    """What the launchers say with --version, and the line of it that metadata keep."""
    assert dialect_of(told) is dialect
    assert version_line(told) == line


def test_the_library_is_that_of_the_launcher(tmp_path: Path) -> None:
    """Beside the launcher's directory, by the ABI of its dialect."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.12").touch()
    launcher = str(tmp_path / "bin" / "mpiexec")
    assert mpi_library(launcher, Dialect.MPICH) == tmp_path / "lib" / "libmpi.so.12"
    assert mpi_library(launcher, Dialect.OPEN_MPI_5) is None


def test_root_needs_the_flag_or_both_variables() -> None:
    """As Open MPI itself has it; MPICH lets root run."""
    if os.geteuid() != 0:
        pytest.skip("only root is refused")
    both = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    for environment in ({}, {"OMPI_ALLOW_RUN_AS_ROOT": "1"}):
        with pytest.raises(ConfigurationError, match="--allow-run-as-root"):
            check_root(Dialect.OPEN_MPI_4, allowed=False, environment=environment)
    check_root(Dialect.OPEN_MPI_5, allowed=False, environment=both)
    check_root(Dialect.OPEN_MPI_5, allowed=True, environment={})
    check_root(Dialect.MPICH, allowed=False, environment={})


@pytest.mark.parametrize(
    ("hosts", "num_processes", "expected"),
    [
        ("a,b,c", 8, "a:3,b:3,c:2"),
        ("a,b,c", 7, "a:3,b:2,c:2"),
        ("a:4,b:4", 2, "a:4,b:4"),
        ("a:4,b:4", 8, "a:4,b:4"),
        ("a:4,b,c", 9, "a:4,b:3,c:2"),
        ("a:4,b", 2, "a:4,b:1"),
        ("a a b", 3, "a:2,b:1"),
        ("::1", 2, "localhost:2"),
        ("[::1]:3", 2, "localhost:3"),
    ],
)
def test_slots(hosts: str, num_processes: int, expected: str) -> None:
    """Given slots stay; the other hosts share the rest, the first taking the remainder, none staying without a slot."""
    assert host_words(hosts, num_processes) == expected


@pytest.mark.parametrize(("hosts", "num_processes"), [("a:2,b:2", 5), ("a:2", 3), ("a a b", 4)])
def test_more_ranks_than_slots(hosts: str, num_processes: int) -> None:
    """Refused with the flags that help, unless oversubscribed."""
    with pytest.raises(ConfigurationError, match=r"--num-processes .*--hosts.*--oversubscribe"):
        command(hosts, num_processes)
    assert "--oversubscribe" in command(hosts, num_processes, oversubscribe=True)


def test_fewer_ranks_than_hosts() -> None:
    """A host without a rank is a mistake to be told, not to be guessed away."""
    with pytest.raises(ConfigurationError, match="--num-processes 1 leaves hosts without a rank"):
        command("a,b", 1)


def test_ipv6_is_refused() -> None:
    """All launchers cut a host at its first colon, so the address of another host cannot be given."""
    with pytest.raises(ConfigurationError, match=r"--hosts fe80::1: no MPI launcher takes an IPv6 address.*/etc/hosts"):
        command("h1,[fe80::1]:2", 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, []),
        ([["a", "b"]], ["a", "b"]),
        ([["--mca x y"]], ["--mca", "x", "y"]),
        ([["--mca x y"], ["-x", "A=1"]], ["--mca", "x", "y", "-x", "A=1"]),
        ([["-x 'A=1 2'"]], ["-x", "A=1 2"]),
    ],
)
def test_split_mpi_params(values: list[list[str]] | None, expected: list[str]) -> None:
    """Separate words and one quoted text give the same argv."""
    assert split_mpi_params(values) == expected


def test_split_mpi_params_refuses_an_open_quotation() -> None:
    """A broken quotation is a usage error that names the flag."""
    with pytest.raises(UsageError, match="--mpi-params"):
        split_mpi_params([["-x 'A"]])


def test_find_mpi_says_how_to_install() -> None:
    """A launcher that is not there: exit 3, the name, and the command that brings one."""
    with pytest.raises(MissingFileError, match=r"no-such-mpirun.*pip install \"mlpstorage\[mpi\]\"") as caught:
        find_mpi("no-such-mpirun")
    assert caught.value.exit_code == 3


def test_find_mpi_looks_beside_python_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's directory wins over PATH; PATH serves what is not there; the environment finds the same."""
    for directory, program in [("bin", "mpirun"), ("other", "mpirun"), ("other", "mpiexec")]:
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / program).write_text("#!/bin/sh\n")
        (tmp_path / directory / program).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    monkeypatch.setenv("KEPT", "yes")
    assert find_mpi("mpirun") == str(tmp_path / "bin" / "mpirun")
    assert find_mpi("mpiexec") == str(tmp_path / "other" / "mpiexec")
    environment = mpi_environment()
    assert environment["PATH"] == f"{tmp_path}/bin:{tmp_path}/other"
    assert environment["KEPT"] == "yes"
    assert shutil.which("mpirun", path=environment["PATH"]) == find_mpi("mpirun")


def test_find_mpi_takes_a_path(tmp_path: Path) -> None:
    """A path is used as it is; one that cannot be executed counts as missing."""
    program = tmp_path / "my mpirun"
    program.write_text("#!/bin/sh\n")
    with pytest.raises(MissingFileError, match="no executable file"):
        find_mpi(str(program))
    program.chmod(0o755)
    assert find_mpi(str(program)) == str(program)


RANK = """
from mpi4py import MPI
world = MPI.COMM_WORLD
ranks = world.gather((world.rank, world.allreduce(1)))
if world.rank == 0:
    import json
    print(json.dumps(ranks))
"""


@pytest.mark.parametrize(
    ("hosts", "num_processes", "oversubscribe"),
    [
        ("127.0.0.1", 1, False),
        ("127.0.0.1", 2, False),
        ("127.0.0.1", 3, True),
        ("127.0.0.1:2", 3, True),
        ("::1", 2, False),
        ("127.0.0.1:1,localhost:1", 2, False),
    ],
)
def test_real_ranks(hosts: str, num_processes: int, *, oversubscribe: bool) -> None:
    """The command starts that many ranks, which reach each other over MPI."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    try:
        mpirun = find_mpi("mpirun")
    except MissingFileError as error:
        pytest.skip(str(error))
    words = mpi_command(
        mpi_bin=mpirun,
        num_processes=num_processes,
        hosts=parse_hosts([hosts]),
        oversubscribe=oversubscribe,
        allow_run_as_root=os.geteuid() == 0,
        mpi_params=[],
        program=[sys.executable, "-m", "mpi4py", "-c", RANK],
    )
    done = subprocess.run(words, env=mpi_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[rank, num_processes] for rank in range(num_processes)]
    assert done.stderr == ""
