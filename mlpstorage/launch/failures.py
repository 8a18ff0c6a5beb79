"""What MPI launchers say where ranks could not be started or have died, read for the user.

The texts are those of Open MPI 4.1, of Open MPI 5.0 (PRRTE) and of MPICH 5.0 (Hydra), and of ssh, which all three use.
They differ so much that no dialect needs to be known.
"""

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, MLPStorageError, RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Where a rank runs: its host's own name, and its process there."""

    rank: int
    host: str
    pid: int


class MissingPackageError(ConfigurationError):
    """A host lacks a Python package. Python says which package, and nobody says which host; `hosts` are to be found.

    Args:
        package: Its name.
        hosts: Those without it; none while unknown.
    """

    def __init__(self, package: str, hosts: Sequence[str] = ()) -> None:
        where = f"host {', '.join(hosts)} has" if hosts else "a host has"
        super().__init__(
            f"{where} no Python package {package}; no rank has begun. Install the same mlpstorage with its extra "
            '"mpi" at the same path on every host'
        )
        self.package = package


def start_failure(text: str) -> MLPStorageError | None:
    """Why ranks cannot be started, from what launcher and ssh have said; None where that tells nothing."""
    for pattern, error in _START_FAILURES:
        found = pattern.search(text)
        if found is not None:
            return error(found)
    return None


def death(text: str, ranks: Mapping[int, Rank], named: Sequence[str] = ()) -> str | None:
    """Which rank has died and how, from what the launcher has said; None where that tells nothing.

    `ranks` are those that had told where they run, `named` the hosts as the launcher was given them.
    """
    found = _OPEN_MPI_SIGNAL.search(text)
    if found is not None:
        number = int(found["rank"])
        host = ranks[number].host if number in ranks else found["host"]
        return f"rank {number} on {host} was killed by {_signal_text(int(found['signal']))}"
    found = _HYDRA_DEATH.search(text)
    if found is None:
        return None
    pid, code = int(found["pid"]), int(found["code"])
    matching = [rank for rank in ranks.values() if rank.pid == pid]
    if len(matching) > 1 and found["host"] in named:
        # Hydra fills the hosts in their order, so that the first ranks' host is the first that was named.
        own = list(dict.fromkeys(ranks[number].host for number in sorted(ranks)))
        place = list(named).index(found["host"])
        matching = [rank for rank in matching if own[place : place + 1] == [rank.host]]
    who = f"rank {matching[0].rank} on {matching[0].host}" if len(matching) == 1 else f"a rank on {found['host']}"
    return f"{who} was killed by {_signal_text(code)}"


def lost_peer(text: str, ranks: Mapping[int, Rank]) -> str:
    """Which ranks may have died, where a rank of Open MPI 5 found a connection closed before its launcher knew why."""
    found = _OPEN_MPI_PEER.search(text)
    there = sorted(number for number, rank in ranks.items() if found is not None and rank.host == found["host"])
    if found is None or not there:
        hosts = ", ".join(dict.fromkeys(rank.host for rank in ranks.values()))
        return f"a rank on one of {hosts} has died: another rank lost its connection to it"
    return f"rank {' or '.join(map(str, there))} on {found['host']} has died: another rank lost its connection to it"


_OPEN_MPI_PEER = re.compile(r"Local PID: +\d+\s+Peer host: +(?P<host>\S+)")
_OPEN_MPI_SIGNAL = re.compile(
    r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on\s+signal (?P<signal>\d+)"
)
_HYDRA_DEATH = re.compile(r"PID (?P<pid>\d+) RUNNING AT (?P<host>\S+)\s+=\s+EXIT CODE: (?P<code>\d+)")
"""Of a process that a signal ended Hydra gives the signal's number as exit code."""


def _signal_text(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _unreachable(found: re.Match[str]) -> MLPStorageError:
    return RunError(
        f"host {found['host']} cannot be reached: {found['why'].strip()}; no rank has begun. Check the name in "
        f"--hosts, and that `ssh {found['host']}` works from here without a password"
    )


def _no_program(found: re.Match[str]) -> MLPStorageError:
    return MissingFileError(
        f"host {found['host']} has no {found['program']} that can be run; no rank has begun. Install mlpstorage at the "
        "same path on every host"
    )


def _no_module(found: re.Match[str]) -> MLPStorageError:
    return MissingPackageError(found["module"].split(".")[0])


def _no_daemon(found: re.Match[str]) -> MLPStorageError:
    return MissingFileError(
        f"host {found['host']} has no {found['program']}, the daemon of the MPI launcher; no rank has begun. Install "
        "the same MPI at the same path on every host"
    )


def _root(_found: re.Match[str]) -> MLPStorageError:
    return ConfigurationError("the MPI launcher does not run as root; add --allow-run-as-root, or run as another user")


def _denied(found: re.Match[str]) -> MLPStorageError:
    return AccessError(
        f"host {found['host']} lets nobody in: {found['why']}; no rank has begun. Set up a key, so that "
        f"`ssh {found['host']}` works from here without a password"
    )


def _told(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)


_START_FAILURES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], MLPStorageError]], ...] = (
    (_told(r"detected an attempt to run as root"), _root),
    (_told(r"ssh: Could not resolve hostname (?P<host>\S+): (?P<why>.+)$"), _unreachable),
    (_told(r"ssh: connect to host (?P<host>\S+) port \d+: (?P<why>.+)$"), _unreachable),
    (_told(r"^(?:\S+@)?(?P<host>\S+): (?P<why>Permission denied \(.+)$"), _denied),
    (_told(r"Executable: (?P<program>\S+)\s+Node: (?P<host>\S+)"), _no_program),
    (_told(r"\[proxy:\d+@(?P<host>\S+)\] .*execvp error on file (?P<program>\S+) \("), _no_program),
    (_told(r"^\S+: No module named '?(?P<module>[\w.]+)"), _no_module),
    (_told(r"cannot import name '\S+' from '(?P<module>[\w.]+)' \(unknown location\)"), _no_module),
    (_told(r"(?P<program>prted|orted|hydra_pmi_proxy): [\s\S]*Remote host:\s+(?P<host>\S+)"), _no_daemon),
)
