"""The mpirun command of a run, a pure function of hosts, options and the launcher's dialect; where mpirun is found."""

import enum
import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlpstorage.errors import ConfigurationError, MissingFileError, UsageError
from mlpstorage.spec.hosts import Host

INSTALL_HINT = 'install it with `pip install "mlpstorage[mpi]"` or name another with --mpi-bin'


class Dialect(enum.StrEnum):
    """Whose words a launcher understands."""

    OPEN_MPI_4 = "Open MPI 4"
    OPEN_MPI_5 = "Open MPI 5"
    MPICH = "MPICH"


DEFAULT_DIALECT = Dialect.OPEN_MPI_5
"""That of the extra `mpi`: what a plan shows where there is no launcher to ask."""

_OPEN_MPI_VERSION = re.compile(r"\(Open MPI\) v?(\d+)\.")
_FIRST_PRRTE_MAJOR = 5
"""Since Open MPI 5 its launcher is PRRTE's."""


def dialect_of(version: str) -> Dialect | None:
    """The dialect of the launcher that says this of its version; None where it is none that is known.

    Hydra is MPICH's launcher, and that of libraries made from it, such as Intel's and MVAPICH.
    """
    found = _OPEN_MPI_VERSION.search(version)
    if found is not None:
        return Dialect.OPEN_MPI_5 if int(found[1]) >= _FIRST_PRRTE_MAJOR else Dialect.OPEN_MPI_4
    # The same programs under the names of the run-time systems within: orterun, Debian's mpirun.openmpi, prterun.
    if "(OpenRTE)" in version:
        return Dialect.OPEN_MPI_4
    if "(PRRTE)" in version:
        return Dialect.OPEN_MPI_5
    if "HYDRA" in version or "Intel(R) MPI Library" in version:
        return Dialect.MPICH
    return None


def unknown_launcher(launcher: str, told: str | None) -> ConfigurationError:
    """The error of a launcher whose dialect is not known."""
    said = "tells no version" if told is None else f"says it is {told!r}"
    return ConfigurationError(
        f"--mpi-bin: {launcher} {said}; those of Open MPI 4 and 5 and of MPICH (Hydra) are known: {INSTALL_HINT}"
    )


def check_root(dialect: Dialect, *, allowed: bool, environment: Mapping[str, str]) -> None:
    """Refuse early what the launcher would refuse.

    Raises:
        ConfigurationError: Root starts Open MPI without a word that it may.
    """
    confirmed = all(environment.get(name) == "1" for name in _ROOT_VARIABLES)
    if os.geteuid() == 0 and dialect is not Dialect.MPICH and not allowed and not confirmed:
        raise ConfigurationError(
            f"{dialect} does not run as root unless told to: add --allow-run-as-root, or run as another user"
        )


_ROOT_VARIABLES = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
"""Both set to 1 do what `--allow-run-as-root` does."""


def check_names(dialect: Dialect, hosts: Sequence[Host]) -> None:
    """Refuse a host whose name nobody knows, where the launcher would leave daemons on the other hosts.

    Hydra ends at the first ssh that fails; a daemon that another ssh starts a moment later looks for it for minutes.

    Raises:
        ConfigurationError: A name cannot be resolved.
    """
    for host in hosts if dialect is Dialect.MPICH else ():
        try:
            socket.getaddrinfo(host.name, None)
        except socket.gaierror as error:
            raise ConfigurationError(
                f"host {host.name} cannot be reached: {error.strerror}; nothing was started. Check the name in --hosts"
            ) from error


def mpi_command(
    *,
    mpi_bin: str,
    num_processes: int,
    hosts: Sequence[Host],
    oversubscribe: bool,
    allow_run_as_root: bool,
    mpi_params: Sequence[str],
    program: Sequence[str],
    dialect: Dialect = DEFAULT_DIALECT,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Argv that starts `num_processes` ranks of `program` on `hosts`.

    Args:
        mpi_bin: Name or path of the launcher; it becomes the first word as it stands.
        num_processes: Ranks of the whole run, at least one for each host.
        hosts: At least one; where slots are None, ranks are split evenly, the first hosts taking the remainder.
        oversubscribe: Let hosts run more ranks than they have slots.
        allow_run_as_root: Open MPI refuses root without it.
        mpi_params: Further options, as `split_mpi_params` gives them.
        program: Argv of a rank.
        dialect: Whose words the launcher understands.
        environment: Variables that ranks on every host get; one that `mpi_params` set is theirs.

    Raises:
        ConfigurationError: More ranks than slots without `oversubscribe`, fewer ranks than hosts, or an IPv6 address.
    """
    slots = slots_of_hosts(num_processes, hosts, oversubscribe=oversubscribe)
    names = [_host_word(host.name) for host in hosts]
    if dialect is Dialect.MPICH:
        words = mpich_options(num_processes, names, slots)
    else:
        words = open_mpi_options(
            num_processes, names, slots, oversubscribe=oversubscribe, allow_run_as_root=allow_run_as_root
        )
    handed = {name: value for name, value in (environment or {}).items() if not _sets(mpi_params, name)}
    return [mpi_bin, *words, *mpi_params, *_ENVIRONMENT_OPTIONS[dialect](handed), *program]


def open_mpi_options(
    num_processes: int, names: Sequence[str], slots: Sequence[int], *, oversubscribe: bool, allow_run_as_root: bool
) -> list[str]:
    """Options of mpirun, the same for Open MPI 4 and 5.

    `--bind-to none`: Open MPI 5 refuses to bind more ranks than there are cores, and a storage benchmark's I/O threads
    must not share one core. `--map-by node` deals the ranks out to the hosts in turn.
    """
    hosts = ",".join(f"{name}:{count}" for name, count in zip(names, slots, strict=True))
    mapping = "socket" if len(names) == 1 else "node"
    words = ["-n", str(num_processes), "-host", hosts, "--bind-to", "none", "--map-by", mapping]
    return words + ["--oversubscribe"] * oversubscribe + ["--allow-run-as-root"] * allow_run_as_root


def mpich_options(num_processes: int, names: Sequence[str], slots: Sequence[int]) -> list[str]:
    """Options of Hydra's mpiexec.

    Hydra fills one host before it takes the next, so that each is given as many as it is to run. It has no flag for
    oversubscribing, which it always does, nor for root, whom it never refuses.
    """
    counts = ranks_of_hosts(num_processes, slots)
    hosts = ",".join(f"{name}:{count}" for name, count in zip(names, counts, strict=True))
    return ["-n", str(num_processes), "-hosts", hosts, "-bind-to", "none"]


def ranks_of_hosts(num_processes: int, slots: Sequence[int]) -> list[int]:
    """How many ranks each host runs: dealt out in turn to hosts with a free slot, then to all in turn."""
    counts = [0] * len(slots)
    left = num_processes
    while left:
        free = [place for place, count in enumerate(counts) if count < slots[place]] or range(len(slots))
        for place in free[:left]:
            counts[place] += 1
        left -= min(left, len(free))
    return counts


def _open_mpi_environment(variables: Mapping[str, str]) -> list[str]:
    return [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]


def _mpich_environment(variables: Mapping[str, str]) -> list[str]:
    return [word for name, value in variables.items() for word in ("-genv", name, value)]


_ENVIRONMENT_OPTIONS: Mapping[Dialect, Callable[[Mapping[str, str]], list[str]]] = {
    Dialect.OPEN_MPI_4: _open_mpi_environment,
    Dialect.OPEN_MPI_5: _open_mpi_environment,
    Dialect.MPICH: _mpich_environment,
}


def _sets(mpi_params: Sequence[str], name: str) -> bool:
    """Whether launcher parameters name an environment variable."""
    return any(word.partition("=")[0] == name for word in mpi_params)


def slots_of_hosts(num_processes: int, hosts: Sequence[Host], *, oversubscribe: bool) -> list[int]:
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

    Every dialect cuts a host's word at its first colon to find the slots, brackets or not: given "[::1]:2", Open MPI
    5.0.11 and 4.1.4 and MPICH 5.0.2 look for a host "[". No IPv6 address gets through; the loopback one has a name that
    does.
    """
    if ":" not in name:
        return name
    if ipaddress.IPv6Address(name).is_loopback:
        return "localhost"
    raise ConfigurationError(
        f"--hosts {name}: no MPI launcher takes an IPv6 address as a host (Open MPI and MPICH read it as name:slots); "
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


def told_version(launcher: str) -> str | None:
    """What the launcher at this path says of its version; None where it says nothing. Contacts no host."""
    try:
        told = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def version_line(told: str) -> str:
    """What a launcher says of its version, in one line: `mpirun (Open MPI) 5.0.11`, `MPICH (Hydra) 5.0.2`."""
    hydra = re.search(r"HYDRA build details:\s+Version:\s+(\S+)", told)
    return told.splitlines()[0] if hydra is None else f"MPICH (Hydra) {hydra[1]}"


_LIBRARY = {Dialect.OPEN_MPI_4: "libmpi.so.40", Dialect.OPEN_MPI_5: "libmpi.so.40", Dialect.MPICH: "libmpi.so.12"}
"""The library that programs of each are linked to: by its ABI's number."""


def mpi_library(launcher: str, dialect: Dialect) -> Path | None:
    """The MPI library that belongs to the launcher at this path; None where it is not found.

    mpi4py takes the library that is installed beside Python before any other. Ranks with another library than the
    launcher's do not find each other: each is then a world of its own.
    """
    prefix = Path(os.path.abspath(launcher)).parent.parent  # noqa: PTH100 - a link's own place, not its target's
    multiarch = getattr(sys.implementation, "_multiarch", "")
    for directory in (prefix / "lib", prefix / "lib64", prefix / "lib" / multiarch):
        if (directory / _LIBRARY[dialect]).is_file():
            return directory / _LIBRARY[dialect]
    return None


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
