"""`KVCacheBenchmark` as scripts use it: made from a plain namespace, asked for its metadata and its command."""

import logging
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest

from mlpstorage.benchmarks.kvcache import KVCacheBenchmark
from mlpstorage.config import BENCHMARK_TYPES, EXEC_TYPE
from mlpstorage.errors import MLPStorageError, UsageError

VERIFY = Path(__file__).resolve().parents[3] / "shared" / "spec" / "verify_metadata.py"


def arguments(results_dir: Path, **changes: object) -> Namespace:
    """Every argument that the published interface names, for two hosts that do not exist."""
    values: dict[str, object] = {
        "command": "run",
        "model": "llama3.1-8b",
        "num_users": 100,
        "duration": 60,
        "gpu_mem_gb": 16.0,
        "cpu_mem_gb": 32.0,
        "cache_dir": "/tmp/cache",  # noqa: S108 - a plan only, nothing is created
        "generation_mode": "realistic",
        "performance_profile": "latency",
        "exec_type": EXEC_TYPE.MPI,
        "hosts": ["host1", "host2"],
        "num_processes": 2,
        "mpi_bin": "mpirun",
        "oversubscribe": False,
        "allow_run_as_root": False,
        "mpi_params": None,
        "kvcache_bin_path": None,
        "disable_multi_turn": False,
        "disable_prefix_caching": False,
        "enable_rag": False,
        "enable_autoscaling": False,
        "seed": None,
        "results_dir": str(results_dir),
        "closed": False,
        "what_if": True,
        "debug": False,
        "verbose": False,
        "stream_log_level": "INFO",
    }
    return Namespace(**(values | changes))


LOCAL: dict[str, object] = {"exec_type": None, "hosts": None, "num_processes": None}


@pytest.fixture
def results_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results directory that is not there, in an environment without settings of the product."""
    for name in ("RESULTS_DIR", "HOSTS", "NUM_USERS", "MODEL"):
        monkeypatch.delenv(f"MLPSTORAGE_{name}", raising=False)
    return tmp_path / "results"


@pytest.fixture
def collect() -> Iterator[MagicMock]:
    """The collection of cluster facts, which answers None and remembers that it was asked."""
    with patch.object(KVCacheBenchmark, "_collect_cluster_information", return_value=None) as collected:
        yield collected


def made(results_dir: Path, **changes: object) -> KVCacheBenchmark:
    """A benchmark of those arguments."""
    return KVCacheBenchmark(arguments(results_dir, **changes), logger=MagicMock())


@pytest.mark.usefixtures("collect")
class TestKVCacheMetadata:
    """What the metadata holds before the run."""

    def test_metadata_has_required_fields(self, results_dir: Path) -> None:
        """Fields that every benchmark has, under the names that the history reads."""
        benchmark = KVCacheBenchmark(arguments(results_dir), logger=MagicMock(), run_datetime="20250115_120000")
        expected = {
            "benchmark_type": "kv_cache",
            "model": "llama3.1-8b",
            "command": "run",
            "run_datetime": "20250115_120000",
            "result_dir": str(results_dir / "kv_cache" / "llama3.1-8b" / "run" / "20250115_120000"),
            "num_processes": 2,
        }
        assert {name: benchmark.metadata.get(name) for name in expected} == expected

    def test_metadata_includes_kvcache_specific_fields(self, results_dir: Path) -> None:
        """The load and the tiers, as they were given."""
        metadata = made(results_dir, num_users=7, duration=33, gpu_mem_gb=1.5).metadata
        expected = {
            "kvcache_model": "llama3.1-8b",
            "num_users": 7,
            "duration": 33,
            "gpu_mem_gb": 1.5,
            "cpu_mem_gb": 32.0,
            "cache_dir": "/tmp/cache",  # noqa: S108 - a plan only
            "generation_mode": "realistic",
            "performance_profile": "latency",
            "kvcache_metrics": None,
        }
        assert {name: metadata.get(name, "missing") for name in expected} == expected

    def test_metadata_includes_distributed_info(self, results_dir: Path) -> None:
        """Hosts and the way to start ranks where they were given, and only there."""
        distributed = made(results_dir).metadata
        assert distributed["num_processes"] == 2
        assert distributed["hosts"] == ["host1", "host2"]
        assert distributed["exec_type"] == "mpi"
        local = made(results_dir, **LOCAL).metadata
        assert local["num_processes"] is None
        assert "hosts" not in local
        assert "exec_type" not in local

    @pytest.mark.parametrize("model", ["llama3.1-8b", "llama3.1-70b-instruct", "tiny-1b"])
    def test_metadata_model_consistency(self, results_dir: Path, model: str) -> None:
        """One model under both names, in the result directory and in the command."""
        benchmark = made(results_dir, model=model)
        assert benchmark.metadata["model"] == benchmark.metadata["kvcache_model"] == benchmark.model == model
        assert Path(str(benchmark.metadata["result_dir"])).parts[-3:-1] == (model, "run")
        assert f"--model {model} " in benchmark._build_kvcache_command()


class TestConstructor:
    """Making a benchmark settles what would be run, and does nothing."""

    def test_cluster_facts_are_collected_once_for_a_run(self, results_dir: Path, collect: MagicMock) -> None:
        """The answer is kept as `cluster_information`."""
        collect.return_value = {"hosts": 2}
        benchmark = made(results_dir)
        collect.assert_called_once_with()
        assert benchmark.cluster_information == {"hosts": 2}
        assert benchmark.metadata["cluster_information"] == {"hosts": 2}

    def test_cluster_facts_are_never_collected_for_an_estimate(self, results_dir: Path, collect: MagicMock) -> None:
        """`datasize` is arithmetic."""
        benchmark = made(results_dir, command="datasize")
        collect.assert_not_called()
        assert benchmark.cluster_information is None

    def test_a_given_collector_takes_the_place_of_the_built_in_one(self, results_dir: Path) -> None:
        """What it returns is the cluster's information."""
        collector = MagicMock(return_value={"summary": "ours"})
        benchmark = KVCacheBenchmark(arguments(results_dir), MagicMock(), None, 0, collector)
        collector.assert_called_once_with()
        assert benchmark.cluster_information == {"summary": "ours"}

    def test_other_hosts_are_not_asked(self, results_dir: Path) -> None:
        """Facts of hosts that do not exist cannot be had before a run, and nobody tries."""
        assert made(results_dir).cluster_information is None

    def test_a_local_plan_has_the_facts_of_this_machine(self, results_dir: Path) -> None:
        """They are read, not asked for, so that a plan has them too."""
        information = made(results_dir, **LOCAL).cluster_information
        assert information is not None
        assert information["hosts"]

    def test_nothing_is_created(self, results_dir: Path) -> None:
        """Neither the results directory nor the cache directory."""
        made(results_dir, what_if=False, cache_dir=str(results_dir / "cache"), **LOCAL)
        made(results_dir, command="datasize")
        assert not results_dir.exists()

    def test_the_output_location_can_be_replaced(self, results_dir: Path, tmp_path: Path) -> None:
        """The constructor calls the module's `generate_output_location` by its published name."""
        place = tmp_path / "elsewhere"
        with patch("mlpstorage.benchmarks.base.generate_output_location", return_value=str(place)) as generate:
            benchmark = made(results_dir)
        generate.assert_called_once()
        assert benchmark.metadata["result_dir"] == str(place)
        assert benchmark.result_dir == place

    @pytest.mark.parametrize("logger", [None, MagicMock(), logging.getLogger("a-script")], ids=["none", "mock", "own"])
    def test_any_logger_will_do(self, results_dir: Path, logger: logging.Logger | None) -> None:
        """None, a mock, or a plain one."""
        benchmark = KVCacheBenchmark(arguments(results_dir), logger=logger)
        assert benchmark.logger is (logger or logging.getLogger("mlpstorage"))

    def test_arguments_may_be_missing(self, monkeypatch: pytest.MonkeyPatch, results_dir: Path) -> None:
        """A namespace with the command alone is the default run."""
        monkeypatch.chdir(results_dir.parent)
        benchmark = KVCacheBenchmark(Namespace(command="run", what_if=True))
        assert benchmark.metadata["model"] == "llama3.1-8b"
        assert benchmark.metadata["num_users"] == 100
        assert benchmark.results_dir == results_dir.parent / "mlpstorage-results"

    def test_arguments_may_be_none(self, results_dir: Path) -> None:
        """None stands for the default, or for the value the program chooses, whichever argument it is."""
        given = arguments(results_dir)
        bare = Namespace(**dict.fromkeys(vars(given)) | {"command": "run", "results_dir": str(results_dir)})
        benchmark = KVCacheBenchmark(bare, logger=MagicMock())
        parameters = benchmark.metadata["parameters"]
        assert isinstance(parameters, dict)
        assert (parameters["num_users"], parameters["duration"], parameters["seed"]) == (100, 60, 42)
        settled = (parameters["block_tokens"], parameters["arrivals"], parameters["decisions"])
        assert settled == (256, "closed", "completion")
        sources = benchmark.metadata["parameter_sources"]
        assert isinstance(sources, dict)
        assert {name: source for name, source in sources.items() if source != "default"} == {
            "layout": "auto",
            "io_depth": "auto",
            "io_threads": "auto",
            "block_tokens": "auto",
            "arrivals": "auto",
            "decisions": "auto",
            "results_dir": "flag",
        }

    @pytest.mark.parametrize(
        ("switch", "flag"),
        [("enable_autoscaling", "--enable-autoscaling"), ("closed", "--closed")],
    )
    def test_a_switch_with_nothing_behind_it_is_refused(self, results_dir: Path, switch: str, flag: str) -> None:
        """A run that silently left it out would measure something else."""
        with pytest.raises(UsageError, match=flag):
            made(results_dir, **{switch: True})

    @pytest.mark.parametrize(
        ("changes", "flag"),
        [
            ({"num_users": 0}, "--num-users"),
            ({"duration": -1}, "--duration"),
            ({"gpu_mem_gb": float("nan")}, "--gpu-mem-gb"),
            ({"model": "gpt-9"}, "--model"),
            ({"generation_mode": "slow"}, "--generation-mode"),
            ({"hosts": ["bad host!"]}, "--hosts"),
            ({"num_processes": 0}, "--num-processes"),
        ],
    )
    def test_a_wrong_value_names_its_flag(self, results_dir: Path, changes: dict[str, object], flag: str) -> None:
        """A script hears of it as one line with exit code 2, and nothing is created."""
        with pytest.raises(UsageError, match=flag) as refused:
            made(results_dir, **changes)
        assert "\n" not in str(refused.value)
        assert not results_dir.exists()


@pytest.mark.usefixtures("collect")
class TestCommand:
    """The command that starts the ranks."""

    def test_two_hosts_are_started_by_mpirun(self, results_dir: Path) -> None:
        """It names the hosts, the number of ranks, and the model."""
        command = made(results_dir)._build_kvcache_command()
        assert command.startswith("mpirun -n 2 ")
        assert "host1:1,host2:1" in command
        assert "--model llama3.1-8b" in command

    def test_the_given_launcher_is_the_first_word(self, results_dir: Path) -> None:
        """A path stays as it stands, quoted where it must be."""
        command = made(results_dir, mpi_bin="/opt/my mpi/bin/mpiexec")._build_kvcache_command()
        assert shlex.split(command)[0] == "/opt/my mpi/bin/mpiexec"
        assert made(results_dir, mpi_bin="mpiexec")._build_kvcache_command().startswith("mpiexec -n 2 ")

    @pytest.mark.parametrize(
        "changes",
        [LOCAL, LOCAL | {"exec_type": EXEC_TYPE.MPI, "hosts": ["127.0.0.1"]}, LOCAL | {"num_processes": 1}],
        ids=["nothing", "parser defaults", "one rank"],
    )
    def test_the_plain_local_run_starts_no_mpirun(self, results_dir: Path, changes: dict[str, object]) -> None:
        """One rank here is started by Python itself, although `--exec-type` defaults to mpi."""
        words = shlex.split(made(results_dir, **changes)._build_kvcache_command())
        assert words[:3] == [sys.executable, "-m", "mlpstorage.kvcache.rank"]
        assert "-n" not in words
        assert "127.0.0.1" not in words
        assert words[words.index("--model") + 1] == "llama3.1-8b"

    def test_several_ranks_here_are_started_by_mpirun(self, results_dir: Path) -> None:
        """More than one rank needs MPI, on this machine too."""
        command = made(results_dir, hosts=["127.0.0.1"], num_processes=3)._build_kvcache_command()
        assert command.startswith("mpirun -n 3 ")

    def test_the_number_of_ranks_is_that_of_the_hosts_where_it_is_not_given(self, results_dir: Path) -> None:
        """`num_processes` itself stays None: it was not given."""
        benchmark = made(results_dir, hosts=["node[1-3]"], num_processes=None)
        assert benchmark.num_processes is None
        assert benchmark.metadata["num_processes"] is None
        assert "-n 3 " in benchmark._build_kvcache_command()
        assert benchmark.metadata["hosts"] == ["node1", "node2", "node3"]

    def test_mpi_options_are_passed_on(self, results_dir: Path) -> None:
        """Each in Open MPI's own words, before the rank's program."""
        benchmark = made(
            results_dir, oversubscribe=True, allow_run_as_root=True, mpi_params=[["--mca", "btl"], ["tcp,self"]]
        )
        command = benchmark._build_kvcache_command()
        before = command[: command.index(sys.executable)]
        assert "--oversubscribe --allow-run-as-root --mca btl tcp,self " in before

    def test_another_worker_program_takes_the_place_of_the_built_in_one(self, results_dir: Path) -> None:
        """With the same flags."""
        words = shlex.split(made(results_dir, kvcache_bin_path="/opt/a b/worker", **LOCAL)._build_kvcache_command())
        assert words[0] == "/opt/a b/worker"
        assert words[1:3] == ["--model", "llama3.1-8b"]

    def test_switches_of_the_load_reach_the_ranks(self, results_dir: Path) -> None:
        """A switch that is off leaves no word."""
        command = made(results_dir, disable_multi_turn=True, seed=7)._build_kvcache_command()
        assert "--disable-multi-turn" in command
        assert "--disable-prefix-caching" not in command
        assert "--seed 7" in command


class TestRun:
    """What `run` does without a run."""

    def test_a_plan_creates_nothing_and_shows_the_command(
        self, results_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`--what-if` for hosts that do not exist."""
        benchmark = made(results_dir)
        assert benchmark.run() == 0
        shown = capsys.readouterr().out
        assert benchmark._build_kvcache_command() in shown
        assert not results_dir.exists()

    def test_an_estimate_says_the_size_of_a_token(self, results_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """2 (keys and values) x 32 layers x 8 heads x 128 values x 2 bytes = 131,072."""
        benchmark = made(results_dir, command="datasize", json=True)
        assert benchmark.run() == 0
        assert '"bytes_per_token": 131072' in capsys.readouterr().out
        assert not results_dir.exists()

    def test_a_validator_can_refuse_the_run(self, results_dir: Path) -> None:
        """What it raises ends the run before any work; the invocation is kept as failed."""

        def refuse(metadata: object) -> None:
            assert isinstance(metadata, dict)
            raise UsageError(f"no {metadata['model']} here")

        benchmark = KVCacheBenchmark(
            arguments(
                results_dir, what_if=False, cache_dir=None, model="tiny-1b", cpu_mem_gb=0, storage_gb=0.1, **LOCAL
            ),
            logger=MagicMock(),
            validator=refuse,
        )
        with pytest.raises(MLPStorageError, match="no tiny-1b here"):
            benchmark.run()
        assert benchmark.metadata["status"] == "failed"
        assert list(results_dir.glob("kv_cache/**/*_metadata.json")) == []

    def test_the_benchmark_is_a_kv_cache_benchmark(self, results_dir: Path) -> None:
        """Its type names the first directory below the results directory."""
        benchmark = made(results_dir)
        assert benchmark.benchmark_type is BENCHMARK_TYPES.kv_cache
        assert benchmark.result_dir.relative_to(results_dir).parts[0] == "kv_cache"


def test_the_acceptance_check_of_the_metadata_passes() -> None:
    """The published script prints both of its OK lines with this Python."""
    if not VERIFY.is_file():
        pytest.skip(f"{VERIFY} is not there: it comes with the specification")
    done = subprocess.run([sys.executable, str(VERIFY)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "OK: distributed metadata" in done.stdout.splitlines()
    assert "OK: local metadata" in done.stdout.splitlines()
