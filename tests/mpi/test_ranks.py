"""Several ranks on this machine, started by a real MPI launcher."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trace_files import mooncake

BIN = Path(sys.executable).parent
SEARCH = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])


def two_ranks(place: Path, *flags: str | Path) -> tuple[Path, dict[str, Any]]:
    """Result directory and summary of a run of two ranks."""
    if shutil.which("mpirun", path=SEARCH) is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("no mpirun or no mpi4py: install mlpstorage[mpi]")
    words = (
        "kvcache run --model tiny-1b --num-users 3 --generation-mode none --gpu-mem-gb 0 --storage-gb 0.3 "
        "--num-processes 2 --oversubscribe --allow-run-as-root"
    )
    ended = subprocess.run(
        [BIN / "mlpstorage", *words.split(), *flags, "--results-dir", place / "results"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    (summary_path,) = place.glob("results/kv_cache/tiny-1b/run/*/summary.json")
    return summary_path.parent, json.loads(summary_path.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of synthetic users on files."""
    place = tmp_path_factory.mktemp("ranks")
    # Runs of other tests may take the processors meanwhile: in 2 s there would at times be no answer.
    flags = ["--duration", "6", "--warmup", "0.2", "--cpu-mem-gb", "0.02", "--block-tokens", "64"]
    found = two_ranks(place, *flags, "--cache-dir", place / "cache")
    assert not list(place.glob("cache/**/*"))
    return found


def ranks_of(directory: Path) -> list[dict[str, Any]]:
    """The rank files, in rank order."""
    return [json.loads((directory / "ranks" / f"rank_{number}.json").read_text()) for number in (0, 1)]


def test_totals_are_the_sums_over_the_ranks(result: tuple[Path, dict[str, Any]]) -> None:
    """Bytes, operations and requests of the summary are those of both ranks, and each rank did some."""
    directory, summary = result
    ranks = ranks_of(directory)
    for name in ("read_bytes", "written_bytes", "read_ops", "write_ops"):
        assert all(rank["storage_total"][name] > 0 for rank in ranks)
        assert summary["storage_total"][name] == sum(rank["storage_total"][name] for rank in ranks)
    assert summary["requests"]["completed"] == sum(rank["requests"]["completed"] for rank in ranks)
    assert summary["storage"]["io_errors"] == summary["storage"]["verify_errors"] == 0


def test_ranks_play_different_users(result: tuple[Path, dict[str, Any]]) -> None:
    """Each rank has a random stream of its own, and the ranks are those of one run."""
    first, second = ranks_of(result[0])
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["run_id"] == second["run_id"] == result[1]["run_id"]
    assert first["workload_digest"] != second["workload_digest"]


def test_digests_are_those_of_the_ranks_in_their_order(result: tuple[Path, dict[str, Any]]) -> None:
    """SHA-256 of the ranks' digests, one a line: of what they played, and of what they did."""
    directory, summary = result
    for name in ("workload_digest", "operations_digest"):
        lines = "".join(f"{rank[name]}\n" for rank in ranks_of(directory))
        assert summary[name] == hashlib.sha256(lines.encode()).hexdigest()


def test_parts_of_ttft_are_means_over_both_ranks(result: tuple[Path, dict[str, Any]]) -> None:
    """Sums of the rank files over all first tokens; their sum is the pooled mean."""
    directory, summary = result
    counted = [rank["first_tokens"] for rank in ranks_of(directory)]
    requests = sum(one["requests"] for one in counted)
    assert all(one["requests"] > 0 for one in counted)
    parts = dict(summary["ttft_parts"])
    loaded_ns = sum(one["storage_load_ns"] for one in counted)
    assert parts["storage_load_mean_ms"] == pytest.approx(loaded_ns / 1e6 / requests)
    del parts["storage_share"]
    assert sum(parts.values()) == pytest.approx(summary["latency"]["ttft"]["mean_ms"], abs=1e-4)


@pytest.mark.parametrize("mode", [("--arrivals", "open"), ("--arrivals", "closed"), ("--request-rate", "40")])
def test_two_ranks_share_a_trace(tmp_path: Path, mode: tuple[str, str]) -> None:
    """Each request is played once, by one of them, which writes its blocks: none is left out, none comes twice."""
    requests = [(50 * number, 1_100 + number, [2 * number, 2 * number + 1, 1_000]) for number in range(11)]
    trace = mooncake(tmp_path / "trace.jsonl", requests)
    whole = ("--warmup", "0", "--duration", "30", "--cpu-mem-gb", "0", "--layout", "null")
    directory, summary = two_ranks(tmp_path, *whole, *mode, "--trace", trace)
    ranks = ranks_of(directory)
    assert [rank["requests"]["completed"] for rank in ranks] == [6, 5]
    assert summary["requests"]["completed"] == 11
    assert sum(rank["requests"]["prompt_tokens"] for rank in ranks) == 11 * 1_100 + 55
    assert [rank["storage_total"]["write_ops"] for rank in ranks] == [12, 10]


def test_percentiles_are_of_the_pooled_samples(result: tuple[Path, dict[str, Any]]) -> None:
    """The summary's median write is the one that this test finds in the added-up buckets of both ranks."""
    directory, summary = result
    pooled: dict[int, int] = {}
    for rank in ranks_of(directory):
        for bucket, count in rank["latency"]["storage_write"]["counts"].items():
            pooled[int(bucket)] = pooled.get(int(bucket), 0) + count
    total = sum(pooled.values())
    assert total == summary["latency"]["storage_write"]["count"] >= 20
    seen = 0
    for bucket in sorted(pooled):
        seen += pooled[bucket]
        if seen * 2 >= total:
            break
    # A bucket above 256 ns: exponent in the upper part of its number, seven bits of mantissa below.
    exponent = bucket // 128 - 1
    low_ns = (bucket - exponent * 128) * 2**exponent
    assert low_ns <= summary["latency"]["storage_write"]["p50_ms"] * 1e6 <= low_ns + 2**exponent


def test_p99_is_of_the_pooled_samples_and_the_worst_rank_stands_beside_it(result: tuple[Path, dict[str, Any]]) -> None:
    """Of the wait in the queue, which has samples enough: both found by this test in the rank files."""
    directory, summary = result
    of_ranks = [
        {int(bucket): count for bucket, count in rank["latency"]["queue_wait"]["counts"].items()}
        for rank in ranks_of(directory)
    ]
    pooled = {bucket: sum(one.get(bucket, 0) for one in of_ranks) for bucket in set().union(*of_ranks)}
    found = summary["latency"]["queue_wait"]
    assert found["count"] == sum(pooled.values())
    for name, percent in (("p50_ms", 50), ("p95_ms", 95), ("p99_ms", 99)):
        low_ns, high_ns = bounds_ns(*nearest(pooled, percent))
        assert found[name] is None or low_ns <= found[name] * 1e6 <= high_ns
        assert (found[name] is None) == (nearest(pooled, percent)[1] < 10)
        own = [nearest(one, percent) for one in of_ranks]
        known = [bucket for bucket, above in own if above >= 10]
        highest = found["highest_of_ranks"][name]
        assert (highest is None) == (not known)
        if highest is not None:
            low_ns, high_ns = bounds_ns(max(known), 0)
            assert low_ns <= highest["ms"] * 1e6 <= high_ns
            assert own[highest["rank"]][0] == max(known)
    assert found["p50_ms"] is not None


def nearest(counts: dict[int, int], percent: int) -> tuple[int, int]:
    """The bucket of the nearest rank, and how many samples rank above it."""
    total, seen = sum(counts.values()), 0
    wanted = -(-total * percent // 100)
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= wanted:
            return bucket, total - wanted
    raise AssertionError("no samples")


def bounds_ns(bucket: int, _above: int) -> tuple[int, int]:
    """Values of a bucket: exact below 256 ns, then seven bits of mantissa below an exponent."""
    if bucket < 256:
        return bucket, bucket
    exponent = bucket // 128 - 1
    low_ns = (bucket - exponent * 128) * 2**exponent
    return low_ns, low_ns + 2**exponent


def test_ranks_of_one_machine_find_that_their_clocks_are_one(result: tuple[Path, dict[str, Any]]) -> None:
    """Both read the kernel's monotonic clock, so that the true offset is 0: the bound holds, and is not idle."""
    directory, summary = result
    first, second = (rank["clock"] for rank in ranks_of(directory))
    assert (first["offset_ns"], first["offset_error_ns"]) == (0, 0)
    assert abs(second["offset_ns"]) <= second["offset_error_ns"] < 1e9
    assert second["offset_error_ns"] > 0
    assert summary["clock"]["max_offset_error_ms"] == second["offset_error_ns"] / 1e6
    late_ns = [first["start_late_ns"], second["start_late_ns"]]
    assert min(late_ns) >= 0
    assert summary["clock"]["start_skew_ms"] == (max(late_ns) - min(late_ns)) / 1e6


def test_lines_of_all_ranks_are_in_the_time_series(result: tuple[Path, dict[str, Any]]) -> None:
    """Both ranks have one a second; all ranks reported, and none is marked incomplete."""
    directory, summary = result
    lines = [json.loads(line) for line in (directory / "timeseries.jsonl").read_text().splitlines()]
    assert {line["rank"] for line in lines} == {0, 1}
    assert summary["incomplete_ranks"] == []
    assert [row["rank"] for row in summary["ranks"]] == [0, 1]


def test_ranks_end_a_steady_warm_up_together(tmp_path: Path) -> None:
    """Hit ratios of both are steady at the same span: their windows begin at one moment, a span's end and a lead on."""
    directory, summary = two_ranks(
        tmp_path, "--duration", "1", "--warmup", "steady", "--cpu-mem-gb", "0", "--layout", "null"
    )
    warmups_s = [rank["window"]["warmup_s"] for rank in ranks_of(directory)]
    assert max(warmups_s) - min(warmups_s) < 0.5
    assert 15 <= min(warmups_s) < 600
    assert summary["window"]["warmup_steady"] is True
    assert min(warmups_s) % 5 < 2


def test_one_rank_of_a_host_tells_of_it(result: tuple[Path, dict[str, Any]]) -> None:
    """Two ranks on one host: its facts and its time series are there once, and both rank files have the facts."""
    directory, _ = result
    (path,) = directory.glob("kv_cache_*_metadata.json")
    cluster = json.loads(path.read_text())["cluster_information"]
    (host,) = cluster["hosts"]
    assert cluster["summary"]["hosts"] == 1
    assert host["host"] == os.uname().nodename
    assert [rank["host_facts"] for rank in ranks_of(directory)] == [host, host]
    lines = [json.loads(line) for line in (directory / "timeseries_hosts.jsonl").read_text().splitlines()]
    times_s = [line["t_s"] for line in lines]
    assert len(times_s) >= 2
    assert times_s == sorted(set(times_s))
    assert {line["host"] for line in lines} == {os.uname().nodename}
    assert sum(line["interval_s"] for line in lines) == pytest.approx(times_s[-1], abs=0.2)


def test_metadata_names_ranks_and_hosts(result: tuple[Path, dict[str, Any]]) -> None:
    """Metadata says how the ranks were started and where they ran, and by which MPI."""
    directory, summary = result
    (path,) = directory.glob("kv_cache_*_metadata.json")
    metadata = json.loads(path.read_text())
    assert metadata["num_processes"] == metadata["ranks"] == 2
    assert metadata["exec_type"] == "mpi"
    assert metadata["hosts"] == ["127.0.0.1"]
    assert metadata["software"]["mpi"]
    (host,) = summary["hosts"]
    assert host["host"] == os.uname().nodename
    assert host["ranks"] == 2
    assert host["first_done_s"] <= host["last_done_s"]
