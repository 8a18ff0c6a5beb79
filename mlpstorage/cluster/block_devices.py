"""Block devices, as /sys/class/block has them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mlpstorage.cluster.kernel_files import entries, number, text

CLASS_BLOCK = Path("/sys/class/block")

_SECTOR_BYTES = 512
"""Unit of /sys/class/block/*/size, whatever the device's own sectors are (kernel: Documentation/block/stat)."""

_NO_DISK = re.compile(r"(?:loop|ram|zram|nbd|fd|sr)\d+")
"""Devices over files or memory, and drives whose medium comes and goes. One that lies below the cache is told apart."""

_BUSES = (
    (re.compile(r"usb\d+"), "usb"),
    (re.compile(r"ata\d+"), "sata"),
    (re.compile(r"session\d+"), "iscsi"),
    (re.compile(r"rport-\d.*"), "fc"),
    (re.compile(r"end_device-\d.*"), "sas"),
    (re.compile(r"mmc\d+"), "mmc"),
    (re.compile(r"virtio\d+"), "virtio"),
    (re.compile(r"vbd-\d+"), "xen"),
)
"""What a directory on a device's path in /sys/devices is called, and what it says of the way to the device."""


def block_device_facts(block: Path) -> dict[str, object]:
    """What /sys/class/block tells of one device; a partition's model, queue and transport are those of its disk."""
    own = block.resolve()
    is_partition = (own / "partition").exists()
    disk = own.parent if is_partition else own
    scheduler = re.search(r"\[(.+)\]", text(disk / "queue/scheduler") or "")
    rotational, sectors = number(disk / "queue/rotational"), number(own / "size")
    return {
        "name": own.name,
        "disk": disk.name,
        "model": text(disk / "device/model"),
        # NVMe and SCSI have different names for it.
        "firmware": text(disk / "device/firmware_rev") or text(disk / "device/rev"),
        "transport": _transport(disk),
        "rotational": None if rotational is None else bool(rotational),
        "size_bytes": None if sectors is None else sectors * _SECTOR_BYTES,
        "queue_depth": number(disk / "queue/nr_requests"),
        "scheduler": scheduler[1] if scheduler else None,
        # What a logical volume, an encrypted or a RAID device is made of.
        "parts": sorted(part.name for part in entries(own / "slaves")),
    }


def block_devices(class_block: Path = CLASS_BLOCK) -> list[dict[str, object]]:
    """Facts of every whole disk, volume and array of the host, by name; no partitions, and nothing that is empty."""
    return [block_device_facts(class_block / name) for name in disk_names(class_block)]


def disk_names(class_block: Path = CLASS_BLOCK) -> list[str]:
    """Names of what `block_devices` tells of."""
    return [
        entry.name
        for entry in entries(class_block)
        if not _NO_DISK.fullmatch(entry.name)
        and not (entry / "partition").exists()
        # One path of several to an NVMe namespace, which is there under its own name, too.
        and not number(entry / "hidden")
        and number(entry / "size") != 0
    ]


def devices_below(block: Path) -> list[str]:
    """Names of a device, of its disk if it is a partition, and of all that it is made of."""
    return sorted(set(_below(block)))


def _below(block: Path) -> Iterator[str]:
    own = block.resolve()
    yield own.name
    if (own / "partition").exists():
        yield own.parent.name
    for part in entries(own / "slaves"):
        yield from _below(part)


def block_of(path: Path, device: str | None) -> Path | None:
    """The /sys directory of the device below `path`; none for network and memory file systems."""
    device_number = path.stat().st_dev
    by_number = Path(f"/sys/dev/block/{os.major(device_number)}:{os.minor(device_number)}")
    # Btrfs and overlays invent device numbers; there the name in /proc/mounts must do.
    by_name = CLASS_BLOCK / Path(os.path.realpath(device or "")).name
    if by_number.exists():
        return by_number
    return by_name if device and device.startswith("/dev/") and by_name.exists() else None


def _transport(disk: Path) -> str | None:
    """How the host reaches a disk: as an NVMe controller says (pcie, tcp, rdma, fc), else by the buses on its path."""
    told = text(disk / "device/transport")
    if told is not None:
        return told
    # With native multipath a namespace hangs below its subsystem, which links to its controllers.
    controllers = [entry for entry in entries(disk / "device") if re.fullmatch(r"nvme\d+", entry.name)]
    ways = {way for controller in controllers if (way := text(controller / "transport")) is not None}
    if ways:
        return ",".join(sorted(ways))
    return next((name for pattern, name in _BUSES for part in disk.parts if pattern.fullmatch(part)), None)
