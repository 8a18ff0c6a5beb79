"""What a run tells of its hosts: their facts before it begins, and their time series."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Cli, Run

DISK_SECTOR_BYTES = 512

WORKER = """
import glob, json, os, sys, time

def host(name, numpy):
    mount = {"type": "xfs", "options": ["rw", "noatime"], "device": "/dev/sda", "free_bytes": 5}
    return {"host": name, "logical_cores": 4, "memory_total_bytes": 1 << 34, "cache_mount": mount,
            "packages": {"numpy": numpy}}

print(json.dumps({"type": "hosts", "hosts": [host("far-1", "2.1"), host("far-2", "2.0")]}), flush=True)
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    (path,) = glob.glob(os.environ["RESULTS"] + "/kv_cache/*/run/*/*_metadata.json")
    metadata = json.load(open(path))
    if (metadata["cluster_information"] or {"summary": {"hosts": 0}})["summary"]["hosts"] == 2:
        break
print(json.dumps({"type": "error", "exit_code": 5, "message": "it was " + metadata["status"]}), flush=True)
"""


def host_lines(run: Run) -> list[dict[str, Any]]:
    """The time series of the hosts."""
    text = (run.directory / "timeseries_hosts.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_hosts_are_known_before_the_run_begins(cli: Cli, tmp_path: Path) -> None:
    """What ranks tell of their hosts is in the metadata while the run goes on, and different versions are warned of.

    The worker tells of two hosts, and goes on when it sees them in the metadata file.
    """
    worker = tmp_path / "worker"
    worker.write_text(f"#!{sys.executable}\n{WORKER}")
    worker.chmod(0o755)
    ended = cli.run(*cli.load("--kvcache-bin-path", worker), env={"RESULTS": str(cli.results)})
    assert ended.returncode == 5
    assert "it was running" in ended.stderr
    assert "hosts differ in packages.numpy: 2.1 on far-1; 2.0 on far-2" in ended.stderr
    cluster = cli.only_run().metadata["cluster_information"]
    assert [host["host"] for host in cluster["hosts"]] == ["far-1", "far-2"]
    summary = cluster["summary"]
    assert (summary["hosts"], summary["total_cores"], summary["total_memory_bytes"]) == (2, 8, 2 << 34)
    assert set(summary["differences"]) == {"packages.numpy"}


def test_facts_of_this_host(cli: Cli) -> None:
    """A plain run has its host's facts, once, and each rank file has them too."""
    run = cli.play("--layout", "null")
    (host,) = run.metadata["cluster_information"]["hosts"]
    assert host["host"] == os.uname().nodename
    assert host["packages"]["pydantic"]
    assert {"block_devices", "network_interfaces", "rdma_devices"} <= set(host)
    assert run.rank(0)["host_facts"]["host"] == host["host"]
    assert "host_samples" not in run.rank(0)


def device_bytes(name: str) -> tuple[int, int]:
    """What the kernel has counted of a device: bytes read and written."""
    for line in Path("/proc/diskstats").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if fields[2] == name:
            return int(fields[5]) * DISK_SECTOR_BYTES, int(fields[9]) * DISK_SECTOR_BYTES
    return 0, 0


def test_disk_traffic_is_that_of_the_kernel(cli: Cli) -> None:
    """The lines, each rate times its time, add up to no more than this test reads from /proc/diskstats around the run.

    And to no less than the run read and wrote with direct I/O, but for 2 % that it may have moved before the first
    reading. In between is what others did on the same disk while the run started, went on and ended.
    """
    cli.cache.mkdir()
    number = cli.cache.stat().st_dev
    link = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not os.path.exists(link):  # noqa: PTH110 - a path below /sys
        pytest.skip("the temporary directory lies on no block device")
    name = os.path.basename(os.path.realpath(link))  # noqa: PTH119 - likewise
    before = device_bytes(name)
    run = cli.play("--cache-dir", cli.cache, "--duration", "2", "--timeseries-interval", "0.25", "--direct", "always")
    after = device_bytes(name)
    lines = host_lines(run)
    (use,) = run.summary["devices"]
    assert use["device"] == name
    assert 1.0 <= use["covered_s"] <= 2.1
    for part, key, own in ((0, "read_bytes_per_s", "read_bytes"), (1, "written_bytes_per_s", "written_bytes")):
        moved = after[part] - before[part]
        told = sum(line["disks"][name][key] * line["interval_s"] for line in lines)
        assert told <= moved * 1.001
        assert told >= run.summary["storage_total"][own] * 0.98 > 0


def test_lines_follow_the_interval(cli: Cli) -> None:
    """Ten lines a second, of the rank and of its host; none is taken before it is due, and each interval is its own."""
    run = cli.play("--layout", "null", "--timeseries-interval", "0.1", "--warmup", "0.5", "--duration", "1")
    for lines in (run.series, host_lines(run)):
        # Those of a busy machine may be late, and are then fewer.
        assert 5 <= len(lines) <= 16 + 10 * run.summary["window"]["drain_s"]
        dues = [int((line["t_s"] + 0.0006) / 0.1) for line in lines]
        assert dues == sorted(dues)
        assert dues[0] >= 1
        assert {line["phase"] for line in lines} >= {"warmup", "window"}
    assert len(set(dues[:-1])) == len(dues[:-1])
    assert run.metadata["parameters"]["timeseries_interval"] == 0.1
    hosts = host_lines(run)
    assert sum(line["interval_s"] for line in hosts) == pytest.approx(hosts[-1]["t_s"], abs=0.1)


def test_a_long_interval_leaves_one_line_of_the_host(cli: Cli) -> None:
    """A run that is shorter than the interval has no line of its rank, and one of its host, over all of it."""
    run = cli.play("--layout", "null", "--timeseries-interval", "3600")
    assert run.series == []
    (line,) = host_lines(run)
    assert line["interval_s"] == pytest.approx(line["t_s"], abs=0.2)
    assert run.summary["devices"] == []


def test_cost_of_the_time_series_is_counted(cli: Cli) -> None:
    """It is a part of the client's processor time, and not all of it."""
    client = cli.play("--timeseries-interval", "0.1").summary["client"]
    assert 0 < client["sampling_cpu_s"] < client["cpu_s"]


def test_lines_of_the_host_are_there_while_the_run_goes_on(cli: Cli) -> None:
    """And stay when it is interrupted."""
    process = cli.start(*cli.load("--layout", "null", "--duration", "60", "--timeseries-interval", "0.1"))

    def whole_lines() -> list[str]:
        # The last one may be half written.
        texts = [path.read_text() for path in cli.results.glob("kv_cache/*/run/*/timeseries_hosts.jsonl")]
        return texts[0].split("\n")[:-1] if texts else []

    cli.eventually(lambda: len(whole_lines()) >= 3, "three lines of the host's time series")
    assert cli.only_run().metadata["status"] == "running"
    first = [json.loads(line) for line in whole_lines()[:2]]
    process.terminate()
    assert process.wait() == 130
    assert host_lines(cli.only_run())[:2] == first


@pytest.mark.parametrize("value", ["0.09", "3601", "0", "often"])
def test_interval_out_of_range(cli: Cli, value: str) -> None:
    """From a tenth of a second to an hour."""
    ended = cli.run(*cli.load("--timeseries-interval", value))
    assert ended.returncode == 2
    assert "--timeseries-interval" in ended.stderr
