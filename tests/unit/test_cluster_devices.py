"""Block devices, network interfaces and RDMA ports on trees that are laid out as the kernel lays out /sys."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from mlpstorage.cluster.block_devices import block_device_facts, block_devices, devices_below, disk_names
from mlpstorage.cluster.network import network_interfaces, parse_rdma_rate, parse_rdma_state, rdma_devices
from mlpstorage.cluster.software import package_versions

PCI = "devices/pci0000:00/0000:00:01.0/0000:01:00.0"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write `files` below `root`, which stands for /sys."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def link(root: Path, name: str, target: str) -> None:
    """Make a symbolic link from `name` to `target`, both below `root`."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(root / target)


def block(root: Path, path: str) -> Path:
    """Put the device at `path` into the class directory, whose path is returned; a disk without a size gets one."""
    if not (root / path / "size").exists():
        tree(root, {f"{path}/size": "2048\n"})
    link(root, f"class/block/{Path(path).name}", path)
    return root / "class/block"


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    """An NVMe disk with a partition; a namespace's `device` is its controller."""
    disk = f"{PCI}/nvme/nvme0/nvme0n1"
    files = {
        f"{PCI}/nvme/nvme0/model": "SAMSUNG MZQL23T8HCLS-00A07              \n",
        f"{PCI}/nvme/nvme0/firmware_rev": "GDC5602Q\n",
        f"{PCI}/nvme/nvme0/transport": "pcie\n",
        f"{disk}/size": "7501476528\n",
        f"{disk}/queue/rotational": "0\n",
        f"{disk}/queue/nr_requests": "1023\n",
        f"{disk}/queue/scheduler": "[none] mq-deadline kyber\n",
        f"{disk}/nvme0n1p1/partition": "1\n",
        f"{disk}/nvme0n1p1/size": "2097152\n",
    }
    root = tree(tmp_path, files)
    link(root, f"{disk}/device", f"{PCI}/nvme/nvme0")
    block(root, disk)
    block(root, f"{disk}/nvme0n1p1")
    return root


def test_block_device_of_a_partition(nvme: Path) -> None:
    """Size is the partition's, in sectors of 512 bytes; model, firmware, transport and queue are the disk's."""
    assert block_device_facts(nvme / "class/block/nvme0n1p1") == {
        "name": "nvme0n1p1",
        "disk": "nvme0n1",
        "model": "SAMSUNG MZQL23T8HCLS-00A07",
        "firmware": "GDC5602Q",
        "transport": "pcie",
        "rotational": False,
        "size_bytes": 1 << 30,
        "queue_depth": 1023,
        "scheduler": "none",
        "parts": [],
    }


def test_block_device_that_tells_little(tmp_path: Path) -> None:
    """A striped device names its parts; what it does not tell is None."""
    (tmp_path / "md0/slaves/nvme1n1").mkdir(parents=True)
    (tmp_path / "md0/slaves/nvme0n1").mkdir()
    facts = block_device_facts(tree(tmp_path, {"md0/queue/rotational": "1\n"}) / "md0")
    assert (facts["parts"], facts["rotational"]) == (["nvme0n1", "nvme1n1"], True)
    unknown = ("model", "firmware", "transport", "size_bytes", "queue_depth", "scheduler")
    assert [facts[key] for key in unknown] == [None] * 6


@pytest.mark.parametrize(
    ("path", "transport"),
    [
        ("devices/pci0000:00/0000:00:17.0/ata3/host2/target2:0:0/2:0:0:0/block/sda", "sata"),
        ("devices/pci0000:00/0000:00:14.0/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0/block/sdb", "usb"),
        ("devices/pci0000:3a/0000:3b:00.0/host0/port-0:3/end_device-0:3/target0:0:3/0:0:3:0/block/sdc", "sas"),
        ("devices/platform/host9/session1/target9:0:0/9:0:0:1/block/sdd", "iscsi"),
        ("devices/pci0000:80/0000:81:00.0/host3/rport-3:0-2/target3:0:0/3:0:0:7/block/sde", "fc"),
        ("devices/pci0000:00/0000:00:02.0/virtio1/block/vda", "virtio"),
        ("devices/vbd-51712/block/xvda", "xen"),
        ("devices/virtual/block/dm-0", None),
    ],
)
def test_transport_of_disks_that_are_not_nvme(tmp_path: Path, path: str, transport: str | None) -> None:
    """The buses on the way to a disk tell how it is reached; a volume over others has none of its own."""
    assert block_device_facts(block(tmp_path, path) / Path(path).name)["transport"] == transport


def test_transport_of_nvme_over_several_paths(tmp_path: Path) -> None:
    """With native multipath the namespace hangs below its subsystem, whose controllers tell how they are reached."""
    subsystem = "devices/virtual/nvme-subsystem/nvme-subsys0"
    files = {f"{subsystem}/model": "Fabric Array\n", f"{subsystem}/firmware_rev": "9.1\n"}
    for number in (0, 1):
        files[f"devices/virtual/nvme-fabrics/ctl/nvme{number}/transport"] = "tcp\n"
    root = tree(tmp_path, files)
    for number in (0, 1):
        link(root, f"{subsystem}/nvme{number}", f"devices/virtual/nvme-fabrics/ctl/nvme{number}")
    class_block = block(root, f"{subsystem}/nvme0n1")
    link(root, f"{subsystem}/nvme0n1/device", subsystem)
    hidden = "devices/virtual/nvme-fabrics/ctl/nvme0/nvme0c0n1"
    block(tree(root, {f"{hidden}/hidden": "1\n"}), hidden)
    (facts,) = block_devices(class_block)
    assert [facts[key] for key in ("name", "model", "firmware", "transport")] == [
        "nvme0n1",
        "Fabric Array",
        "9.1",
        "tcp",
    ]


def test_scsi_disks_tell_their_revision(tmp_path: Path) -> None:
    """SCSI's name for the firmware is another than that of NVMe."""
    path = "devices/pci0000:00/0000:00:17.0/ata3/host2/target2:0:0/2:0:0:0/block/sda"
    root = tree(tmp_path, {f"{path}/device/model": "ST16000NM001G-2K\n", f"{path}/device/rev": "SN04\n"})
    facts = block_device_facts(block(root, path) / "sda")
    assert (facts["model"], facts["firmware"]) == ("ST16000NM001G-2K", "SN04")


def test_all_disks_of_a_host(nvme: Path) -> None:
    """Whole disks, volumes and arrays; no partition, no device over a file or memory, no drive without a medium."""
    virtual = "devices/virtual/block"
    class_block = block(nvme, f"{virtual}/dm-0")
    for name in ("loop0", "ram1", "zram0", "sr0", "md127"):
        block(nvme, f"{virtual}/{name}")
    block(tree(nvme, {f"{virtual}/nbdx/size": "0\n"}), f"{virtual}/nbdx")
    assert disk_names(class_block) == ["dm-0", "md127", "nvme0n1"]
    assert [facts["name"] for facts in block_devices(class_block)] == ["dm-0", "md127", "nvme0n1"]
    assert disk_names(nvme / "class/nothing") == []


def test_devices_below_a_volume(nvme: Path) -> None:
    """An encrypted volume on an array of a partition and a disk: all of them, and the partition's disk."""
    virtual = "devices/virtual/block"
    class_block = block(nvme, f"{virtual}/dm-0")
    block(nvme, f"{virtual}/md127")
    block(nvme, f"{PCI}/nvme/nvme1/nvme1n1")
    link(nvme, f"{virtual}/dm-0/slaves/md127", f"{virtual}/md127")
    link(nvme, f"{virtual}/md127/slaves/nvme0n1p1", f"{PCI}/nvme/nvme0/nvme0n1/nvme0n1p1")
    link(nvme, f"{virtual}/md127/slaves/nvme1n1", f"{PCI}/nvme/nvme1/nvme1n1")
    assert devices_below(class_block / "dm-0") == ["dm-0", "md127", "nvme0n1", "nvme0n1p1", "nvme1n1"]
    assert devices_below(class_block / "nvme1n1") == ["nvme1n1"]


def test_network_interfaces(tmp_path: Path) -> None:
    """Speeds in Mbit/s, None for links without one; the loopback and what is no interface are left out."""
    files = {
        "eth1/speed": "-1\n",
        "eth1/operstate": "up\n",
        "eth1/mtu": "1500\n",
        "eth0/speed": "200000\n",
        "eth0/operstate": "up\n",
        "eth0/mtu": "9000\n",
        "ib0/operstate": "down\n",
        "lo/operstate": "unknown\n",
        "bonding_masters": "bond0\n",
    }
    root = tree(tmp_path, files)
    (root / "drivers/mlx5_core").mkdir(parents=True)
    link(root, "net/eth0", "eth0")
    for name in ("eth1", "ib0", "lo", "bonding_masters"):
        link(root, f"net/{name}", name)
    link(root, "eth0/device/driver", "drivers/mlx5_core")
    nothing = {"speed_mbit_per_s": None, "mtu_bytes": None, "driver": None}
    assert network_interfaces(root / "net") == [
        {"name": "eth0", "speed_mbit_per_s": 200000, "mtu_bytes": 9000, "state": "up", "driver": "mlx5_core"},
        {"name": "eth1", **nothing, "mtu_bytes": 1500, "state": "up"},
        {"name": "ib0", **nothing, "state": "down"},
    ]
    assert network_interfaces(tmp_path / "missing") == []


def test_rdma_ports(tmp_path: Path) -> None:
    """Each port of each device, InfiniBand or Ethernet, with rate and state as numbers and words."""
    files = {
        "mlx5_0/fw_ver": "28.39.1002\n",
        "mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
        "mlx5_0/ports/1/state": "4: ACTIVE\n",
        "mlx5_0/ports/1/link_layer": "InfiniBand\n",
        "mlx5_1/ports/1/rate": "2.5 Gb/sec (1X SDR)\n",
        "mlx5_1/ports/1/state": "1: DOWN\n",
        "mlx5_1/ports/1/link_layer": "Ethernet\n",
    }
    first, second = rdma_devices(tree(tmp_path, files))
    assert first == {
        "name": "mlx5_0",
        "port": "1",
        "link_layer": "InfiniBand",
        "rate_gbit_per_s": 400.0,
        "state": "ACTIVE",
        "firmware": "28.39.1002",
    }
    assert (second["rate_gbit_per_s"], second["state"], second["firmware"]) == (2.5, "DOWN", None)
    assert rdma_devices(tmp_path / "missing") == []


@pytest.mark.parametrize("line", [None, "", "unknown", "Gb/sec", "100 Mb/sec"])
def test_rdma_rate_that_is_none(line: str | None) -> None:
    """What is no rate in Gbit/s gives none, rather than a guess."""
    assert parse_rdma_rate(line) is None


def test_rdma_state_that_is_none() -> None:
    """No file, no state."""
    assert parse_rdma_state(None) is None
    assert parse_rdma_state("4:") is None


def test_versions_of_packages() -> None:
    """What is not installed has no version, and is told all the same."""
    versions = package_versions(["pytest", "no-such-package-here"])
    assert versions == {"pytest": pytest.__version__, "no-such-package-here": None}
