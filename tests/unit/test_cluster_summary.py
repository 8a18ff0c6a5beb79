"""What hosts have together, and which differences between them are called out."""

import pytest

from mlpstorage.cluster.facts import cluster_information, difference_warnings, host_facts, summarize
from mlpstorage.cluster.summary import _DIFFER_ANYHOW, _flatten


def host(name: str, **changes: object) -> dict[str, object]:
    """Facts of a made-up host."""
    mount = {"device": "/dev/nvme0n1", "type": "xfs", "free_bytes": len(name)}
    facts = {"host": name, "logical_cores": 64, "memory_total_bytes": 1 << 39, "kernel": "6.8", "cache_mount": mount}
    return {**facts, **changes}


def test_summary_of_equal_hosts() -> None:
    """Totals are sums; what always differs (names, room) is no difference."""
    assert summarize([host("a"), host("bb"), host("ccc")]) == {
        "hosts": 3,
        "total_cores": 192,
        "total_memory_bytes": 3 << 39,
        "differences": {},
    }


def test_summary_calls_out_differences() -> None:
    """Each differing fact lists its values, and the hosts of each; nested facts have dotted names."""
    other_mount = {"device": "/dev/nvme0n1", "type": "ext4", "free_bytes": 1}
    summary = summarize([host("a"), host("b", kernel="6.1"), host("c", cache_mount=other_mount), host("d", gpu="H100")])
    assert summary["differences"] == {
        "cache_mount.type": [{"value": "xfs", "hosts": ["a", "b", "d"]}, {"value": "ext4", "hosts": ["c"]}],
        "gpu": [{"value": None, "hosts": ["a", "b", "c"]}, {"value": "H100", "hosts": ["d"]}],
        "kernel": [{"value": "6.8", "hosts": ["a", "c", "d"]}, {"value": "6.1", "hosts": ["b"]}],
    }


def test_summary_keeps_what_is_unknown() -> None:
    """A total to which one host cannot add its part is None, not a smaller number."""
    summary = summarize([host("a"), host("b", logical_cores=None)])
    assert (summary["total_cores"], summary["total_memory_bytes"]) == (None, 2 << 39)


def test_cluster_information() -> None:
    """Every host's facts stay whole beside the summary."""
    hosts = [host("a"), host("b", kernel="6.1")]
    assert cluster_information(hosts) == {"hosts": hosts, "summary": summarize(hosts)}


@pytest.mark.parametrize(("other_bytes", "differ"), [((1 << 39) - (1 << 30), False), (1 << 38, True)])
def test_memory_differs_only_by_modules(other_bytes: int, *, differ: bool) -> None:
    """Firmware keeps a part for itself, a little more or less of it: 1 GiB of 512 is none, half of it is one."""
    summary = summarize([host("a"), host("b", memory_total_bytes=other_bytes)])
    assert ("memory_total_bytes" in str(summary["differences"])) is differ


def options(*words: str) -> dict[str, object]:
    """A mount on an NFS server with these options."""
    return {"device": "filer:/kv", "type": "nfs4", "free_bytes": 1, "options": list(words)}


def test_addresses_in_mount_options_do_not_differ() -> None:
    """Each client of a server has its own address, and the order of options means nothing."""
    one = options("rw", "vers=4.2", "nconnect=16", "clientaddr=10.1.0.7", "addr=10.1.0.200")
    other = options("rw", "nconnect=16", "vers=4.2", "clientaddr=10.1.0.8", "addr=10.1.0.201")
    hosts = [host("a", cache_mount=one), host("b", cache_mount=other)]
    assert summarize(hosts)["differences"] == {}
    assert difference_warnings(hosts) == []


def test_devices_differ_by_what_they_are() -> None:
    """Names and order of devices differ on equal machines; another firmware or speed is a difference."""

    def disk(name: str, firmware: str) -> dict[str, object]:
        return {"name": name, "model": "X", "firmware": firmware, "size_bytes": 1, "transport": "pcie"}

    def port(name: str, speed: int, driver: str | None = "mlx5_core") -> dict[str, object]:
        return {"name": name, "speed_mbit_per_s": speed, "mtu_bytes": 9000, "driver": driver, "state": "up"}

    first = host("a", block_devices=[disk("nvme0n1", "1"), disk("nvme1n1", "2")], network_interfaces=[port("eth0", 1)])
    swapped = host(
        "b",
        block_devices=[disk("nvme0n1", "2"), disk("nvme1n1", "1")],
        network_interfaces=[port("veth9", 3, None), port("ens1", 1)],
    )
    assert summarize([first, swapped])["differences"] == {}
    old = host("c", block_devices=[disk("nvme0n1", "1"), disk("nvme1n1", "1")], network_interfaces=[port("eth0", 2)])
    assert set(summarize([first, swapped, old])["differences"]) == {"block_devices", "network_interfaces"}  # type: ignore[call-overload]


def test_warnings_of_versions_and_mounts() -> None:
    """Versions and the cache's file system are worth a warning; options are named where not all hosts have them."""
    one = host("a", packages={"numpy": "2.1.0", "obstore": None}, cache_mount=options("rw", "noatime"))
    two = host("b", packages={"numpy": "2.0.0", "obstore": None}, cache_mount=options("rw", "relatime"))
    three = host("c", packages={"numpy": "2.1.0", "obstore": "0.12"}, cache_mount=options("rw"), logical_cores=8)
    assert difference_warnings([one, two, three]) == [
        "hosts differ in cache_mount.options: noatime on a; relatime on b; none of them on c",
        "hosts differ in packages.numpy: 2.1.0 on a, c; 2.0.0 on b",
        "hosts differ in packages.obstore: none on a, b; 0.12 on c",
    ]


def test_warnings_name_a_few_hosts() -> None:
    """A thousand hosts are not listed one by one."""
    many = [host(f"h{number}") for number in range(7)]
    assert difference_warnings([*many, host("z", kernel="6.1")]) == [
        "hosts differ in kernel: 6.8 on h0, h1, h2, h3 and 3 more; 6.1 on z"
    ]


def test_every_fact_that_is_not_compared_is_one() -> None:
    """The list of what equal machines need not share names facts that are really gathered."""
    facts = dict(_flatten(host_facts(None)))
    device = {"cache_device.name", "cache_device.disk", "cache_device.parts"}
    mount = {"cache_mount.device", "cache_mount.free_bytes"}
    assert _DIFFER_ANYHOW - device - mount <= set(facts)
    assert summarize([facts | {"host": "a"}, facts | {"host": "b"}])["differences"] == {}
