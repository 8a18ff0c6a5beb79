"""The mpirun command of a run: a pure function of hosts and options, and where mpirun is found.

The words are those of Open MPI 4 and 5. Other dialects belong beside `mpi_command`, chosen by the caller.
"""

import ipaddress
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlpstorage.errors import ConfigurationError, MissingFileError, UsageError
from mlpstorage.spec.hosts import Host

INSTALL_HINT = 'install it with `pip install "mlpstorage[mpi]"` or name another with --mpi-bin'


def mpi_command(
    *,
    mpi_bin: str,
    num_processes: int,
    hosts: Sequence[Host],
    oversubscribe: bool,
    allow_run_as_root: bool,
    mpi_params: Sequence[str],
    program: Sequence[str],
) -> list[str]:
    """Argv that starts `num_processes` ranks of `program` on `hosts`.

    `--bind-to none`: Open MPI 5 refuses to bind more ranks than there are cores, and a storage benchmark's I/O threads
    must not share one core. `--map-by node` deals the ranks out to the hosts in turn.

    Args:
        mpi_bin: Name or path of the launcher; it becomes the first word as it stands.
        num_processes: Ranks of the whole run, at least one for each host.
        hosts: At least one; where slots are None, ranks are split evenly, the first hosts taking the remainder.
        oversubscribe: Let hosts run more ranks than they have slots.
        allow_run_as_root: Open MPI refuses root without it.
        mpi_params: Further options, as `split_mpi_params` gives them.
        program: Argv of a rank.

    Raises:
        ConfigurationError: More ranks than slots without `oversubscribe`, fewer ranks than hosts, or an IPv6 address.
    """
    slots = _slots_of_hosts(num_processes, hosts, oversubscribe=oversubscribe)
    command = [mpi_bin, "-n", str(num_processes)]
    command += ["-host", ",".join(f"{_host_word(host.name)}:{count}" for host, count in zip(hosts, slots, strict=True))]
    command += ["--bind-to", "none", "--map-by", "socket" if len(hosts) == 1 else "node"]
    if oversubscribe:
        command.append("--oversubscribe")
    if allow_run_as_root:
        command.append("--allow-run-as-root")
    return [*command, *mpi_params, *program]


def _slots_of_hosts(num_processes: int, hosts: Sequence[Host], *, oversubscribe: bool) -> list[int]:
    """Slots of each host: those given, and for the others an even share of the ranks that are left."""
    if not hosts:
        raise ConfigurationError("--hosts: no host to run on; name at least one")
    if num_processes < len(hosts):
        raise ConfigurationError(
            f"--num-processes {num_processes} leaves hosts without a rank: --hosts names {len(hosts)}; "
            f"use --num-processes {len(hosts)} or more, or fewer hosts"
        )
    given = sum(host.slots or 0 for host in hosts)
    open_hosts = sum(host.slots is None for host in hosts)
    # At least one rank each, also where the given slots could hold all ranks.
    share, remainder = divmod(max(num_processes - given, open_hosts), open_hosts or 1)
    slots: list[int] = []
    for host in hosts:
        if host.slots is not None:
            slots.append(host.slots)
            continue
        slots.append(share + (remainder > 0))
        remainder -= remainder > 0
    if num_processes > sum(slots) and not oversubscribe:
        raise ConfigurationError(
            f"--num-processes {num_processes} is more than the {sum(slots)} slots of --hosts; "
            "give the hosts more slots (name:slots), lower --num-processes, or add --oversubscribe"
        )
    return slots


def _host_word(name: str) -> str:
    """`name` as `-host` can take it.

    Open MPI cuts every word of `-host` at its first colon to find the slots, brackets or not: given "[::1]:2", 5.0.11
    asks ssh for a host "[". No IPv6 address gets through; the loopback one has a name that does.
    """
    if ":" not in name:
        return name
    if ipaddress.IPv6Address(name).is_loopback:
        return "localhost"
    raise ConfigurationError(
        f"--hosts {name}: Open MPI takes no IPv6 address as a host; "
        "give the host a name in /etc/hosts or DNS, and use that"
    )


def split_mpi_params(values: Sequence[Sequence[str]] | None) -> list[str]:
    """Words of all `--mpi-params`, in their order.

    `--mpi-params a b` arrives as `[["a", "b"]]` and `--mpi-params="--mca x y"` as `[["--mca x y"]]`, so each value is
    cut as a shell would cut it; a word with blanks in it needs quotes of its own.

    Raises:
        UsageError: A quotation mark without its partner.
    """
    words: list[str] = []
    for value in (value for group in values or () for value in group):
        try:
            words += shlex.split(value)
        except ValueError as error:
            raise UsageError(f"--mpi-params {value!r}: {error}; close the quotation") from error
    return words


def mpi_version(launcher: str) -> str | None:
    """First line of what the launcher at this path says of its version; None where it says nothing."""
    try:
        told = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = told.stdout.strip().splitlines()
    return lines[0] if lines else None


def mpi_environment() -> dict[str, str]:
    """This process's environment, with the Python interpreter's directory first in PATH.

    The registry's MPI wheels put mpirun there, and a virtual environment need not be activated.
    """
    environment = dict(os.environ)
    own = Path(sys.executable).parent if sys.executable else None
    search = [str(own)] if own else []
    environment["PATH"] = os.pathsep.join([*search, environment.get("PATH", os.defpath)])
    return environment


def find_mpi(mpi_bin: str) -> str:
    """Path of the launcher: `mpi_bin` itself if it is a path, else looked up beside the interpreter, then in PATH.

    Raises:
        MissingFileError: There is no such program.
    """
    found = shutil.which(mpi_bin, path=mpi_environment()["PATH"])
    if found is None:
        where = "no executable file" if os.path.dirname(mpi_bin) else "not found beside Python or in PATH"  # noqa: PTH120 - Path("./mpirun") loses the "./"
        raise MissingFileError(f"--mpi-bin {mpi_bin}: {where}; {INSTALL_HINT}")
    return found
