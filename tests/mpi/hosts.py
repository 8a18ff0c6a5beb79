"""Hosts for tests: network namespaces with a name, an address and a file system of their own, joined by a bridge.

One host launches, at 10.77.31.1; `nodea` and `nodeb` run ranks, at 10.77.31.2 and .3. Everything lives in namespaces
that end with the process which holds them, and that one ends with the tests: nothing is left whatever happens. A
stand-in for ssh enters a host, with the small environment and the session of its own that a real one gives, and fails
as it does where a host cannot be reached.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

NETWORK: Final = "10.77.31"
LAUNCHER: Final = "launcher"
NODES: Final = {"nodea": f"{NETWORK}.2", "nodeb": f"{NETWORK}.3"}
UNKNOWN: Final = f"{NETWORK}.99"
"""An address that nobody has."""

_NSENTER, _UNSHARE = "nsenter", "unshare"  # wherever they are
_TOOLS = ("ip", "unshare", "nsenter", "mount", "setsid")
_PATIENCE_S = 60.0
_ROOM_MIB = 1024
"""Size of a host's own file system."""

_AGENT = """\
    #!/bin/bash
    # Stands in for ssh: agent [options] HOST WORD...
    while [[ ${1-} == -* ]]; do case $1 in -l | -p | -o) shift 2 ;; *) shift ;; esac; done
    host=$1; shift
    case $host in
    @cases@
    esac
    # Nobody listens there: that a connection is refused shows that the host can be reached.
    said=$(timeout 10 bash -c "exec 3<>/dev/tcp/$host/22" 2>&1)
    case $said in
    *refused*) ;;
    *) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255 ;;
    esac
    exec nsenter --target "$holder" --net --uts --ipc --mount --pid --wd=/ \\
      env -i HOME=/root TMPDIR=@place@/tmp PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \\
      setsid --wait /bin/bash -c "$*"
"""


class UnavailableError(Exception):
    """Such hosts cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host: the process that holds its namespaces, and is their first, and the one that made them."""

    name: str
    pid: int
    maker_pid: int

    def path(self, path: Path) -> Path:
        """Where this process finds a path of the host."""
        return Path(f"/proc/{self.pid}/root") / path.relative_to("/")

    def processes(self) -> list[psutil.Process]:
        """What runs on the host, without its first process, and without what has ended and waits to be noticed."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            namespace = Path(f"/proc/{self.pid}/ns/net").readlink()
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    same = Path(f"/proc/{process.pid}/ns/net").readlink() == namespace
                    own = process.pid in {self.pid, self.maker_pid}
                    if same and not own and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run on the host, in the order of their start."""
        return sorted(filter(_is_rank, self.processes()), key=lambda process: process.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """Three hosts: one that launches, two for ranks.

    `place` is on each of them a file system of its own, but for the launching host: there it is that of the tests.
    """

    place: Path
    launcher: Host
    nodes: Mapping[str, Host]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def agent(self) -> Path:
        """The ssh stand-in."""
        return self.place / "agent"

    def start(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command on the launching host."""
        process = subprocess.Popen(
            [_NSENTER, f"--target={self.launcher.pid}", "--net", "--uts", "--ipc", "--mount", *command],
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def set_link(self, name: str, state: str) -> None:
        """Take the link of a node `up` or `down`."""
        _in(self.launcher, f"ip link set v{name} {state}")

    def survivors(self) -> list[str]:
        """Command lines of what runs on any host."""
        lines = []
        for host in (self.launcher, *self.nodes.values()):
            for process in host.processes():
                with contextlib.suppress(psutil.Error):
                    lines.append(f"{host.name}: {shlex.join(process.cmdline())[:200]}")
        return lines

    def end(self) -> None:
        """Kill what runs on any host, and raise the links."""
        for host in (self.launcher, *self.nodes.values()):
            for process in host.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        for started in self.started:
            started.communicate(timeout=_PATIENCE_S)
        self.started.clear()
        for name in self.nodes:
            self.set_link(name, "up")


@contextlib.contextmanager
def running(place: Path) -> Iterator[Hosts]:
    """The hosts, until the block is left.

    Raises:
        UnavailableError: This machine cannot have them.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        raise UnavailableError("only root can make hosts as network namespaces")
    if missing:
        raise UnavailableError(
            f"hosts as network namespaces need {', '.join(missing)}: apt-get install iproute2 util-linux"
        )
    (place / "tmp").mkdir()
    names = {LAUNCHER: f"{NETWORK}.1", **NODES}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    (place / "hosts").write_text("".join(f"{line}\n" for line in lines))
    with contextlib.ExitStack() as ends:
        launcher = _held(ends, LAUNCHER, place, own=False)
        nodes = {name: _held(ends, name, place, own=True) for name in NODES}
        _in(launcher, "ip link add kv type bridge", f"ip address add {NETWORK}.1/24 dev kv", "ip link set kv up")
        for name, address in NODES.items():
            _in(launcher, f"ip link add v{name} type veth peer name eth0 netns {nodes[name].pid}")
            _in(launcher, f"ip link set v{name} master kv up")
            _in(nodes[name], f"ip address add {address}/24 dev eth0", "ip link set eth0 up")
        hosts = Hosts(place=place, launcher=launcher, nodes=nodes)
        _write_agent(hosts)
        try:
            yield hosts
        finally:
            hosts.end()


def _held(ends: contextlib.ExitStack, name: str, place: Path, *, own: bool) -> Host:
    """Make a host; it ends when its first process has no standard input any more."""
    steps = [f"hostname {name}", "ip link set lo up", f"mount --bind {place}/hosts /etc/hosts"]
    steps += ["mount -t tmpfs shm /dev/shm"]
    if own:
        steps += [f"mount -t tmpfs -o size={_ROOM_MIB}m {name} {place}", f"mkdir {place / 'tmp'}"]
    script = "; ".join(["set -e", *steps, "echo ready", "read"])
    # Not that of the launching host: the ssh stand-in there has to see the others' first processes.
    processes = ["--pid", "--mount-proc"] if own else []
    flags = ["--net", "--uts", "--ipc", "--mount", *processes, "--fork", "--kill-child"]
    holder = subprocess.Popen(
        [_UNSHARE, *flags, "bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    ends.callback(_end, holder)
    assert holder.stdout is not None
    assert holder.stderr is not None
    if holder.stdout.readline() != b"ready\n":
        raise UnavailableError(f"no namespaces: {holder.stderr.read().decode().strip()}")
    (first,) = psutil.Process(holder.pid).children()
    return Host(name, first.pid, holder.pid)


def _end(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.communicate(timeout=_PATIENCE_S)


def _write_agent(hosts: Hosts) -> None:
    cases = [f"{address} | {name}) holder={hosts.nodes[name].pid} ;;" for name, address in NODES.items()]
    cases += [f"{NETWORK}.*) holder=0 ;;"]
    cases += ['*) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;']
    text = textwrap.dedent(_AGENT).replace("@cases@", "\n".join(cases)).replace("@place@", str(hosts.place))
    # Open MPI looks for it on every host, although only the launching one uses it.
    for agent in (hosts.agent, *(host.path(hosts.agent) for host in hosts.nodes.values())):
        agent.write_text(text)
        agent.chmod(0o755)


def _in(host: Host, *commands: str) -> None:
    for command in commands:
        words = [_NSENTER, f"--target={host.pid}", "--net", *shlex.split(command)]
        subprocess.run(words, check=True, capture_output=True, timeout=_PATIENCE_S)


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "mlpstorage.kvcache.rank" in words and words[0] == sys.executable
    return False


def eventually(condition: Callable[[], object], what: str) -> None:
    """Return as soon as `condition` is true; fail where it stays false."""
    deadline_s = time.monotonic() + _PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        pause.wait(0.05)
