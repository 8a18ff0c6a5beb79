"""The arguments of `mlpstorage kvcache`: defaults on a plain parser, forms that are accepted, and the help."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlpstorage.cli.kvcache_args import add_kvcache_arguments
from mlpstorage.cli.parser import build_parser
from mlpstorage.config import (
    EXEC_TYPE,
    KVCACHE_MODELS,
    DirectMode,
    Eviction,
    GenerationMode,
    IoEngineName,
    IoPriority,
    Layout,
    PerformanceProfile,
    Promotion,
    StorePolicy,
    TouchOrder,
    WriteOverflow,
    WriteSync,
)
from mlpstorage.errors import UsageError

PROGRAM = Path(sys.executable).parent / "mlpstorage"


def parsed(*words: str) -> argparse.Namespace:
    """What a plain parser makes of the words."""
    parser = argparse.ArgumentParser()
    add_kvcache_arguments(parser)
    return parser.parse_args(list(words))


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("command", "run"),
        ("model", "llama3.1-8b"),
        ("num_users", 100),
        ("duration", 60),
        ("warmup", None),
        ("gpu_mem_gb", 16.0),
        ("cpu_mem_gb", None),
        ("storage_gb", None),
        ("cache_dir", None),
        ("generation_mode", GenerationMode.REALISTIC),
        ("performance_profile", PerformanceProfile.LATENCY),
        ("disable_multi_turn", False),
        ("disable_prefix_caching", False),
        ("seed", 42),
        ("hosts", ["127.0.0.1"]),
        ("exec_type", EXEC_TYPE.MPI),
        ("num_processes", None),
        ("mpi_bin", "mpirun"),
        ("oversubscribe", False),
        ("allow_run_as_root", False),
        ("mpi_params", None),
        ("kvcache_bin_path", None),
        ("results_dir", None),
        ("what_if", False),
        ("touch", TouchOrder.TAIL),
        ("block_tokens", None),
        ("workload", None),
        ("enable_rag", False),
        ("rag_num_docs", 10),
        ("trace_format", None),
        ("arrivals", None),
        ("request_rate", None),
        ("time_scale", 1.0),
        ("spread_arrivals", 0.0),
        ("trials", 1),
        ("promote", Promotion.ALWAYS),
        ("decisions", None),
        ("profile", None),
        ("layout", None),
        ("tensor_parallel", 1),
        ("io_engine", IoEngineName.THREADS),
        ("io_depth", None),
        ("io_threads", None),
        ("io_priority", IoPriority.SPLIT),
        ("direct", DirectMode.AUTO),
        ("write_sync", WriteSync.NONE),
        ("verify", None),
        ("file_levels", None),
        ("keep_cache", False),
        ("reuse_cache", False),
        ("store_policy", StorePolicy.ALWAYS),
        ("eviction", Eviction.LRU),
        ("evict_above", 1.0),
        ("evict_to", None),
        ("write_overflow", WriteOverflow.BLOCK),
        ("write_queue_gib", 1.0),
        ("write_queue_s", None),
        ("write_batch", 16),
        ("write_interval_s", 0.0),
        ("load_batch", 1),
        ("min_load_tokens", 0),
        ("load_timeout", None),
    ],
)
def test_defaults_of_a_run(name: str, default: object) -> None:
    """A plain `argparse.ArgumentParser` gives the published defaults."""
    assert getattr(parsed("run"), name) == default


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--model", "tiny-1b"], "model", "tiny-1b"),
        (["-m", "mistral-7b"], "model", "mistral-7b"),
        (["-nu", "7"], "num_users", 7),
        (["-d", "12.5"], "duration", 12.5),
        (["-np", "4"], "num_processes", 4),
        (["-s", "a", "b"], "hosts", ["a", "b"]),
        (["--hosts", "h[1-4]"], "hosts", ["h[1-4]"]),
        (["--hosts", "a,b"], "hosts", ["a,b"]),
        (["-et", "mpi"], "exec_type", EXEC_TYPE.MPI),
        (["--mpi-bin", "mpiexec"], "mpi_bin", "mpiexec"),
        (["--mpi-params", "a", "b"], "mpi_params", [["a", "b"]]),
        (["--mpi-params=--mca x y"], "mpi_params", [["--mca x y"]]),
        (["--mpi-params", "a", "--mpi-params", "b", "c"], "mpi_params", [["a"], ["b", "c"]]),
        (["--generation-mode", "fast"], "generation_mode", GenerationMode.FAST),
        (["--performance-profile", "throughput"], "performance_profile", PerformanceProfile.THROUGHPUT),
        (["-rd", "/a b"], "results_dir", "/a b"),
        (["--label", "a=1", "b=2", "--label", "c=3"], "label", [["a=1", "b=2"], ["c=3"]]),
        (["-c", "x.yaml"], "config_file", "x.yaml"),
        (["--what-if"], "what_if", True),
        (["--oversubscribe"], "oversubscribe", True),
        (["--profile", "vllm-fs"], "profile", "vllm-fs"),
        (["--profile", "none"], "profile", "none"),
        (["--layout", "slab"], "layout", Layout.SLAB),
        (["--cache-dir", "s3://bucket/kv"], "cache_dir", "s3://bucket/kv"),
        (["--io-depth", "32"], "io_depth", 32),
        (["--direct", "always"], "direct", DirectMode.ALWAYS),
        (["--file-levels", "3,2"], "file_levels", "3,2"),
        (["--write-queue-s", "none"], "write_queue_s", "none"),
        (["--load-timeout", "2:0.1:30"], "load_timeout", "2:0.1:30"),
        (["--keep-cache"], "keep_cache", True),
    ],
)
def test_forms_of_flags(words: list[str], name: str, value: object) -> None:
    """Long and short flags, lists, and values that begin with a dash."""
    assert getattr(parsed("run", *words), name) == value


def test_what_stood_on_the_command_line_is_known() -> None:
    """A flag that repeats the default was given all the same; a default was not."""
    args = parsed("run", "--num-users", "100", "--oversubscribe")
    assert set(args.given) == {"num_users", "oversubscribe"}
    assert set(parsed("run").given) == set()


@pytest.mark.parametrize("model", KVCACHE_MODELS)
def test_every_model_is_accepted(model: str) -> None:
    """By both commands."""
    assert parsed("run", "--model", model).model == parsed("datasize", "--model", model).model == model


def test_an_estimate_has_no_host_or_mpi_option() -> None:
    """`datasize` runs nothing."""
    names = set(vars(parsed("datasize")))
    assert {"model", "num_users", "gpu_mem_gb", "cpu_mem_gb", "storage_gb", "block_tokens"} <= names
    assert {"tensor_parallel", "profile"} <= names
    assert not names & {
        "hosts",
        "exec_type",
        "num_processes",
        "mpi_bin",
        "mpi_params",
        "what_if",
        "duration",
        "cache_dir",
    }


def test_trace_inspect_takes_capacities() -> None:
    """Several of them, each 1 or more."""
    args = parsed("trace", "inspect", "t.jsonl", "--capacity-blocks", "5", "--capacity-blocks", "6", "--touch", "head")
    assert (args.trace, args.capacity_blocks, args.touch) == ("t.jsonl", [5, 6], TouchOrder.HEAD)
    assert parsed("trace", "inspect", "t.jsonl").capacity_blocks is None


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--num-user", "5"],
        ["run", "--dur", "5"],
        ["run", "--what"],
        ["run", "--enable-autoscaling"],
        ["run", "--closed"],
        ["run", "--arrivals", "random"],
        ["run", "--trace-format", "csv"],
        ["run", "--trials", "some"],
        ["datasize", "--trials", "3"],
        ["run", "--model", "gpt-9"],
        ["run", "--num-users", "many"],
        ["run", "--generation-mode", "slow"],
        ["run", "--exec-type", "ssh"],
        ["run", "--profile", "vllm"],
        ["run", "--layout", "tree"],
        ["run", "--io-depth", "deep"],
        ["datasize", "--layout", "slab"],
        ["run", "--hosts"],
        ["datasize", "--hosts", "a"],
        ["trace", "inspect", "t.jsonl", "--capacity-blocks", "0"],
        ["trace", "inspect"],
        ["simulate"],
        [],
    ],
    ids=" ".join,
)
def test_the_command_refuses(words: list[str]) -> None:
    """An abbreviation, an unknown flag or command, a wrong type or choice: one line, by the product's own parser."""
    argv = ["kvcache", *words]
    with pytest.raises(UsageError, match=r"see `mlpstorage.* --help`") as refused:
        build_parser(argv).parse_args(argv)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def help_groups() -> dict[str, str]:
    """The groups of `mlpstorage kvcache run --help` by their headings."""
    done = subprocess.run(
        [str(PROGRAM), "kvcache", "run", "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    parts = re.split(r"^(\S.*):$", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def flags_of(group: str) -> set[str]:
    """Long flags that begin a line of a group."""
    return set(re.findall(r"^  (--[a-z-]+)", group, flags=re.MULTILINE))


def test_host_and_mpi_flags_stand_under_distributed_execution(help_groups: dict[str, str]) -> None:
    """All of them, and no other."""
    assert flags_of(help_groups["Distributed execution"]) == {
        "--hosts",
        "--exec-type",
        "--num-processes",
        "--mpi-bin",
        "--oversubscribe",
        "--allow-run-as-root",
        "--mpi-params",
        "--kvcache-bin-path",
    }


def test_every_flag_stands_under_a_heading_with_its_meaning(help_groups: dict[str, str]) -> None:
    """Only `-h` is left under "options"; every published flag that works is there once."""
    assert flags_of(help_groups["options"]) == set()
    flags = [flag for name, group in help_groups.items() if name != "options" for flag in sorted(flags_of(group))]
    assert len(flags) == len(set(flags))
    published = {"--model", "--num-users", "--duration", "--gpu-mem-gb", "--cpu-mem-gb", "--storage-gb", "--cache-dir"}
    published |= {"--generation-mode", "--performance-profile", "--disable-multi-turn", "--disable-prefix-caching"}
    published |= {"--seed", "--results-dir", "--what-if", "--json", "--quiet", "--debug", "--verbose", "--config-file"}
    assert published | {"--label", "--trace", "--time-scale", "--max-requests"} <= set(flags)
    assert "(default: 16)" in help_groups["Tiers"]
    assert {"--profile", "--layout", "--tensor-parallel", "--io-engine", "--io-depth", "--io-threads"} <= flags_of(
        help_groups["Storage I/O"]
    )
    assert {"--direct", "--write-sync", "--verify", "--keep-cache", "--reuse-cache"} <= flags_of(
        help_groups["Storage I/O"]
    )
    assert {"--store-policy", "--eviction", "--write-batch", "--load-timeout"} <= flags_of(help_groups["Cache policy"])
    assert "(default: llama3.1-8b)" in " ".join(help_groups["Workload"].split())
