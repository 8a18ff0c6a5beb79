"""The MPI launchers that tests use: Open MPI 5 beside Python, Debian's Open MPI 4, and MPICH from the registry.

MPICH's wheel and Open MPI's both bring a `mpirun`, so that MPICH is installed once a machine into a place of its own in
the user's cache.
"""

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlpstorage.errors import MissingFileError
from mlpstorage.launch.mpi import Dialect, dialect_of, find_mpi, told_version

MPICH_VERSION: Final = "5.0.2"
_INSTALL_LIMIT_S: Final = 170.0
_DEBIAN: Final = Path("/usr/bin/mpirun.openmpi")


class UnavailableError(Exception):
    """The launcher cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """A launcher: its path, its dialect, and the variable that tells it of an ssh stand-in."""

    path: Path
    dialect: Dialect
    agent_variable: str

    def environment(self, agent: Path) -> Mapping[str, str]:
        """What it needs in its environment to reach hosts by `agent`."""
        return {self.agent_variable: str(agent)}


def launcher(dialect: Dialect) -> Launcher:
    """The launcher of a dialect.

    Raises:
        UnavailableError: It cannot be had.
    """
    if importlib.util.find_spec("mpi4py") is None:
        raise UnavailableError("mpi4py is not installed: install mlpstorage[mpi]")
    match dialect:
        case Dialect.OPEN_MPI_5:
            return _checked(Launcher(_beside_python(), dialect, "PRTE_MCA_plm_ssh_agent"))
        case Dialect.OPEN_MPI_4:
            if not _DEBIAN.exists():
                raise UnavailableError("Debian's Open MPI 4 is not installed: apt-get install openmpi-bin")
            return _checked(Launcher(_DEBIAN, dialect, "OMPI_MCA_plm_rsh_agent"))
        case Dialect.MPICH:
            return _checked(Launcher(_mpich() / "bin" / "mpiexec", dialect, "HYDRA_LAUNCHER_EXEC"))


def _checked(found: Launcher) -> Launcher:
    told = told_version(str(found.path))
    if told is None or dialect_of(told) is not found.dialect:
        raise UnavailableError(f"{found.path} is not the launcher of {found.dialect}: it says {told!r}")
    return found


def _beside_python() -> Path:
    try:
        return Path(find_mpi("mpirun"))
    except MissingFileError as error:
        raise UnavailableError(str(error)) from error


def _mpich() -> Path:
    """Where MPICH is installed; installs it where it is not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlpstorage-tests"
    place = cache / f"mpich-{MPICH_VERSION}"
    if not (place / "installed").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "mpich.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "installed").exists():
                _install(place)
    return place


def _install(place: Path) -> None:
    # Not --target, which leaves out what is beside Python packages in a `lib`.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
    try:
        subprocess.run(
            [*pip, "--prefix", str(place), f"mpich=={MPICH_VERSION}"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_INSTALL_LIMIT_S,
        )
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"MPICH cannot be installed: {error.stderr.strip()[-300:]}") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError("MPICH cannot be installed in time") from error
    (place / "installed").touch()
