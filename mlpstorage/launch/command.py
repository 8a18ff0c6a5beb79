"""The command that starts a planned run."""

import shlex
import sys

from mlpstorage.launch.mpi import mpi_command, mpi_environment, split_mpi_params
from mlpstorage.plan.kvcache import Layout
from mlpstorage.spec.kvcache import KVCacheSpec, rank_arguments

RANK_MODULE = "mlpstorage.kvcache.rank"


def rank_command(spec: KVCacheSpec, layout: Layout, *, run_id: str | None) -> list[str]:
    """The argv that starts the run: that of the one rank, or of the MPI launcher with the ranks' argv in it.

    Every rank gets the same words; it knows its number from the MPI library. Ranks run under `python -m mpi4py`, so
    that one that raises ends them all. `run_id` is None while it is not known.
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
    if not layout.uses_mpi:
        return program
    return mpi_command(
        mpi_bin=spec.mpi_bin,
        num_processes=layout.ranks,
        hosts=spec.parsed_hosts,
        oversubscribe=spec.oversubscribe,
        allow_run_as_root=spec.allow_run_as_root,
        mpi_params=split_mpi_params([list(part) for part in spec.mpi_params]),
        program=program,
    )


def rank_environment() -> dict[str, str]:
    """The environment in which ranks are started.

    numpy's OpenBLAS starts threads that spin beside the I/O, and nothing here uses it: one, unless the user says
    otherwise. It took a fifth of the client's processor time. An MPI launcher hands it to ranks on this host only.
    """
    return {"OPENBLAS_NUM_THREADS": "1"} | mpi_environment()


def shown(command: list[str]) -> str:
    """A command as one would type it; only for showing, nothing is given to a shell."""
    return shlex.join(command)
