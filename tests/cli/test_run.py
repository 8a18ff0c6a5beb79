"""A run from the command line to its files, with real bytes on a real file system."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.trace_files import mooncake

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Cli, Run

GIB = 1 << 30
TINY_BYTES_PER_TOKEN = 2 * 12 * 4 * 128 * 2
"""Of tiny-1b: keys and values of 12 layers, 4 KV heads of 128 values of 2 bytes."""

PROBE = """
import json, subprocess, sys
def moved():
    fields = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return int(fields["read_bytes"]) + int(fields["write_bytes"])
before = moved()
ended = subprocess.run(sys.argv[1:], capture_output=True, text=True)
print(json.dumps({"moved": moved() - before, "returncode": ended.returncode, "stdout": ended.stdout,
                  "stderr": ended.stderr}))
"""
"""Runs a command and tells what the kernel says that it and its children moved: waiting for a child adds its count."""

LATENCIES = {
    "ttft",
    "ttft_without_storage",
    "ttft_without_cache",
    "client_late",
    "prefill_queue",
    "storage_load",
    "request_load",
    "lookup",
    "storage_read",
    "storage_write",
    "storage_delete",
    "queue_wait",
    "write_behind",
}
LATENCY_KEYS = {"count", "mean_ms", "min_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "p999_ms", "max_ms", "histogram"}
TOTAL_KEYS = {"read_bytes", "written_bytes", "padding_bytes", "deleted_bytes", "read_ops", "write_ops", "delete_ops"}
STORAGE_KEYS = TOTAL_KEYS | {
    "read_gib_per_s",
    "write_gib_per_s",
    "read_peak_gib_per_s",
    "read_burst_ratio",
    "direct_files",
    "buffered_files",
    "io_errors",
    "verify_errors",
    "verified_bytes",
    "writes_dropped",
    "dedup_skipped_bytes",
}
SUMMARY_KEYS = {
    "window": {"warmup_s", "measured_s", "drain_s", "requests_in_flight_at_end"},
    "requests": {
        "completed",
        "failed",
        "rate_per_s",
        "prompt_tokens_per_s",
        "cached_tokens_per_s",
        "output_tokens_per_s",
    },
    "hit_ratio": {"tokens", "blocks"},
    "storage": STORAGE_KEYS,
    "storage_total": TOTAL_KEYS,
    "latency": LATENCIES,
    "client": {"cpu_s", "cpu_ms_per_gib", "max_rss_bytes", "loop_lag_p99_ms", "bottleneck"},
    "ttft_parts": {
        "client_late_mean_ms",
        "lookup_mean_ms",
        "storage_load_mean_ms",
        "dram_load_mean_ms",
        "prefill_queue_mean_ms",
        "prefill_mean_ms",
        "storage_share",
    },
    "saved": {"requests", "slower_requests", "mean_ms", "p5_ms", "p50_ms", "p95_ms"},
    "breakeven": {
        "prefill_tokens_per_s",
        "read_gib_per_s_needed",
        "load_gib_per_s",
        "storage_loads",
        "storage_slower_loads",
        "storage_saved_mean_ms",
    },
    "reuse_distance": {"first_use_share", "p50_gib", "p90_gib", "p99_gib"},
    "slo": {"ttft_p95_ms_target", "met", "within_target", "goodput_per_s"},
}
METADATA_KEYS = {
    "schema_version",
    "benchmark_type",
    "model",
    "command",
    "run_datetime",
    "result_dir",
    "status",
    "exit_code",
    "runtime_s",
    "num_processes",
    "parameters",
    "parameter_sources",
    "executed_command",
    "args",
    "cluster_information",
    "software",
    "kvcache_model",
    "num_users",
    "duration",
    "gpu_mem_gb",
    "cpu_mem_gb",
    "cache_dir",
    "generation_mode",
    "performance_profile",
    "kvcache_metrics",
}
SERIES_KEYS = {
    "rank",
    "t_s",
    "phase",
    "requests_completed",
    "requests_in_flight",
    "prompt_tokens",
    "cached_tokens",
    "read_bytes",
    "written_bytes",
    "deleted_bytes",
    "read_gib_per_s",
    "write_gib_per_s",
    "storage_used_bytes",
    "cpu_used_bytes",
    "write_queue_blocks",
}


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, new_cli: Callable[[Path], Cli]
) -> tuple[Cli, Run, dict[str, Any]]:
    """One run of two seconds, its result directory, and what the probe around it saw."""
    cli = new_cli(tmp_path_factory.mktemp("measured"))
    cli.cache.mkdir()
    (cli.cache / "precious.txt").write_text("not the run's\n")
    # What Python reads to import the program is not the run's I/O: let it come from the page cache.
    subprocess.run([sys.executable, "-c", "import mlpstorage.kvcache.rank, mlpstorage.benchmarks.kvcache"], check=True)
    ended = cli.run(
        *cli.load("--duration", "2.2", "--cache-dir", cli.cache, "--label", "team=a b", "--json"),
        prefix=[sys.executable, "-c", PROBE],
    )
    probe: dict[str, Any] = json.loads(ended.stdout)
    assert probe["returncode"] == 0, probe["stderr"]
    return cli, cli.only_run(), probe


@pytest.fixture(scope="module")
def run(measured: tuple[Cli, Run, dict[str, Any]]) -> Run:
    """The run's result directory."""
    return measured[1]


def test_result_directory_has_the_published_layout(run: Run) -> None:
    """`<results>/kv_cache/<model>/run/<datetime>` holds metadata, summary, time series, rank files and logs."""
    datetime = run.directory.name
    assert run.directory.parts[-4:] == ("kv_cache", "tiny-1b", "run", datetime)
    assert {path.name for path in run.directory.iterdir()} == {
        f"kv_cache_{datetime}_metadata.json",
        "summary.json",
        "timeseries.jsonl",
        "timeseries_hosts.jsonl",
        "ranks",
        "logs",
    }
    assert [path.name for path in (run.directory / "ranks").iterdir()] == ["rank_0.json"]


def test_summary_has_every_published_key(run: Run) -> None:
    """No key of the results contract is missing, and a run that moved bytes counts them."""
    summary = run.summary
    for name, keys in SUMMARY_KEYS.items():
        assert keys <= set(summary[name]), name
    assert {"schema_version", "benchmark_type", "run_id", "workload_digest"} <= set(summary)
    assert summary["benchmark_type"] == "kv_cache"
    for latency in summary["latency"].values():
        assert set(latency) == LATENCY_KEYS | {"highest_of_ranks"}
    for ratios in summary["hit_ratio"].values():
        assert set(ratios) == {"gpu", "cpu", "storage", "cross_rank", "total"}
    (host,) = summary["hosts"]
    assert set(host) == {"host", "ranks", "first_done_s", "last_done_s", "read_gib_per_s", "write_gib_per_s"}
    storage = summary["storage"]
    assert summary["requests"]["completed"] > 0
    assert storage["read_ops"] > 0
    assert storage["write_ops"] > 0
    assert storage["delete_ops"] > 0
    assert summary["latency"]["storage_read"]["count"] == storage["read_ops"]
    assert summary["latency"]["storage_write"]["count"] == storage["write_ops"]
    assert (storage["io_errors"], storage["verify_errors"], summary["requests"]["failed"]) == (0, 0, 0)


def test_bytes_are_operations_times_the_object_size(run: Run) -> None:
    """An object is 64 tokens of the model, 1.5 MiB and without padding; every byte read was verified."""
    object_bytes = 64 * TINY_BYTES_PER_TOKEN
    for phase in ("storage", "storage_total"):
        counts = run.summary[phase]
        assert counts["read_bytes"] == counts["read_ops"] * object_bytes
        assert counts["written_bytes"] == counts["write_ops"] * object_bytes
        assert counts["deleted_bytes"] == counts["delete_ops"] * object_bytes
        assert counts["padding_bytes"] == 0
    assert run.summary["storage"]["verified_bytes"] == run.summary["storage"]["read_bytes"]


def test_bytes_agree_with_the_kernel(
    measured: tuple[Cli, Run, dict[str, Any]],
    direct_file_system: str,  # noqa: ARG001 - elsewhere the page cache stands between the run and the kernel's count
) -> None:
    """Bytes of the whole run, padding included, are within 2 % of what the kernel counted, by two routes."""
    _, run, probe = measured
    total, client = run.summary["storage_total"], run.summary["client"]
    told = total["read_bytes"] + total["written_bytes"] + total["padding_bytes"]
    assert told > 100 << 20, "too little to tell anything"
    assert client["os_read_bytes"] + client["os_written_bytes"] == pytest.approx(told, rel=0.02)
    assert probe["moved"] == pytest.approx(told, rel=0.02)


def test_files_are_opened_for_direct_io(
    run: Run,
    direct_file_system: str,  # noqa: ARG001 - the file system is what makes it possible
) -> None:
    """On ext4 and xfs every object bypasses the page cache, and the results say so."""
    assert run.summary["storage"]["direct_files"] > 0
    assert run.summary["storage"]["buffered_files"] == 0


def test_only_the_runs_own_files_are_removed(measured: tuple[Cli, Run, dict[str, Any]]) -> None:
    """After a run nothing of it is left in the cache directory, and what was there before is untouched."""
    cli, run, _ = measured
    assert [path.name for path in cli.cache.rglob("*")] == ["precious.txt"]
    assert (cli.cache / "precious.txt").read_text() == "not the run's\n"
    assert not (run.directory / "cache").exists()


def test_rates_divide_by_the_windows_length(run: Run) -> None:
    """Every rate is its count over the measured seconds, worked out here by hand."""
    summary, counted = run.summary, run.rank(0)["requests"]
    measured_s = summary["window"]["measured_s"]
    assert measured_s == pytest.approx(2.2, rel=0.05)
    assert summary["storage"]["read_gib_per_s"] == pytest.approx(summary["storage"]["read_bytes"] / GIB / measured_s)
    assert summary["storage"]["write_gib_per_s"] == pytest.approx(
        summary["storage"]["written_bytes"] / GIB / measured_s
    )
    requests = summary["requests"]
    assert requests["rate_per_s"] == pytest.approx(requests["completed"] / measured_s)
    assert requests["prompt_tokens_per_s"] == pytest.approx(counted["prompt_tokens"] / measured_s)
    assert requests["output_tokens_per_s"] == pytest.approx(counted["output_tokens"] / measured_s)
    assert requests["cached_tokens_per_s"] == pytest.approx(sum(counted["cached_tokens"].values()) / measured_s)


def test_hit_ratios_are_parts_of_the_prompts(run: Run) -> None:
    """Each tier's ratio is what it held over all that was asked, and the total is their sum."""
    counted = run.rank(0)["requests"]
    for unit, found, of in (
        ("tokens", counted["cached_tokens"], counted["prompt_tokens"]),
        ("blocks", counted["hit_blocks"], counted["prompt_blocks"]),
    ):
        ratios = run.summary["hit_ratio"][unit]
        for tier in ("gpu", "cpu", "storage"):
            assert ratios[tier] == pytest.approx(found[tier] / of)
        assert ratios["total"] == pytest.approx(ratios["gpu"] + ratios["cpu"] + ratios["storage"])
        assert 0 < ratios["storage"] < 1


def test_parts_of_ttft_add_up_to_its_mean(run: Run) -> None:
    """What the mean TTFT is made of leaves nothing out; storage has its share; without modelled time nobody queues."""
    parts = dict(run.summary["ttft_parts"])
    share = parts.pop("storage_share")
    ttft = run.summary["latency"]["ttft"]
    assert ttft["count"] > 0
    # The client rounds to nanoseconds, the summary to the millionth of a millisecond.
    assert sum(parts.values()) == pytest.approx(ttft["mean_ms"], abs=1e-4)
    assert share == pytest.approx(parts["storage_load_mean_ms"] / sum(parts.values()))
    assert parts["prefill_queue_mean_ms"] == 0


def test_break_even_follows_from_the_rank_file(run: Run) -> None:
    """Worked out by hand from what the rank counted: bandwidths of a request and the mean that storage saved."""
    counted, told = run.rank(0)["first_tokens"], run.summary["breakeven"]
    assert counted["storage_loads"] > 0
    loaded_gib = counted["storage_load_tokens"] * TINY_BYTES_PER_TOKEN / GIB
    assert told["load_gib_per_s"] == pytest.approx(loaded_gib / (counted["storage_loads_ns"] / 1e9))
    assert told["read_gib_per_s_needed"] == pytest.approx(loaded_gib / (counted["storage_recompute_ns"] / 1e9))
    saved_ns = counted["storage_recompute_ns"] - counted["storage_loads_ns"]
    assert told["storage_saved_mean_ms"] == pytest.approx(saved_ns / 1e6 / counted["storage_loads"])
    slo = run.summary["slo"]
    assert slo["goodput_per_s"] == pytest.approx(counted["within_target"] / run.summary["window"]["measured_s"])


def test_percentiles_lie_between_minimum_and_maximum(run: Run) -> None:
    """Percentiles rise, and one with fewer than ten samples above it is null, not a number."""
    for latency in run.summary["latency"].values():
        shown = [latency[key] for key in ("min_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "p999_ms", "max_ms")]
        given = [value for value in shown if value is not None]
        assert given == sorted(given)
        for key, part in (("p50_ms", 0.5), ("p90_ms", 0.1), ("p95_ms", 0.05), ("p99_ms", 0.01), ("p999_ms", 0.001)):
            enough = int(latency["count"] * part + 1e-9) >= 10
            assert (latency[key] is not None) == enough, (key, latency["count"])


def test_time_series_has_a_line_a_second(run: Run) -> None:
    """A run of 2.4 seconds has lines at one and at two seconds, with every key, and its counters only grow."""
    series = run.series
    assert [round(line["t_s"]) for line in series] == [1, 2]
    for line in series:
        assert set(line) == SERIES_KEYS
        assert line["storage_used_bytes"] > 0
    for key in ("requests_completed", "prompt_tokens", "read_bytes", "written_bytes", "deleted_bytes"):
        assert series[0][key] <= series[1][key] <= 10**12, key
    total = run.summary["storage_total"]
    assert 0 < series[1]["written_bytes"] <= total["written_bytes"]


def test_metadata_tells_what_ran(measured: tuple[Cli, Run, dict[str, Any]]) -> None:
    """The metadata has the published keys, the words of the invocation, the labels and the outcome."""
    cli, run, _ = measured
    metadata = run.metadata
    assert set(metadata) >= METADATA_KEYS
    assert {"hosts", "exec_type"} & set(metadata) == set(), "they appear only when set"
    assert (metadata["status"], metadata["exit_code"]) == ("complete", 0)
    assert metadata["result_dir"] == str(run.directory)
    assert metadata["cache_dir"] == str(cli.cache)
    assert metadata["labels"] == {"team": "a b"}
    assert metadata["args"] == cli.load("--duration", "2.2", "--cache-dir", cli.cache, "--label", "team=a b", "--json")
    assert metadata["runtime_s"] >= 2.4
    assert set(metadata["software"]) >= {"mlpstorage", "python", "mpi"}
    assert metadata["kvcache_metrics"]["requests_completed"] == run.summary["requests"]["completed"]


def test_json_is_one_document_on_standard_output(measured: tuple[Cli, Run, dict[str, Any]]) -> None:
    """With --json standard output is one JSON document with the metadata and the numbers, and nothing else."""
    _, run, probe = measured
    document = json.loads(probe["stdout"])
    assert document["metadata"] == run.metadata
    assert document["summary"] == run.summary


def test_quiet_prints_nothing(cli: Cli) -> None:
    """With --quiet a run that goes well leaves both streams empty."""
    ended = cli.run(*cli.load("--quiet"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_summary_table_names_the_result_directory(cli: Cli) -> None:
    """Without --json a run ends with a table, the result directory and the next command, on standard output."""
    ended = cli.run(*cli.load())
    assert ended.returncode == 0, ended.stderr
    assert str(cli.only_run().directory) in ended.stdout
    assert f"mlpstorage history show {cli.only_run().metadata['run_id']}" in ended.stdout


def test_cache_below_the_result_directory_is_removed(cli: Cli) -> None:
    """Without --cache-dir the files lie below the result directory, and nothing is left of them after the run."""
    run = cli.play("--duration", "0.6")
    assert run.metadata["cache_dir"] == str(run.directory / "cache")
    assert not (run.directory / "cache").exists()


def test_seed_decides_the_workload(cli: Cli, run: Run) -> None:
    """Equal seeds play equal requests, whatever else differs in time; another seed plays others."""
    same = cli.play("--duration", "0.6", "--seed", "42")
    other = cli.play("--duration", "0.6", "--seed", "43")
    assert same.summary["workload_digest"] == run.summary["workload_digest"]
    assert other.summary["workload_digest"] != run.summary["workload_digest"]


def test_sources_and_precedence_of_parameters(cli: Cli) -> None:
    """A flag wins over the environment, that over the config file, that over the default; the metadata tells which."""
    config = cli.place / "config.yaml"
    config.write_text("num_users: 3\nseed: 7\nio_threads: 4\ntouch: head\n")
    run = cli.play(
        *("--num-users", "5", "--config-file", config, "--duration", "0.6"),
        env={"MLPSTORAGE_NUM_USERS": "4", "MLPSTORAGE_SEED": "8"},
    )
    parameters, sources = run.metadata["parameters"], run.metadata["parameter_sources"]
    assert (parameters["num_users"], sources["num_users"]) == (5, "flag")
    assert (parameters["seed"], sources["seed"]) == (8, "env")
    assert (parameters["io_threads"], sources["io_threads"]) == (4, "file")
    assert (parameters["touch"], sources["touch"]) == ("head", "file")
    assert (parameters["accelerator"], sources["accelerator"]) == ("h100", "default")
    assert set(parameters) == set(sources)


def test_automatic_sizes_are_recorded(cli: Cli) -> None:
    """A size that was left to the program is in the metadata as a number, with the source `auto`."""
    base = ["kvcache", "run", "--results-dir", cli.results, "--model", "tiny-1b", "--num-users", "2"]
    ended = cli.run(*base, "--generation-mode", "none", "--gpu-mem-gb", "0", "--duration", "1", "--block-tokens", "64")
    assert ended.returncode == 0, ended.stderr
    metadata = cli.only_run().metadata
    for name in ("cpu_mem_gb", "storage_gb", "warmup"):
        assert metadata["parameter_sources"][name] == "auto"
        assert metadata["parameters"][name] > 0
    assert metadata["parameters"]["warmup"] == pytest.approx(0.2)
    assert metadata["parameters"]["cpu_mem_gb"] <= 32


def test_objects_are_padded_to_full_pages(cli: Cli) -> None:
    """An object of 16 tokens of deepseek-v3 is 1,124,352 bytes, half a page short: 2,048 bytes are added to each."""
    run = cli.play("--model", "deepseek-v3", "--block-tokens", "16", "--num-users", "4")
    object_bytes = 16 * 61 * (512 + 64) * 2
    assert object_bytes == 1_124_352
    total = run.summary["storage_total"]
    assert total["write_ops"] > 0
    assert total["written_bytes"] == total["write_ops"] * object_bytes
    assert total["padding_bytes"] == (total["read_ops"] + total["write_ops"]) * (275 * 4096 - object_bytes)


def test_trace_is_played_whole(cli: Cli) -> None:
    """All requests of a trace are answered; every different full block of 512 tokens is written once, of 12 MiB."""
    # Each begins with block 0 and ends with a partial block, which is never stored.
    requests = [(100 * n, 2 * 512 + 100, [0, 10 * n + 1, 10 * n + 2]) for n in range(8)]
    trace = mooncake(cli.place / "trace.jsonl", requests)
    run = cli.play("--trace", trace, "--warmup", "0", "--duration", "30")
    summary, counted = run.summary, run.rank(0)["requests"]
    assert counted["completed"] == 8
    assert counted["prompt_tokens"] == 8 * 1124
    assert counted["output_tokens"] == 8 * 10
    assert summary["storage_total"]["write_ops"] == 9
    assert summary["storage_total"]["written_bytes"] == 9 * 512 * TINY_BYTES_PER_TOKEN
    assert 0.7 <= summary["window"]["measured_s"] < 30, "from the first arrival to the last answer"
    assert run.metadata["parameters"]["trace"] == str(trace)


def test_max_requests_and_time_scale(cli: Cli) -> None:
    """--max-requests plays the beginning of a trace; --time-scale stretches or shortens its time."""
    requests = [(100_000 * n, 1024, [2 * n, 2 * n + 1]) for n in range(10)]
    trace = mooncake(cli.place / "trace.jsonl", requests)
    run = cli.play(
        *("--trace", trace, "--max-requests", "4", "--time-scale", "0.002", "--warmup", "0", "--duration", "30")
    )
    assert run.rank(0)["requests"]["completed"] == 4
    assert run.summary["storage_total"]["write_ops"] == 8
    # The fourth request arrives at 300 s of the trace.
    assert 0.6 <= run.summary["window"]["measured_s"] < 30


def test_trace_with_reuse_reads_what_it_wrote(cli: Cli) -> None:
    """A prompt that comes again when its blocks are stored finds them on storage and reads each once."""
    # The first answer and its two writes of 12 MiB have three seconds to end before the prompt comes again.
    trace = mooncake(cli.place / "trace.jsonl", [(0, 1024, [1, 2]), (3000, 1024, [1, 2])])
    run = cli.play("--trace", trace, "--warmup", "0", "--duration", "30")
    total, counted = run.summary["storage_total"], run.rank(0)["requests"]
    assert (total["write_ops"], total["read_ops"]) == (2, 2)
    assert counted["hit_blocks"] == {"gpu": 0, "cpu": 0, "storage": 2}
    assert counted["cached_tokens"]["storage"] <= 1024


def test_another_worker_program_is_started(cli: Cli) -> None:
    """`--kvcache-bin-path` starts that program, with the flags of a rank, in the place of the built-in one."""
    worker = cli.place / "a worker.sh"
    worker.write_text(
        f'#!/bin/sh\ntouch "{cli.place}/was here"\nexec "{sys.executable}" -m mlpstorage.kvcache.rank "$@"\n'
    )
    worker.chmod(0o755)
    run = cli.play("--kvcache-bin-path", worker)
    assert (cli.place / "was here").exists()
    assert run.metadata["parameters"]["kvcache_bin_path"] == str(worker)
    assert run.summary["requests"]["completed"] > 0
