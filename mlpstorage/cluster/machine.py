"""Processor, memory and system of a host."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mlpstorage.cluster.kernel_files import entries, number

_ARM_CPUS = {
    ("0x41", "0xd0c"): "Arm Neoverse-N1",
    ("0x41", "0xd40"): "Arm Neoverse-V1",
    ("0x41", "0xd49"): "Arm Neoverse-N2",
    ("0x41", "0xd4f"): "Arm Neoverse-V2",
    ("0x41", "0xd84"): "Arm Neoverse-V3",
    ("0x41", "0xd8e"): "Arm Neoverse-N3",
    ("0x48", "0xd01"): "HiSilicon TSV110",
    ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1a",
}
"""Server cores by (implementer, part) of the MIDR register; arm64 kernels print no model name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuInfo:
    """What /proc/cpuinfo tells; `logical_cores` counts hardware threads."""

    model: str | None
    sockets: int | None
    logical_cores: int


def parse_cpuinfo(text: str) -> CpuInfo:
    """Read /proc/cpuinfo of x86 (model name, physical id) or arm64 (implementer and part)."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), []).append(value.strip())
    model = next(iter(values.get("model name", [])), None)
    implementers, parts = values.get("CPU implementer"), values.get("CPU part")
    if model is None and implementers and parts:
        key_of_arm = (implementers[0].lower(), parts[0].lower())
        model = _ARM_CPUS.get(key_of_arm, f"arm64 implementer {key_of_arm[0]} part {key_of_arm[1]}")
    sockets = len(set(values.get("physical id", []))) or None
    return CpuInfo(model=model, sockets=sockets, logical_cores=len(values.get("processor", [])))


def parse_meminfo(text: str) -> dict[str, int]:
    """Sizes of /proc/meminfo in bytes; counts (huge pages) are left out."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\S+):\s+(\d+) kB$", text, flags=re.MULTILINE)}


def parse_os_release(text: str) -> dict[str, str]:
    """Read /etc/os-release: shell assignments, with or without quotes."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            try:
                values[name] = " ".join(shlex.split(value))
            except ValueError:  # an open quotation: the file is not what it should be, its text still tells something
                values[name] = value
    return values


def sockets_by_topology(cpus: Path) -> int | None:
    """Sockets as arm64 kernels know them from the firmware; -1 is unknown."""
    packages = {number(cpu / "topology/physical_package_id") for cpu in entries(cpus)}
    return len({package for package in packages if package is not None and package >= 0}) or None
