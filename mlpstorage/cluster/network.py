"""Network interfaces and RDMA devices, as /sys/class/net and /sys/class/infiniband have them."""

import re
from pathlib import Path

from mlpstorage.cluster.kernel_files import entries, number, text

CLASS_NET = Path("/sys/class/net")
CLASS_INFINIBAND = Path("/sys/class/infiniband")


def network_interfaces(net: Path = CLASS_NET) -> list[dict[str, object]]:
    """Interfaces below /sys/class/net, without the loopback, by name.

    `speed_mbit_per_s` is None where a link has none, `driver` where there is no device behind the interface.
    """
    interfaces: list[dict[str, object]] = []
    for entry in entries(net):
        if entry.name != "lo" and entry.is_dir():
            speed = number(entry / "speed")
            driver = entry / "device/driver"
            interfaces.append(
                {
                    "name": entry.name,
                    # The kernel says -1 for a virtual link and refuses the read for one that is down.
                    "speed_mbit_per_s": speed if speed is not None and speed > 0 else None,
                    "mtu_bytes": number(entry / "mtu"),
                    "state": text(entry / "operstate"),
                    "driver": driver.resolve().name if driver.exists() else None,
                }
            )
    return interfaces


def rdma_devices(infiniband: Path = CLASS_INFINIBAND) -> list[dict[str, object]]:
    """Ports of the RDMA devices below /sys/class/infiniband: InfiniBand, RoCE and iWARP, by name and number."""
    return [
        {
            "name": device.name,
            "port": port.name,
            "link_layer": text(port / "link_layer"),
            "rate_gbit_per_s": parse_rdma_rate(text(port / "rate")),
            "state": parse_rdma_state(text(port / "state")),
            "firmware": text(device / "fw_ver"),
        }
        for device in entries(infiniband)
        for port in entries(device / "ports")
    ]


def parse_rdma_rate(line: str | None) -> float | None:
    """Gbit/s of a port's `rate`, such as "100 Gb/sec (4X EDR)"."""
    match = re.match(r"(\d+(?:\.\d+)?) Gb/sec\b", line or "")
    return float(match[1]) if match else None


def parse_rdma_state(line: str | None) -> str | None:
    """The word of a port's `state`, such as "4: ACTIVE"."""
    return None if line is None else line.rpartition(":")[2].strip() or None
