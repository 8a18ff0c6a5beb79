"""A real S3 server on loopback for tests: OpenStack Swift with its S3 API, one node, its data on disk.

Installed once a machine from the package registry, into a virtual environment in the user's cache. Beside it stands a
second, small S3 client: tests make buckets, plant damage and look at raw objects by a path that is not the product's.
"""

import contextlib
import fcntl
import getpass
import hashlib
import hmac
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode

SWIFT_VERSION: Final = "2.38.3"
_PACKAGES = (f"swift=={SWIFT_VERSION}", "setuptools")  # Swift finds its filters with setuptools' pkg_resources
_SERVERS = ("account", "container", "object", "proxy")
_FILTERS = ("catch_errors", "gatekeeper", "listing_formats", "bulk", "copy", "slo", "dlo")
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 10.0
_INSTALL_LIMIT_S = 170.0
_XATTR_BYTES = 2048
"""About what Swift keeps beside an object in extended attributes."""

_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


class UnavailableError(Exception):
    """The server cannot be had on this machine; the message says why."""


class RefusedError(Exception):
    """The server answered a raw request with an error status."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body[:500].decode(errors='replace')}")
        self.status = status


@dataclass(frozen=True, slots=True)
class RawClient:
    """S3 in its simplest form: one signed HTTP request at a time, on a connection of its own."""

    port: int
    access_key: str = "test:tester"
    secret_key: str = "testing"
    region: str = "us-east-1"

    def request(self, method: str, path: str, query: Mapping[str, str] | None = None, body: bytes = b"") -> bytes:
        """Do a request and return the answer's body.

        Raises:
            RefusedError: The answer's status is not 2xx.
        """
        path = quote(path, safe="/-_.~")
        query_text = urlencode(sorted((query or {}).items()), quote_via=quote, safe="-_.~")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_START_LIMIT_S)
        try:
            headers = self._signed(method, path, query_text, hashlib.sha256(body).hexdigest())
            connection.request(method, f"{path}?{query_text}", body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            raise RefusedError(answer.status, content)
        return content

    def _signed(self, method: str, path: str, query: str, body_sha256: str) -> dict[str, str]:
        """Headers of a request with AWS Signature Version 4 (the "Authorization header" form of its documentation)."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        day = moment[:8]
        headers = {"host": f"127.0.0.1:{self.port}", "x-amz-content-sha256": body_sha256, "x-amz-date": moment}
        names = ";".join(sorted(headers))
        header_lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = f"{method}\n{path}\n{query}\n{header_lines}\n{names}\n{body_sha256}"
        scope = f"{day}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
        key = f"AWS4{self.secret_key}".encode()
        for part in (day, self.region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
        credential = f"Credential={self.access_key}/{scope}"
        headers["authorization"] = f"AWS4-HMAC-SHA256 {credential},SignedHeaders={names},Signature={signature}"
        return headers

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket."""
        self.request("PUT", f"/{bucket}")

    def put(self, bucket: str, key: str, body: bytes) -> None:
        """Store an object as given."""
        self.request("PUT", f"/{bucket}/{key}", body=body)

    def get(self, bucket: str, key: str) -> bytes:
        """A whole object."""
        return self.request("GET", f"/{bucket}/{key}")

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object."""
        self.request("DELETE", f"/{bucket}/{key}")

    def sizes(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the objects whose key begins with `prefix`, by key."""
        found: dict[str, int] = {}
        more = {"list-type": "2", "prefix": prefix}
        while True:
            root = ET.fromstring(self.request("GET", f"/{bucket}", more))  # noqa: S314 - from our own server
            for entry in root.iter(f"{_NAMESPACE}Contents"):
                found[entry.findtext(f"{_NAMESPACE}Key", "")] = int(entry.findtext(f"{_NAMESPACE}Size", "-1"))
            token = root.findtext(f"{_NAMESPACE}NextContinuationToken")
            if not token:
                return found
            more["continuation-token"] = token


class S3Server:
    """A Swift server below a directory; made by `running`.

    Attributes:
        endpoint: Its address for S3 clients.
        raw: A client that shares no code with the product.
    """

    def __init__(self, directory: Path, environment: Path, ports: Mapping[str, int]) -> None:
        self.endpoint = f"http://127.0.0.1:{ports['proxy']}"
        self.raw = RawClient(ports["proxy"])
        self._directory = directory
        self._programs = environment / "bin"
        self._ports = ports
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The variables that tell S3 clients of the server and its one user."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.raw.access_key,
            "AWS_SECRET_ACCESS_KEY": self.raw.secret_key,
            "AWS_REGION": self.raw.region,
        }

    def new_bucket(self) -> str:
        """Make a bucket that nothing else uses, and return its name."""
        name = f"test-{secrets.token_hex(6)}"
        self.raw.create_bucket(name)
        return name

    def start(self, *names: str) -> None:
        """Start the processes of that name ("proxy", "object" ...), all without one, and wait until they listen.

        Raises:
            UnavailableError: One of them ends, or does not listen in time; its log's end is told.
        """
        for name in names or _SERVERS:
            with self._log(name).open("ab") as log:
                program = str(self._programs / f"swift-{name}-server")
                self._processes[name] = subprocess.Popen(
                    [*_ending_with_us(), program, str(self._directory / f"{name}-server.conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "SWIFT_CONF_FILE": str(self._directory / "swift.conf")},
                    start_new_session=True,  # an interrupt at the terminal is for the tests, which then stop it
                )
        for name in names or _SERVERS:
            self._wait_until_listening(name)

    def stop(self, *names: str) -> None:
        """End the processes of that name, all without one. Their data stay; `start` brings them back."""
        ended = [self._processes.pop(name) for name in names or _SERVERS if name in self._processes]
        for process in ended:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in ended:
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def stopped(self, name: str = "proxy") -> Iterator[None]:
        """For a while one of the processes is not there: connections to the proxy are refused."""
        self.stop(name)
        try:
            yield
        finally:
            if name not in self._processes:
                self.start(name)

    @contextlib.contextmanager
    def hung(self, name: str = "proxy") -> Iterator[None]:
        """For a while one of the processes stands still: the proxy takes connections and never answers."""
        self._processes[name].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._processes[name].send_signal(signal.SIGCONT)

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _wait_until_listening(self, name: str) -> None:
        end_s = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < end_s and self._processes[name].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._ports[name]), 1):
                return
            time.sleep(0.02)  # between two looks at a port; nothing tells when a process begins to listen
        tail = self._log(name).read_text(encoding="utf-8", errors="replace")[-500:]
        raise UnavailableError(f"the {name} server of Swift did not start: {tail}")


@contextlib.contextmanager
def running(directory: Path) -> Iterator[S3Server]:
    """A running server whose data lie below `directory`, which must be empty; stopped at the end.

    Raises:
        UnavailableError: Swift cannot be installed, started, or keep its data there.
    """
    _check_extended_attributes(directory)
    environment = _installed()
    ports = dict(zip(_SERVERS, _free_ports(len(_SERVERS)), strict=True))
    _configure(directory, environment, ports)
    server = S3Server(directory, environment, ports)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _ending_with_us() -> list[str]:
    """What goes before a command so that it ends with this process, even when that is killed (of util-linux)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def _check_extended_attributes(directory: Path) -> None:
    probe = directory / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.probe", bytes(_XATTR_BYTES))
    except OSError as error:
        raise UnavailableError(f"{directory}: Swift needs extended attributes ({error.strerror})") from error
    finally:
        probe.unlink()


def _cache_directory() -> Path:
    """Where the virtual environment is kept: in the user's cache, or where that cannot be, in the temporary one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home may raise
    name = f"swift-{SWIFT_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    for base in (Path(home) / "mlpstorage-tests", Path(tempfile.gettempdir()) / f"mlpstorage-tests-{os.getuid()}"):
        with contextlib.suppress(OSError):
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(base, os.W_OK):
                return base / name
    raise UnavailableError("neither the user's cache nor the temporary directory can be written")


def _installed() -> Path:
    """The virtual environment with Swift; made by the first that asks, while others wait."""
    environment = _cache_directory()
    done = environment / ".installed"
    with environment.with_name(f"{environment.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            # Not `venv.create`: from within a virtual environment it would copy that one's interpreter path.
            _install([sys.executable, "-m", "venv", "--clear", str(environment)])
            _install([str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", *_PACKAGES])
            done.touch()
    return environment


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_INSTALL_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{command[0]} took more than {_INSTALL_LIMIT_S:.0f} s to install Swift") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UnavailableError(f"Swift {SWIFT_VERSION} cannot be installed from the package registry: {reason[0]}")


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now. Another process may take one before Swift does; then its start fails."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _configure(directory: Path, environment: Path, ports: Mapping[str, int]) -> None:
    """Write the configuration files and the rings of a cluster of one device."""
    (directory / "node" / "d1").mkdir(parents=True)
    (directory / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n"
        "[storage-policy:0]\nname = gold\ndefault = yes\n",
        encoding="utf-8",
    )
    for name in ("account", "container", "object"):
        common = _common_options(directory, ports[name]) + f"devices = {directory / 'node'}\nmount_check = false\n"
        common += "disable_fallocate = true\n"
        pipeline = f"[pipeline:main]\npipeline = {name}-server\n[app:{name}-server]\nuse = egg:swift#{name}\n"
        (directory / f"{name}-server.conf").write_text(common + pipeline, encoding="utf-8")
        _build_ring(directory, environment, name, ports[name])
    filters = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in _FILTERS)
    (directory / "proxy-server.conf").write_text(
        _common_options(directory, ports["proxy"])
        + "[pipeline:main]\n"
        + "pipeline = catch_errors gatekeeper cache listing_formats bulk s3api tempauth copy slo dlo proxy-server\n"
        + "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
        # Else a server that was away is not asked again for a minute, and one on a busy machine taken to be away.
        + "error_suppression_interval = 0.1\nconn_timeout = 10\nnode_timeout = 60\n"
        + "[filter:tempauth]\nuse = egg:swift#tempauth\nuser_test_tester = testing .admin\n"
        + "[filter:s3api]\nuse = egg:swift#s3api\ns3_acl = no\n"
        # No memcached: tokens of Swift's own interface would need it, signed requests do not.
        + "[filter:cache]\nuse = egg:swift#memcache\nmemcache_servers = 127.0.0.1:1\n"
        + filters,
        encoding="utf-8",
    )


def _common_options(directory: Path, port: int) -> str:
    return (
        f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nswift_dir = {directory}\nworkers = 0\n"
        f"user = {getpass.getuser()}\nlog_level = WARNING\n"
    )


def _build_ring(directory: Path, environment: Path, name: str, port: int) -> None:
    """Where things are: on the one device, in 16 partitions."""
    builder = [str(environment / "bin" / "swift-ring-builder"), f"{name}.builder"]
    for arguments in (["create", "4", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"]):
        subprocess.run([*builder, *arguments], cwd=directory, check=True, capture_output=True)
