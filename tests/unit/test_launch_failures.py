"""What real launchers and ssh said where ranks could not start or died, and what the user is told of it."""

import pytest

from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, MLPStorageError, RunError
from mlpstorage.launch.failures import MissingPackageError, Rank, death, start_failure

OPEN_MPI_4_NO_PROGRAM = """\
mpirun was unable to launch the specified application as it could not access
or execute an executable:

Executable: /opt/venv/bin/python
Node: 10.77.31.3

while attempting to start process rank 1.
"""
OPEN_MPI_5_NO_PROGRAM = """\
prterun was unable to launch the specified application as it could not
access an executable:

   Executable: /opt/venv/bin/python
   Node: nodeb

while attempting to start process rank 1.
"""
MPICH_NO_PROGRAM = (
    "[proxy:1@nodeb] HYDU_create_process (/src/launch.c:73): "
    "execvp error on file /opt/venv/bin/python (No such file or directory)\n"
)
OPEN_MPI_5_NO_DAEMON = """\
bash: line 1: /opt/venv/bin/prted: No such file or directory
PRTE has lost communication with a daemon:
  Local host:    launcher
  Remote host:   nodeb
"""
RANKS = {number: Rank(rank=number, host=host, pid=30 + number) for number, host in enumerate(("nodea", "nodeb"))}


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            "ssh: Could not resolve hostname nosuchhost: Name or service not known\n",
            RunError,
            "host nosuchhost cannot be reached: Name or service not known",
        ),
        (
            "ssh: connect to host 10.77.31.99 port 22: No route to host\nORTE was unable to reliably start ...\n",
            RunError,
            "host 10.77.31.99 cannot be reached: No route to host",
        ),
        ("root@nodeb: Permission denied (publickey).\n", AccessError, "host nodeb lets nobody in"),
        (OPEN_MPI_4_NO_PROGRAM, MissingFileError, "host 10.77.31.3 has no /opt/venv/bin/python"),
        (OPEN_MPI_5_NO_PROGRAM, MissingFileError, "host nodeb has no /opt/venv/bin/python"),
        (MPICH_NO_PROGRAM, MissingFileError, "host nodeb has no /opt/venv/bin/python"),
        (OPEN_MPI_5_NO_DAEMON, MissingFileError, "host nodeb has no prted"),
        ("/opt/venv/bin/python: No module named mpi4py\n", MissingPackageError, "no Python package mpi4py"),
        (
            "/opt/venv/bin/python: No module named mpi4py.__main__; 'mpi4py' is a package and cannot be ...\n",
            MissingPackageError,
            "no Python package mpi4py",
        ),
        ("mpirun has detected an attempt to run as root.\n", ConfigurationError, "--allow-run-as-root"),
    ],
)
def test_a_failed_start_is_recognised(said: str, kind: type[MLPStorageError], told: str) -> None:
    """The error has the exit code of its cause, names the host, and does not stop at the launcher's words."""
    error = start_failure(said)
    assert type(error) is kind
    assert told in str(error)


def test_words_of_the_ranks_themselves_are_no_failed_start() -> None:
    """Warnings that do not keep ranks from starting."""
    assert start_failure("[launcher:1] plm:rsh: Warning: setpgid(2,2) failed in parent with errno=13\n") is None
    assert start_failure("") is None


@pytest.mark.parametrize(
    "said",
    [
        "mpirun noticed that process rank 1 with PID 11 on node 10.77.31.3 exited on signal 9 (Killed).\n",
        "prterun noticed that process rank 1 with PID 27 on node nodeb exited on\nsignal 9 (Killed).\n",
        "=   PID 31 RUNNING AT 10.77.31.3\n=   EXIT CODE: 9\n=   CLEANING UP REMAINING PROCESSES\n",
    ],
)
def test_a_killed_rank_is_named(said: str) -> None:
    """By its number and its host's own name, also where the launcher knows only an address or a process."""
    assert death(said, RANKS) == "rank 1 on nodeb was killed by signal 9 (SIGKILL)"


def test_a_process_number_of_two_hosts_is_told_apart_by_the_host() -> None:
    """Processes of two hosts may have the same number; then the order of the hosts tells which is meant, if known."""
    ranks = {0: Rank(rank=0, host="nodea", pid=31), 1: Rank(rank=1, host="nodeb", pid=31)}
    said = "=   PID 31 RUNNING AT nodeb\n=   EXIT CODE: 11\n"
    assert death(said, ranks) == "a rank on nodeb was killed by signal 11 (SIGSEGV)"
    said = "=   PID 31 RUNNING AT 10.0.0.2\n=   EXIT CODE: 9\n"
    assert death(said, ranks, ["10.0.0.1", "10.0.0.2"]) == "rank 1 on nodeb was killed by signal 9 (SIGKILL)"
    assert death("nothing of the kind", ranks) is None
