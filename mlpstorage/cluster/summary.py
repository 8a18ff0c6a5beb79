"""What the hosts of a run have together, and in which facts they differ."""

import math
from collections.abc import Iterator, Mapping, Sequence

_DIFFER_ANYHOW = frozenset(
    {
        "host",
        "memory_available_bytes",
        "cgroup.memory_left_bytes",
        "cache_mount.device",
        "cache_mount.free_bytes",
        "cache_device.name",
        "cache_device.disk",
        "cache_device.parts",
    }
)
"""Facts in which equal machines differ too (names, what is free at the moment): a difference tells nothing."""

_NEARLY_EQUAL = frozenset({"memory_total_bytes", "cache_mount.size_bytes"})
"""Sizes of which firmware and file systems keep a part for themselves, more or less from machine to machine."""

_NEARLY = 0.01

_OWN_OPTIONS = ("addr=", "clientaddr=", "mountaddr=", "lowerdir=", "upperdir=", "workdir=", "fd=", "pipe_ino=")
"""Mount options that hold addresses and places of one host."""

_LIKENESS: Mapping[str, tuple[str, ...]] = {
    "block_devices": ("model", "size_bytes", "rotational", "firmware", "transport"),
    "network_interfaces": ("driver", "speed_mbit_per_s", "mtu_bytes"),
    "rdma_devices": ("link_layer", "rate_gbit_per_s", "state", "firmware"),
}
"""By which keys the devices of two hosts are compared: not by their names, and not in their order."""

_WARNED = frozenset({"mlpstorage", "python", "kernel", "cache_mount.type", "cache_mount.options"})
_HOSTS_NAMED = 4

Group = Mapping[str, object]


def summarize(hosts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Totals over `hosts` (as `host_facts` gives them), and the facts in which they differ.

    A total is None where a host could not tell its part. `differences` has, for each fact that should be equal on equal
    machines, the values and who has them. Memory and the size of the cache's file system may differ by 1 %.
    """
    flat = [dict(_flatten(facts)) for facts in hosts]
    names = sorted({name for facts in flat for name in facts} - _DIFFER_ANYHOW)
    differences = {name: groups for name in names if len(groups := _groups(name, flat)) > 1}
    return {
        "hosts": len(hosts),
        "total_cores": _total(flat, "logical_cores"),
        "total_memory_bytes": _total(flat, "memory_total_bytes"),
        "differences": differences,
    }


def cluster_information(hosts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The `cluster_information` of a run's metadata: every host's facts, and their summary."""
    return {"hosts": [dict(facts) for facts in hosts], "summary": summarize(hosts)}


def difference_warnings(hosts: Sequence[Mapping[str, object]]) -> list[str]:
    """A line for each version, and each mount option or type of the cache's file system, that is not the same."""
    flat = [dict(_flatten(facts)) for facts in hosts]
    names = sorted(name for facts in flat for name in facts if name in _WARNED or name.startswith("packages."))
    return [
        f"hosts differ in {name}: {_who_has_what(groups)}"
        for name in dict.fromkeys(names)
        if len(groups := _groups(name, flat)) > 1
    ]


def _groups(name: str, flat: Sequence[Mapping[str, object]]) -> list[Group]:
    """The values of a fact, and the hosts that have each, in order of the hosts."""
    groups: list[tuple[object, list[object]]] = []
    for facts in flat:
        value = _comparable(name, facts.get(name))
        members = next((members for other, members in groups if _alike(name, value, other)), None)
        if members is None:
            groups.append((value, members := []))
        members.append(facts.get("host"))
    return [{"value": value, "hosts": members} for value, members in groups]


def _comparable(name: str, value: object) -> object:
    """A value without what tells one host from another."""
    if not isinstance(value, list):
        return value
    if name == "cache_mount.options":
        return sorted(option for option in value if not str(option).startswith(_OWN_OPTIONS))
    if name in _LIKENESS:
        devices = [{key: device.get(key) for key in _LIKENESS[name]} for device in value if _is_compared(name, device)]
        return sorted(devices, key=repr)
    return value


def _is_compared(name: str, device: Mapping[str, object]) -> bool:
    """Bridges, tunnels and links of containers come and go; only interfaces with a device are the machine's."""
    return name != "network_interfaces" or device.get("driver") is not None


def _alike(name: str, one: object, other: object) -> bool:
    if name in _NEARLY_EQUAL and isinstance(one, int) and isinstance(other, int):
        return math.isclose(one, other, rel_tol=_NEARLY)
    return one == other


def _who_has_what(groups: Sequence[Group]) -> str:
    return "; ".join(f"{text} on {_named(group['hosts'])}" for text, group in zip(_texts(groups), groups, strict=True))


def _texts(groups: Sequence[Group]) -> list[str]:
    """Each value in words; of lists only what not all of them have."""
    values = [group["value"] for group in groups]
    sets = [set(map(str, value)) for value in values if isinstance(value, list)]
    common = set.intersection(*sets) if len(sets) == len(values) else set()
    return [
        (",".join(word for word in map(str, value) if word not in common) or "none of them")
        if isinstance(value, list)
        else ("none" if value is None else str(value))
        for value in values
    ]


def _named(hosts: object) -> str:
    names = [str(host) for host in hosts] if isinstance(hosts, list) else []
    more = len(names) - _HOSTS_NAMED
    return ", ".join(names[:_HOSTS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _flatten(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _total(hosts: Sequence[Mapping[str, object]], name: str) -> int | None:
    values = [value for facts in hosts if isinstance(value := facts.get(name), int)]
    return sum(values) if len(values) == len(hosts) else None
