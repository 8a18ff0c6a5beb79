"""The command that starts a planned run."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping

from mlpstorage.errors import MissingFileError
from mlpstorage.launch.mpi import (
    DEFAULT_DIALECT,
    Dialect,
    find_mpi,
    mpi_command,
    mpi_environment,
    mpi_library,
    ranks_of_hosts,
    slots_of_hosts,
    split_mpi_params,
)
from mlpstorage.plan.kvcache import Layout
from mlpstorage.spec.kvcache import KVCacheSpec, rank_arguments

RANK_MODULE = "mlpstorage.kvcache.rank"


def rank_command(
    spec: KVCacheSpec,
    layout: Layout,
    *,
    run_id: str | None,
    dialect: Dialect = DEFAULT_DIALECT,
    handed: Mapping[str, str] | None = None,
) -> list[str]:
    """The argv that starts the run: that of the one rank, or of the MPI launcher with the ranks' argv in it.

    Every rank gets the same words; it knows its number from the MPI library. Ranks run under `python -m mpi4py`, so
    that one that raises ends them all. `run_id` is None while it is not known. `handed` are the variables that ranks on
    other hosts get.
    """
    if spec.kvcache_bin_path is not None:
        program = [str(spec.kvcache_bin_path)]
    elif layout.uses_mpi:
        program = [sys.executable, "-m", "mpi4py", "-m", RANK_MODULE]
    else:
        program = [sys.executable, "-m", RANK_MODULE]
    program += rank_arguments(spec)
    if run_id is not None:
        program += ["--run-id", run_id]
    return _launched(spec, layout, program, dialect, handed) if layout.uses_mpi else program


def _launched(
    spec: KVCacheSpec, layout: Layout, program: list[str], dialect: Dialect, handed: Mapping[str, str] | None
) -> list[str]:
    """The argv of the launcher that starts a program as often as there are ranks, where they would run."""
    return mpi_command(
        mpi_bin=spec.mpi_bin,
        num_processes=layout.ranks,
        hosts=spec.parsed_hosts,
        oversubscribe=spec.oversubscribe,
        allow_run_as_root=spec.allow_run_as_root,
        mpi_params=split_mpi_params([list(part) for part in spec.mpi_params]),
        program=program,
        dialect=dialect,
        environment=handed,
    )


_LACKS = "import importlib.util as u, os, sys; s = u.find_spec(sys.argv[1]); n = os.uname().nodename + chr(10)\n"
_LACKS += "os.write(1, b'' if s is not None and s.origin else ('lacks ' + n).encode())"
"""A program that tells its host's name where a package is missing, or is an empty directory."""

_LACKS_LIMIT_S = 15.0


def hosts_without(package: str, spec: KVCacheSpec, layout: Layout, dialect: Dialect) -> list[str]:
    """The hosts of a run whose Python lacks a package; none where that cannot be found out."""
    program = [sys.executable, "-c", _LACKS, package]
    command = _launched(spec, layout, program, dialect, None)
    try:
        asked = subprocess.run(
            command, env=rank_environment(), capture_output=True, text=True, timeout=_LACKS_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(re.findall(r"^lacks (\S+)$", asked.stdout, re.MULTILINE)))


def handed_environment(mpi_bin: str, dialect: Dialect) -> dict[str, str]:
    """The variables that a launcher hands to ranks on every host.

    numpy's OpenBLAS starts threads that spin beside the I/O, and nothing here uses it: one, unless the user says
    otherwise. It took a fifth of the client's processor time. A launcher that is not the one beside Python has its own
    MPI library, which mpi4py must be told of; see `mpi_library`.
    """
    handed = {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")}
    told = os.environ.get("MPI4PY_LIBMPI")
    if told is not None:
        return handed | {"MPI4PY_LIBMPI": told}
    try:
        launcher = find_mpi(mpi_bin)
    except MissingFileError:
        return handed
    library = mpi_library(launcher, dialect)
    if library is not None and os.path.dirname(launcher) != os.path.dirname(sys.executable):  # noqa: PTH120 - of strings
        handed["MPI4PY_LIBMPI"] = str(library)
    return handed


def ranks_on_host(spec: KVCacheSpec, layout: Layout) -> int:
    """The most ranks that a host runs."""
    slots = slots_of_hosts(layout.ranks, spec.parsed_hosts, oversubscribe=spec.oversubscribe)
    return max(ranks_of_hosts(layout.ranks, slots))


def rank_environment() -> dict[str, str]:
    """The environment in which the ranks of this host, or their launcher, are started.

    Open MPI hands its own variables to all ranks. One that waits inside MPI is to leave its core to those that work,
    which may be its own I/O threads.
    """
    return {"OPENBLAS_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"} | mpi_environment()


def shown(command: list[str]) -> str:
    """A command as one would type it; only for showing, nothing is given to a shell."""
    return shlex.join(command)
