"""Whether the result says who was the limit: the storage, or the processor that drove it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cli.conftest import Cli


@contextlib.contextmanager
def hogs(count: int, core: int) -> Iterator[None]:
    """Processes that use one core as much as they are let."""
    spin = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize("others", [0, 4])
def test_starved_client_is_named_the_bottleneck(cli: Cli, others: int) -> None:
    """A client with storage that costs nothing and one core, or a part of one, is named as the limit, with a reason."""
    core = min(os.sched_getaffinity(0))
    words = cli.load(
        "--layout", "null", "--num-users", "64", "--io-depth", "16", "--duration", "4", "--cpu-mem-gb", "1"
    )
    with hogs(others, core):
        ended = cli.run(*words, prefix=("taskset", "-c", str(core)))
    assert ended.returncode == 0, ended.stderr
    client = cli.only_run().summary["client"]
    assert client["bottleneck"] is True
    assert client["bottleneck_reason"]
    assert client["cpu_wait_s"] is None or client["cpu_wait_s"] > 0
    assert "client bottleneck" in ended.stdout


def test_verdict_follows_from_the_figures(cli: Cli) -> None:
    """The published rule, worked anew from the rank's figures, gives the verdict that the summary has."""
    run = cli.play("--num-users", "2", "--generation-mode", "fast", "--duration", "6", "--storage-gb", "1")
    client, rank = run.summary["client"], run.rank(0)
    measured_s = rank["window"]["measured_s"]
    storage_s = sum(one["sum_ns"] for name, one in rank["latency"].items() if name.startswith("storage_")) / 1e9
    wait_s = rank["client"]["cpu_wait_s"] or 0
    used_up = rank["client"]["cpu_s"] > 0.9 * measured_s * rank["client"]["cores"]
    starved = wait_s > 0.25 * storage_s and wait_s > 0.1 * measured_s
    late = client["loop_lag_p99_ms"] is not None and client["loop_lag_p99_ms"] > 20
    assert storage_s > 0
    assert client["bottleneck"] is (used_up or starved or late)
    assert (client["bottleneck_reason"] is None) is not client["bottleneck"]


def test_cost_of_the_payload_is_counted(cli: Cli) -> None:
    """Stamps and checks cost processor time, less than all of it, and full verification costs more a byte."""
    costs = {}
    for verify in ("stamp", "full"):
        summary = cli.play("--verify", verify, "--duration", "2", "--storage-gb", "1").summary
        client, storage = summary["client"], summary["storage"]
        assert 0 < client["payload_cpu_s"] < client["cpu_s"]
        assert client["payload_cpu_share"] == pytest.approx(client["payload_cpu_s"] / client["cpu_s"])
        costs[verify] = client["payload_cpu_s"] / (storage["read_bytes"] + storage["written_bytes"])
    assert costs["full"] > costs["stamp"]
