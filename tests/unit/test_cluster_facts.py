"""Facts of a host: the parsers on files of several distributions, and what is gathered here against other sources.

tests/data/hosts/debian12-x86_64 was captured on a virtual machine; the others are written by hand after the kernel's
formats, with what differs: other processor families, cgroup v2 only, network, logical and striped devices, subvolumes,
escapes and quotes.
"""

import ipaddress
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pydantic
import pytest

from mlpstorage import __version__
from mlpstorage.cluster.facts import (
    CgroupLimits,
    CpuInfo,
    available_memory_bytes,
    cgroup_limits,
    existing_ancestor,
    file_system_space,
    host_facts,
    mount_of,
    network_interfaces,
    parse_cgroup_paths,
    parse_cpu_limit,
    parse_cpuinfo,
    parse_meminfo,
    parse_memory_limit,
    parse_mounts,
    parse_os_release,
)
from mlpstorage.cluster.locality import is_local

DATA = Path(__file__).resolve().parents[1] / "data" / "hosts"
DEBIAN, UBUNTU, ROCKY = "debian12-x86_64", "ubuntu2404-arm64", "rocky9-x86_64"
SLES, AMAZON = "sles15-x86_64", "amazon2023-arm64"


def captured(host: str, name: str) -> str:
    """Text of a captured file."""
    return (DATA / host / name).read_text(encoding="utf-8")


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write `files` below `root`, which then stands for the machine's root directory."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (DEBIAN, CpuInfo(model="AMD EPYC", sockets=1, logical_cores=2)),
        (UBUNTU, CpuInfo(model="Arm Neoverse-N1", sockets=None, logical_cores=4)),
        (ROCKY, CpuInfo(model="Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", sockets=2, logical_cores=8)),
        (SLES, CpuInfo(model="AMD EPYC 9354 32-Core Processor", sockets=2, logical_cores=4)),
        (AMAZON, CpuInfo(model="Arm Neoverse-V1", sockets=None, logical_cores=2)),
    ],
)
def test_cpuinfo(host: str, expected: CpuInfo) -> None:
    """Model, sockets and hardware threads of x86, and of arm64, which prints codes for a model and no socket."""
    assert parse_cpuinfo(captured(host, "cpuinfo")) == expected


def test_cpuinfo_of_an_unknown_arm_core() -> None:
    """Codes that no table has are shown as they are."""
    text = captured(UBUNTU, "cpuinfo").replace("0xd0c", "0xfff")
    assert parse_cpuinfo(text).model == "arm64 implementer 0x41 part 0xfff"


def test_cpuinfo_that_tells_nothing() -> None:
    """An empty file gives no model and no socket, rather than a guess."""
    assert parse_cpuinfo("") == CpuInfo(model=None, sockets=None, logical_cores=0)


@pytest.mark.parametrize(
    ("host", "total_kib", "available_kib"),
    [
        (DEBIAN, 24684084, 24423760),
        (UBUNTU, 7959572, 6183424),
        (ROCKY, 527952444, 515330128),
        (SLES, 394912344, 381220408),
        (AMAZON, 3910244, 3420120),
    ],
)
def test_meminfo(host: str, total_kib: int, available_kib: int) -> None:
    """Sizes become bytes; counts of huge pages do not pass for sizes."""
    sizes = parse_meminfo(captured(host, "meminfo"))
    assert sizes["MemTotal"] == total_kib * 1024
    assert sizes["MemAvailable"] == available_kib * 1024
    assert sizes["Hugepagesize"] == 2 << 20
    assert "HugePages_Total" not in sizes


@pytest.mark.parametrize(
    ("host", "path", "device", "mount_point", "fs_type"),
    [
        (DEBIAN, "/var/cache", "/dev/vda", "/", "ext4"),
        (DEBIAN, "/dev/pts/0", "devpts", "/dev/pts", "devpts"),
        (DEBIAN, "/dev/ptsx", "devtmpfs", "/dev", "devtmpfs"),
        (UBUNTU, "/mnt/nvme", "/dev/nvme1n1", "/mnt/nvme", "xfs"),
        (UBUNTU, "/mnt/nvme2/x", "/dev/nvme0n1p1", "/", "ext4"),
        (UBUNTU, "/srv/kv cache/run", "/dev/nvme1n1", "/srv/kv cache", "xfs"),
        (
            UBUNTU,
            "/var/lib/docker/overlay2/5b1c/merged/tmp",
            "overlay",
            "/var/lib/docker/overlay2/5b1c/merged",
            "overlay",
        ),
        (ROCKY, "/home/me", "/dev/mapper/rl-home", "/home", "xfs"),
        (ROCKY, "/data/kv", "filer.example.com:/export/kv", "/data", "nfs4"),
        (ROCKY, "/lustre/a", "10.2.0.1@o2ib:/scratch", "/lustre", "lustre"),
        (ROCKY, "/mnt/back\\slash\ttab/a", "/dev/md0", "/mnt/back\\slash\ttab", "ext4"),
        (ROCKY, "/", "/dev/mapper/rl-root", "/", "xfs"),
        (SLES, "/var/cache/kv", "/dev/sda3", "/var", "btrfs"),
        (SLES, "/kvcache/rank_0", "/dev/md127", "/kvcache", "xfs"),
        (SLES, "/flash", "10.20.0.5@tcp:/flash", "/flash", "lustre"),
        (AMAZON, "/local/kv", "/dev/nvme1n1", "/local", "xfs"),
        (AMAZON, "/shared/kv", "fs-0123456789abcdef0.efs.us-east-1.amazonaws.com:/", "/shared", "nfs4"),
    ],
)
def test_mount_of(host: str, path: str, device: str, mount_point: str, fs_type: str) -> None:
    """The longest mount point wins by whole components, the last of equal ones; escapes are undone."""
    mount = mount_of(parse_mounts(captured(host, "mounts")), path)
    assert mount is not None
    assert (mount.device, mount.mount_point, mount.fs_type) == (device, mount_point, fs_type)


def test_mount_options_and_bind_mounts() -> None:
    """A bind mount shows the same device at both places; options stay in their order."""
    mounts = parse_mounts(captured(UBUNTU, "mounts"))
    assert [mount.mount_point for mount in mounts if mount.device == "/dev/nvme1n1"] == ["/mnt/nvme", "/srv/kv cache"]
    root = mount_of(mounts, "/")
    assert root is not None
    assert root.options == ("rw", "relatime", "discard", "errors=remount-ro")
    assert mount_of((), "/") is None


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (DEBIAN, "Debian GNU/Linux 12 (bookworm)"),
        (UBUNTU, "Ubuntu 24.04.1 LTS"),
        (ROCKY, "Rocky Linux 9.4 (Blue Onyx)"),
        (SLES, "SUSE Linux Enterprise Server 15 SP6"),
        (AMAZON, "Amazon Linux 2023.6.20241212"),
    ],
)
def test_os_release(host: str, name: str) -> None:
    """Double quotes and none."""
    assert parse_os_release(captured(host, "os-release"))["PRETTY_NAME"] == name


def test_os_release_quotes() -> None:
    """Single quotes, escapes inside quotes and outside, comments, and a quotation that was left open."""
    values = parse_os_release(captured(ROCKY, "os-release") + 'OPEN="no end\n')
    assert values["ID"] == "rocky"
    assert values["VENDOR_NAME"] == 'The "RESF"'
    assert values["REDHAT_SUPPORT_PRODUCT"] == "Rocky Linux"
    assert values["OPEN"] == '"no end'
    assert not any(name.startswith("#") for name in values)


def test_cgroup_paths() -> None:
    """v1 has a path for each controller, v2 one for all under the empty name; a path may hold colons."""
    assert parse_cgroup_paths(captured(ROCKY, "cgroup")) == {"": "/system.slice/slurmstepd.scope/job_4711/step_0"}
    debian = parse_cgroup_paths(captured(DEBIAN, "cgroup"))
    assert (debian["memory"], debian["cpu"], debian[""]) == ("/jobs/build-17", "/", "/")
    assert parse_cgroup_paths("3:cpu,cpuacct:/a:b\n") == {"cpu": "/a:b", "cpuacct": "/a:b"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max\n", None), ("1073741824\n", 1 << 30), ("9223372036854771712\n", None), ("", None), (None, None), ("0\n", 0)],
)
def test_memory_limit(text: str | None, expected: int | None) -> None:
    """The word "max" of v2 and the huge number of v1 are no limit."""
    assert parse_memory_limit(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1.5),
        ("-1\n 100000\n", None),
        ("400000\n 100000\n", 4.0),
        (None, None),
    ],
)
def test_cpu_limit(text: str | None, expected: float | None) -> None:
    """Quota by period, in the forms of v2 and v1."""
    assert parse_cpu_limit(text) == expected


V2 = "sys/fs/cgroup/system.slice/slurmstepd.scope"


@pytest.fixture
def slurm_host(tmp_path: Path) -> Path:
    """A host with cgroup v2, whose limits stand on two levels above the process."""
    return tree(
        tmp_path,
        {
            "proc/self/mounts": captured(ROCKY, "mounts"),
            "proc/self/cgroup": captured(ROCKY, "cgroup"),
            "proc/meminfo": captured(ROCKY, "meminfo"),
            f"{V2}/memory.max": "max\n",
            f"{V2}/cpu.max": "300000 100000\n",
            f"{V2}/job_4711/memory.max": f"{64 << 30}\n",
            f"{V2}/job_4711/memory.current": f"{20 << 30}\n",
            f"{V2}/job_4711/memory.stat": f"anon 1\nactive_file {1 << 30}\ninactive_file {2 << 30}\nshmem 7\n",
            f"{V2}/job_4711/cpu.max": "800000 100000\n",
            f"{V2}/job_4711/step_0/memory.max": "max\n",
            f"{V2}/job_4711/step_0/memory.current": "5\n",
            f"{V2}/job_4711/step_0/cpu.max": "max 100000\n",
        },
    )


def test_cgroup_v2_takes_the_tightest_level(slurm_host: Path) -> None:
    """Limits above the own group count; file pages are still to be had: 64 - 20 + 1 + 2 GiB are left."""
    expected = CgroupLimits(memory_limit_bytes=64 << 30, memory_left_bytes=47 << 30, cpu_limit_cores=3.0)
    assert cgroup_limits(slurm_host) == expected
    assert available_memory_bytes(slurm_host) == 47 << 30


def test_available_memory_is_of_the_machine_where_that_is_less(slurm_host: Path) -> None:
    """A generous cgroup does not make memory."""
    (slurm_host / f"{V2}/job_4711/memory.max").write_text(f"{1 << 50}\n")
    assert available_memory_bytes(slurm_host) == 515330128 * 1024


def test_cgroup_v1_beside_v2(tmp_path: Path) -> None:
    """The hybrid of Debian's captured files: v1 carries memory and cpu, and its sums are in total_*."""
    memory = "sys/fs/cgroup/memory/jobs/build-17"
    root = tree(
        tmp_path,
        {
            "proc/self/mounts": captured(DEBIAN, "mounts"),
            "proc/self/cgroup": captured(DEBIAN, "cgroup"),
            "proc/meminfo": captured(DEBIAN, "meminfo"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            f"{memory}/memory.limit_in_bytes": "1073741824\n",
            f"{memory}/memory.usage_in_bytes": "536870912\n",
            f"{memory}/memory.stat": "inactive_file 5\ntotal_inactive_file 1048576\ntotal_active_file 0\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/unified/cgroup.procs": "1\n",
        },
    )
    left = 1073741824 - 536870912 + 1048576
    assert cgroup_limits(root) == CgroupLimits(memory_limit_bytes=1 << 30, memory_left_bytes=left, cpu_limit_cores=0.5)
    assert available_memory_bytes(root) == left


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/../../other.scope"])
def test_cgroup_of_a_container(tmp_path: Path, path: str) -> None:
    """Where the path is one of the host outside, the limits at the mount's top are the container's own."""
    root = tree(
        tmp_path,
        {
            "proc/self/mounts": captured(UBUNTU, "mounts"),
            "proc/self/cgroup": f"0::{path}\n",
            "sys/fs/cgroup/memory.max": "2147483648\n",
            "sys/fs/cgroup/memory.current": "3147483648\n",
        },
    )
    assert cgroup_limits(root) == CgroupLimits(memory_limit_bytes=2 << 30, memory_left_bytes=0, cpu_limit_cores=None)


def test_no_cgroup(tmp_path: Path) -> None:
    """A machine without cgroups has no limits."""
    none = CgroupLimits(memory_limit_bytes=None, memory_left_bytes=None, cpu_limit_cores=None)
    assert cgroup_limits(tmp_path) == none


def test_existing_ancestor(tmp_path: Path) -> None:
    """The way up ends at what exists; links are followed, also one whose target is still missing."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "later")
    real = Path(os.path.realpath(tmp_path))
    assert existing_ancestor(tmp_path / "disk" / "a" / "b") == real / "disk"
    assert existing_ancestor(tmp_path / "link" / "a") == real / "disk"
    assert existing_ancestor(tmp_path / "disk") == real / "disk"


def test_file_system_space_agrees_with_df(tmp_path: Path) -> None:
    """Size, room for an ordinary user, type and mount point are those that df shows."""
    if shutil.which("df") is None:
        pytest.skip("df is not installed")
    words = ["df", "-B1", "--output=size,avail,fstype,target", str(tmp_path)]
    size, free, fs_type, target = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-4:]
    space = file_system_space(tmp_path / "not" / "there")
    assert (space.total_bytes, space.fs_type, space.mount) == (int(size), fs_type, target)
    # Others write to the same disk between the two questions.
    assert space.free_bytes == pytest.approx(int(free), abs=2 << 30)


def test_facts_of_this_machine_agree_with_other_sources(tmp_path: Path) -> None:
    """Cores, memory, names and versions as Python, psutil and uname tell them; JSON can hold it all."""
    facts = host_facts(tmp_path / "cache")
    assert facts["host"] == socket.gethostname()
    assert facts["logical_cores"] == os.cpu_count()
    assert 1 <= int(str(facts["usable_cores"])) <= len(os.sched_getaffinity(0))
    assert facts["memory_total_bytes"] == psutil.virtual_memory().total
    assert facts["kernel"] == platform.release()
    assert facts["os"] == platform.freedesktop_os_release()["PRETTY_NAME"]
    assert facts["python"] == platform.python_version()
    assert facts["mlpstorage"] == __version__
    names = {str(interface["name"]) for interface in network_interfaces()}
    assert names == set(psutil.net_if_stats()) - {"lo"}
    packages = facts["packages"]
    assert isinstance(packages, dict)
    assert packages["pydantic"] == pydantic.VERSION
    mount = facts["cache_mount"]
    assert isinstance(mount, dict)
    space = os.statvfs(tmp_path)
    assert mount["size_bytes"] == space.f_blocks * space.f_frsize
    found = [part for part in psutil.disk_partitions(all=True) if part.mountpoint == mount["mount_point"]]
    assert found
    assert (mount["device"], mount["type"], mount["options"]) == (
        found[-1].device,
        found[-1].fstype,
        found[-1].opts.split(","),
    )
    assert json.loads(json.dumps(facts)) == facts


def test_block_device_of_this_machine(tmp_path: Path) -> None:
    """Where the directory lies on a disk, its size is that which /proc/partitions shows."""
    device = host_facts(tmp_path)["cache_device"]
    if device is None:
        pytest.skip("the temporary directory lies on no block device")
    assert isinstance(device, dict)
    lines = Path("/proc/partitions").read_text(encoding="ascii").splitlines()[2:]
    size_kib = {line.split()[3]: int(line.split()[2]) for line in lines}
    assert device["size_bytes"] == size_kib[device["name"]] * 1024


def test_facts_without_a_cache_directory() -> None:
    """No directory, no storage facts; the rest stands."""
    facts = host_facts(None)
    assert (facts["cache_mount"], facts["cache_device"]) == (None, None)
    assert facts["host"] == socket.gethostname()


def test_available_memory_of_this_machine() -> None:
    """No more than the machine has free by psutil's reckoning; it may be less in a cgroup."""
    before = psutil.virtual_memory().available
    value = available_memory_bytes()
    after = psutil.virtual_memory().available
    assert 0 < value <= 1.1 * max(before, after)


def test_facts_start_no_process_and_ask_no_network() -> None:
    """No process is started and no name resolved or address contacted, by the word of Python's own audit hooks."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "events = []\n"
        "watched = ('socket.', 'subprocess.', 'os.system', 'os.exec', 'os.fork', 'os.posix_spawn')\n"
        "sys.addaudithook(lambda event, _: events.append(event) if event.startswith(watched) else None)\n"
        "from mlpstorage.cluster.facts import host_facts\n"
        "print(len(host_facts(Path.cwd())['host']) > 0, events)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True []\n"


@pytest.mark.parametrize(
    "name",
    ["localhost", "LocalHost", "127.0.0.1", "127.9.8.7", "::1", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1"],
)
def test_loopback_is_local(name: str) -> None:
    """Names and addresses of the loopback mean this machine."""
    assert is_local(name)


def test_own_names_and_addresses_are_local() -> None:
    """The host name, short and full, and each address that an interface has."""
    assert is_local(socket.gethostname())
    assert is_local(socket.gethostname().split(".")[0].upper())
    own = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    addresses = [address for address in own if _is_address(address)]
    assert addresses
    assert [address for address in addresses if not is_local(address)] == []
    assert [address for address in addresses if not is_local(address.partition("%")[0])] == []


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "name", ["", "host1", "192.0.2.77", "2001:db8::77", "::ffff:192.0.2.77", "localhost.example.com"]
)
def test_others_are_not_local(name: str) -> None:
    """Documentation addresses (RFC 5737, RFC 3849) and unknown names are other machines."""
    assert not is_local(name)


def test_is_local_sends_nothing() -> None:
    """No socket of a network family is opened or connected, by the word of Python's own audit hooks."""
    code = (
        "import sys\n"
        "events = []\n"
        "sys.addaudithook(lambda event, _: events.append(event) if event.startswith('socket.') else None)\n"
        "from mlpstorage.cluster.locality import is_local\n"
        "print([is_local(name) for name in ('host1', 'host1.example.com', '192.0.2.77', '2001:db8::77')], events)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[False, False, False, False] []\n"
