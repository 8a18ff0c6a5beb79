"""The KV-cache spec: where values come from, what is refused and by what name, and the ranks' own command line."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpstorage.cli.parser import build_parser
from mlpstorage.config import (
    KVCACHE_MODELS,
    WORKLOADS,
    Accelerator,
    Arrivals,
    CacheScope,
    Decisions,
    DirectMode,
    Eviction,
    GenerationMode,
    IoEngineName,
    IoPriority,
    Layout,
    PerformanceProfile,
    Placement,
    Promotion,
    StorePolicy,
    TouchOrder,
    TraceFormat,
    Verify,
    WriteOverflow,
    WriteSync,
)
from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, MLPStorageError, UsageError
from mlpstorage.kvcache.rank import parse_arguments
from mlpstorage.plan.kvcache import with_settled_io
from mlpstorage.spec.fields import Resolved, flag_of, outside_name, resolve
from mlpstorage.spec.kvcache import KVCacheSpec, flag_words, rank_arguments
from mlpstorage.spec.load_timeout import LoadTimeout
from mlpstorage.storage.location import S3Location


def resolved(
    *, flags: dict[str, object] | None = None, env: dict[str, str] | None = None, file: Path | None = None
) -> Resolved[KVCacheSpec]:
    """A spec from a script's namespace, an environment and a file."""
    return resolve(KVCacheSpec, Namespace(**(flags or {})), environment=env or {}, config_file=file)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config file that sets three fields."""
    path = tmp_path / "our config.yaml"
    path.write_text("num_users: 3\nduration: 30\nmodel: tiny-1b\n")
    return path


# Precedence


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(config_file: Path) -> None:
    """And every value knows where it came from."""
    env = {"MLPSTORAGE_NUM_USERS": "2", "MLPSTORAGE_DURATION": "20"}
    found = resolved(flags={"num_users": 1}, env=env, file=config_file)
    spec, sources = found.spec, found.sources
    assert (spec.num_users, spec.duration, spec.model, spec.seed) == (1, 20.0, "tiny-1b", 42)
    assert [sources[name] for name in ("num_users", "duration", "model", "seed")] == ["flag", "env", "file", "default"]
    assert set(sources) == set(KVCacheSpec.model_fields)


def test_a_parsers_default_does_not_count_as_given(config_file: Path) -> None:
    """A namespace of our parser names what stood on the command line; the rest of it yields to the file."""
    args = {"num_users": 100, "duration": 60, "given": ("duration",)}
    found = resolved(flags=args, file=config_file)
    assert (found.spec.num_users, found.sources["num_users"]) == (3, "file")
    assert (found.spec.duration, found.sources["duration"]) == (60, "flag")


def test_none_in_a_scripts_namespace_is_not_given() -> None:
    """Anything else is, the default value and False included."""
    found = resolved(flags={"num_users": None, "seed": 42, "disable_multi_turn": False, "unheard_of": 7})
    assert found.sources["num_users"] == "default"
    assert found.sources["seed"] == found.sources["disable_multi_turn"] == "flag"


def test_an_empty_environment_variable_is_not_given() -> None:
    """`MLPSTORAGE_NUM_USERS=` unsets it."""
    assert resolved(env={"MLPSTORAGE_NUM_USERS": ""}).sources["num_users"] == "default"


def test_the_process_environment_is_read_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option has a variable of its name."""
    monkeypatch.setenv("MLPSTORAGE_RESULTS_DIR", "/a b/results")
    assert resolve(KVCacheSpec, Namespace()).spec.results_dir == Path("/a b/results")


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("HOSTS", "a,b", "hosts", ("a,b",)),
        ("DISABLE_MULTI_TURN", "true", "disable_multi_turn", True),
        ("LABEL", "disk=nvme0,site=x", "label", {"disk": "nvme0", "site": "x"}),
        ("MPI_PARAMS", "--mca x y", "mpi_params", (("--mca x y",),)),
        ("CPU_MEM_GB", "1.5", "cpu_mem_gb", 1.5),
        ("TOUCH", "head", "touch", TouchOrder.HEAD),
        ("CACHE_DIR", "/mnt/a b", "cache_dir", Path("/mnt/a b")),
        ("CACHE_DIR", "s3://bucket/a/b", "cache_dir", S3Location("bucket", "a/b")),
        ("LAYOUT", "slab", "layout", Layout.SLAB),
        ("FILE_LEVELS", "3,2", "file_levels", (3, 2)),
        ("FILE_LEVELS", "flat", "file_levels", ()),
        ("LOAD_TIMEOUT", "4", "load_timeout", LoadTimeout(base_s=4.0, per_1024_tokens_s=0.0, most_s=4.0)),
        ("LOAD_TIMEOUT", "none", "load_timeout", None),
        ("WRITE_QUEUE_S", "2.5", "write_queue_s", 2.5),
        ("KEEP_CACHE", "true", "keep_cache", True),
    ],
)
def test_the_environment_gives_text(variable: str, text: str, name: str, value: object) -> None:
    """Which is read as the flag's value would be."""
    assert getattr(resolved(env={f"MLPSTORAGE_{variable}": text}).spec, name) == value


# Config files


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    """A file of comments is a file of no values."""
    path = tmp_path / "c.yaml"
    path.write_text("# nothing yet\n")
    assert resolved(file=path).spec == KVCacheSpec()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_user: 5\nmodle: x\n", "unknown key modle, num_user; known are .*num_users"),
        ("- 1\n- 2\n", "name: value"),
        ("a: [1\n", "is not YAML"),
        ("num_users: many\n", "num_users.*--num-users"),
        ("num_users: 0\n", "num_users.*--num-users.*1.*got 0"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    """With the file, the key and the flag, in one line."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said) as refused:
        resolved(file=path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_config_file_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """Missing, or no file at all."""
    with pytest.raises(MissingFileError, match=r"--config-file.*gone\.yaml"):
        resolved(file=tmp_path / "gone.yaml")
    with pytest.raises(AccessError, match="--config-file"):
        resolved(file=tmp_path)


# Ranges


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("num_users", "0", "--num-users"),
        ("num_users", "-5", "--num-users"),
        ("num_users", "2.5", "--num-users"),
        ("duration", "0", "--duration"),
        ("duration", "nan", "--duration"),
        ("duration", "inf", "--duration"),
        ("gpu_mem_gb", "-1", "--gpu-mem-gb"),
        ("storage_gb", "0", "--storage-gb"),
        ("block_tokens", "0", "--block-tokens"),
        ("io_threads", "0", "--io-threads"),
        ("seed", "-1", "--seed"),
        ("warmup", "-1", "--warmup"),
        ("warmup", "Steady", "--warmup"),
        ("workload", "poetry", "--workload"),
        ("workload", "chat=0", "--workload"),
        ("workload", "chat=-1,rag=1", "--workload"),
        ("workload", "chat=nan", "--workload"),
        ("workload", "chat=1,chat=2", "--workload"),
        ("workload", "chat=some", "--workload"),
        ("workload", "chat,", "--workload"),
        ("rag_num_docs", "0", "--rag-num-docs"),
        ("trace_format", "csv", "--trace-format"),
        ("arrivals", "random", "--arrivals"),
        ("request_rate", "0", "--request-rate"),
        ("request_rate", "inf", "--request-rate"),
        ("time_scale", "0", "--time-scale"),
        ("spread_arrivals", "-1", "--spread-arrivals"),
        ("trials", "0", "--trials"),
        ("trials", "1001", "--trials"),
        ("promote", "once", "--promote"),
        ("decisions", "later", "--decisions"),
        ("model", "gpt-9", "--model"),
        ("touch", "middle", "--touch"),
        ("hosts", "h[3-1]", "--hosts"),
        ("num_processes", "0", "--num-processes"),
        ("label", "disk", "--label"),
        ("prefill_tokens_per_s", "0", "--prefill-tokens-per-s"),
        ("cache_dir", "s3://b", "--cache-dir"),
        ("cache_dir", "s3://bucket/a//b", "--cache-dir"),
        ("profile", "vllm", "--profile"),
        ("layout", "tree", "--layout"),
        ("tensor_parallel", "0", "--tensor-parallel"),
        ("io_engine", "aio", "--io-engine"),
        ("io_depth", "0", "--io-depth"),
        ("io_depth", "1025", "--io-depth"),
        ("io_priority", "high", "--io-priority"),
        ("direct", "maybe", "--direct"),
        ("write_sync", "always", "--write-sync"),
        ("verify", "some", "--verify"),
        ("file_levels", "1,x", "--file-levels"),
        ("file_levels", "1,5", "--file-levels"),
        ("file_levels", "0", "--file-levels"),
        ("file_levels", "1,1,1,1,1", "--file-levels"),
        ("object_part_mib", "4", "--object-part-mib"),
        ("io_limit_s", "0", "--io-limit-s"),
        ("store_policy", "never", "--store-policy"),
        ("eviction", "fifo", "--eviction"),
        ("evict_above", "0", "--evict-above"),
        ("evict_above", "1.1", "--evict-above"),
        ("evict_to", "-0.1", "--evict-to"),
        ("write_overflow", "none", "--write-overflow"),
        ("write_queue_gib", "0", "--write-queue-gib"),
        ("write_queue_gib", "none", "--write-queue-gib"),
        ("write_queue_s", "0", "--write-queue-s"),
        ("write_queue_s", "soon", "--write-queue-s"),
        ("write_batch", "0", "--write-batch"),
        ("write_interval_s", "-1", "--write-interval-s"),
        ("load_batch", "-1", "--load-batch"),
        ("min_load_tokens", "-1", "--min-load-tokens"),
        ("load_timeout", "soon", "--load-timeout"),
        ("load_timeout", "1:2", "--load-timeout"),
        ("load_timeout", "2:-1:30", "--load-timeout"),
        ("load_timeout", "30:1:2", "--load-timeout"),
        ("load_timeout", "0", "--load-timeout"),
        ("load_timeout", "inf", "--load-timeout"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_it_came_under(
    tmp_path: Path, name: str, value: str, flag: str
) -> None:
    """As a flag: usage. In the environment or a file: configuration, with the variable's or the file's name."""
    path = tmp_path / "c.yaml"
    path.write_text(f"{name}: '{value}'\n")
    attempts: list[tuple[dict[str, object], dict[str, str], Path | None, type[MLPStorageError], str]] = [
        ({name: value}, {}, None, UsageError, flag),
        ({}, {f"MLPSTORAGE_{name.upper()}": value}, None, ConfigurationError, f"MLPSTORAGE_{name.upper()}"),
        ({}, {}, path, ConfigurationError, str(path)),
    ]
    for flags, env, file, kind, said in attempts:
        with pytest.raises(kind) as refused:
            resolved(flags=flags, env=env, file=file)
        message = str(refused.value)
        assert type(refused.value) is kind
        assert said in message
        assert flag in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"max_requests": 5}, "--max-requests"),
        ({"time_scale": 0.5}, "--time-scale"),
        ({"trace": "t.jsonl", "disable_multi_turn": True}, "--disable-multi-turn"),
        ({"trace_format": "azure"}, "--trace-format: needs --trace"),
        ({"spread_arrivals": 1}, "--spread-arrivals: needs --trace"),
        ({"trace": "t.jsonl", "enable_rag": True}, "--enable-rag: is for synthetic users"),
        ({"trace": "t.jsonl", "workload": "rag"}, "--workload: is for synthetic users"),
        ({"enable_rag": True, "workload": "chat=1,batch=1"}, "--enable-rag: .*weight in --workload"),
        ({"enable_rag": True, "workload": "batch"}, "--enable-rag: "),
        ({"arrivals": "session"}, "--arrivals session: needs --trace"),
        ({"arrivals": "open"}, "--arrivals open: synthetic users need --request-rate"),
        ({"arrivals": "closed", "request_rate": 2}, "--request-rate: .*not for --arrivals closed"),
        ({"trace": "t", "arrivals": "session", "request_rate": 2}, "--request-rate: .*not for --arrivals session"),
        ({"trace": "t", "request_rate": 2, "time_scale": 0.5}, "--time-scale: .*--request-rate replaces"),
        ({"trace": "t", "request_rate": 2, "spread_arrivals": 1}, "--spread-arrivals: .*--request-rate replaces"),
        ({"decisions": "arrival", "write_overflow": "drop"}, "--decisions arrival: --write-overflow drop"),
        ({"decisions": "arrival", "write_interval_s": 1}, "--decisions arrival: --write-interval-s decides by time"),
        ({"decisions": "arrival", "write_queue_s": 1}, "--decisions arrival: --write-queue-s decides by time"),
        ({"decisions": "arrival", "load_timeout": 1}, "--decisions arrival: --load-timeout decides by time"),
        ({"trials": 2, "keep_cache": True}, "--trials: .*leave out --keep-cache"),
        ({"trials": 2, "reuse_cache": True, "cache_dir": "/mnt/kv"}, "--trials: .*leave out --reuse-cache"),
        ({"layout": "object"}, "--layout object: needs --cache-dir s3://"),
        ({"layout": "object", "cache_dir": "/mnt/kv"}, "--layout object: needs --cache-dir s3://"),
        ({"layout": "file", "cache_dir": "s3://bucket/kv"}, "--layout file: s3://bucket/kv can hold layout object"),
        ({"layout": "null", "cache_dir": "s3://bucket/kv"}, "--layout null: s3://bucket/kv"),
        ({"layout": "null", "verify": "stamp"}, "--verify stamp: layout null"),
        ({"layout": "null", "verify": "full"}, "--verify full: layout null"),
        ({"layout": "null", "direct": "always"}, "--direct always: layout null"),
        ({"cache_dir": "s3://bucket/kv", "direct": "always"}, "--direct always: layout object"),
        ({"cache_dir": "s3://bucket/kv", "io_engine": "uring"}, "--io-engine uring: layout object"),
        ({"reuse_cache": True}, "--reuse-cache: needs --cache-dir"),
        ({"reuse_cache": True, "layout": "null", "cache_dir": "/mnt/kv"}, "--reuse-cache: layout null"),
        ({"keep_cache": True, "layout": "null"}, "--keep-cache: layout null"),
        ({"model": "tiny-1b", "tensor_parallel": 3}, "--tensor-parallel 3: tiny-1b has 4 KV heads"),
        ({"model": "llama3.1-8b", "tensor_parallel": 12}, "--tensor-parallel 12: llama3.1-8b has 8 KV heads"),
        ({"io_depth": 8, "io_threads": 4}, "--io-threads 4 and --io-depth 8: .*one thread drives one object"),
        ({"io_engine": "uring", "io_threads": 2}, "--io-threads 2: .*uring one thread"),
        ({"evict_above": 0.5, "evict_to": 0.8}, "--evict-to 0.8: is above --evict-above 0.5"),
        ({"cache_dir": Path("s3://bucket/kv")}, "--cache-dir: .*give it as text"),
        ({"placement": "round-robin"}, "--placement round-robin: synthetic users in a closed loop stay"),
        ({"placement": "prefix", "request_rate": 2}, "--placement prefix: needs --trace; synthetic users begin"),
        ({"cache_scope": "shared", "layout": "slab"}, "--cache-scope shared: layout slab keeps its index"),
        ({"cache_scope": "shared", "layout": "bucket"}, "--cache-scope shared: layout bucket keeps its index"),
        ({"cache_scope": "shared", "layout": "null"}, "--cache-scope shared: layout null stores nothing"),
        ({"cache_scope": "shared", "profile": "kvbm-slab"}, "--cache-scope shared: layout slab"),
        (
            {"cache_scope": "shared", "decisions": "arrival", "num_processes": 2},
            "--decisions arrival: with --cache-scope shared needs one rank",
        ),
        ({"cache_scope": "shared", "decisions": "arrival", "hosts": ["h[1-2]"]}, "--decisions arrival: .*one rank"),
    ],
)
def test_options_that_do_not_go_together_are_refused(flags: dict[str, object], flag: str) -> None:
    """What belongs to a trace needs one, what an object store or no storage cannot do is not asked of it, and so on."""
    with pytest.raises(UsageError, match=flag):
        resolved(flags=flags)


@pytest.mark.parametrize(
    ("given_as", "mix"),
    [
        ("chat", {"chat": 1.0}),
        ("rag=2.5", {"rag": 2.5}),
        ("chat=3,rag", {"chat": 3.0, "rag": 1.0}),
        ("chat=3, coding-agent=1", {"chat": 3.0, "coding-agent": 1.0}),
        ({"batch": 1, "document-qa": 0.5}, {"batch": 1.0, "document-qa": 0.5}),
    ],
)
def test_forms_of_mixes(given_as: object, mix: dict[str, float]) -> None:
    """A profile, several with weights, and the mapping that a config file holds."""
    assert resolved(flags={"workload": given_as}).spec.mix == mix


def test_a_mix_may_stand_in_a_config_file_and_in_the_environment(tmp_path: Path) -> None:
    """As a mapping, or as the text of the flag."""
    path = tmp_path / "config.yaml"
    path.write_text("workload:\n  chat: 3\n  rag: 1\n")
    assert resolved(file=path).spec.mix == {"chat": 3.0, "rag": 1.0}
    assert resolved(env={"MLPSTORAGE_WORKLOAD": "rag=2,batch=1"}, file=path).spec.mix == {"rag": 2.0, "batch": 1.0}


@pytest.mark.parametrize("workload", [None, "chat", "rag", "rag=7"])
def test_enable_rag_is_a_workload_of_rag(workload: str | None) -> None:
    """The published switch; beside it stand the default and what it means alone, and no other weight changes that."""
    if workload == "rag=7":
        with pytest.raises(UsageError, match="--enable-rag"):
            resolved(flags={"enable_rag": True, "workload": workload})
        return
    spec = resolved(flags={"enable_rag": True, "workload": workload}).spec
    assert spec.mix == {"rag": 1.0}


def test_a_warm_up_is_seconds_or_a_word() -> None:
    """Text from the environment, and a number from a file, are seconds; one word is not."""
    assert resolved(env={"MLPSTORAGE_WARMUP": "2.5"}).spec.warmup == 2.5
    assert resolved(env={"MLPSTORAGE_WARMUP": "steady"}).spec.warmup == "steady"
    assert resolved(flags={"warmup": 3}).spec.warmup == 3
    assert resolved().spec.warmup is None


def test_a_policy_that_decides_by_time_is_named() -> None:
    """So that decisions at arrival are not chosen for it; queues without a time limit do not count."""
    assert resolved(flags={"write_queue_gib": 3, "write_batch": 2}).spec.timed_policy is None
    assert resolved(flags={"write_overflow": "drop"}).spec.timed_policy == "--write-overflow drop"
    assert resolved(flags={"load_timeout": 1}).spec.timed_policy == "--load-timeout"


def test_null_in_a_config_file_may_be_a_layout_or_nothing(tmp_path: Path) -> None:
    """YAML reads `null` as no value at all: for the layout of that name it is refused, and the way out is named."""
    path = tmp_path / "c.yaml"
    path.write_text("layout: null\n")
    with pytest.raises(ConfigurationError, match=r"layout \(--layout\): .*quotes"):
        resolved(file=path)
    path.write_text("layout: 'null'\nload_timeout: null\n")
    assert resolved(file=path).spec.store_layout is Layout.NULL


# Values that follow from others


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        ({}, Layout.FILE),
        ({"cache_dir": "/mnt/kv"}, Layout.FILE),
        ({"cache_dir": "s3://bucket"}, Layout.OBJECT),
        ({"cache_dir": "s3://bucket/kv", "layout": "object"}, Layout.OBJECT),
        ({"layout": "bucket"}, Layout.BUCKET),
    ],
)
def test_the_layout_follows_from_the_place(flags: dict[str, object], layout: Layout) -> None:
    """Files in a directory, objects in a bucket, unless it is given."""
    assert resolved(flags=flags).spec.store_layout is layout


@pytest.mark.parametrize(
    ("flags", "depth", "threads"),
    [
        ({}, 8, 8),
        ({"io_depth": 3}, 3, 3),
        ({"io_threads": 5}, 5, 5),
        ({"io_depth": 6, "io_threads": 6}, 6, 6),
        ({"io_engine": "uring"}, 8, 1),
        ({"io_engine": "uring", "io_depth": 32}, 32, 1),
        ({"io_engine": "uring", "io_threads": 1}, 8, 1),
    ],
)
def test_objects_in_flight_and_threads(flags: dict[str, object], depth: int, threads: int) -> None:
    """One thread an object with the engine of threads, one for all with io_uring."""
    spec = resolved(flags=flags).spec
    assert (spec.depth, spec.threads) == (depth, threads)


def test_what_is_not_stored_is_not_verified() -> None:
    """Layout null turns the default check off, and says that it was worked out."""
    found = resolved(flags={"layout": "null"})
    assert (found.spec.verify, found.sources["verify"]) == (Verify.OFF, "auto")
    assert resolved(flags={"layout": "null", "verify": "off"}).sources["verify"] == "flag"
    plain = resolved()
    assert (plain.spec.verify, plain.sources["verify"]) == (Verify.STAMP, "default")


def test_an_eviction_ends_where_it_begins_unless_it_is_told() -> None:
    """`--evict-above` alone evicts no more than must go."""
    found = resolved(flags={"evict_above": "0.9"})
    assert (found.spec.evict_above, found.spec.evict_to, found.sources["evict_to"]) == (0.9, 0.9, "auto")
    assert resolved(flags={"evict_above": 0.9, "evict_to": 0.8}).spec.evict_to == 0.8
    assert resolved(flags={"evict_to": 0.8}).spec.evict_above == 1.0


@pytest.mark.parametrize(
    ("text", "tokens", "limit_s"),
    [
        ("2:0.1:30", 0, 2.0),
        ("2:0.1:30", 1024, 2.1),
        ("2:0.1:30", 10_240, 3.0),
        ("2:0.1:30", 512, 2.05),
        # 286,720 tokens are 280 x 1,024: 2 + 28; what is more waits no longer.
        ("2:0.1:30", 286_720, 30.0),
        ("2:0.1:30", 1_000_000, 30.0),
        ("5", 1_000_000, 5.0),
        (5, 0, 5.0),
        (0.5, 0, 0.5),
    ],
)
def test_how_long_a_load_may_take(text: object, tokens: int, limit_s: float) -> None:
    """A base, more for each 1,024 tokens, and a most; or one number for any load."""
    timeout = resolved(flags={"load_timeout": text}).spec.load_timeout
    assert timeout is not None
    assert timeout.limit_s(tokens) == pytest.approx(limit_s)


def test_heads_that_are_kept_twice_count_twice() -> None:
    """8 heads on 16 ranks: 2 x 131,072 bytes a token; on 8, and for latent attention, those of the model."""
    assert KVCacheSpec(tensor_parallel=16).bytes_per_token == 262_144
    assert KVCacheSpec(tensor_parallel=8).bytes_per_token == 131_072
    assert KVCacheSpec(model="deepseek-v3", tensor_parallel=16).bytes_per_token == 70_272


def test_parameters_are_json() -> None:
    """Places, levels and limits are what one would type, or lists of it."""
    flags: dict[str, object] = {"cache_dir": "s3://bucket/kv", "load_timeout": "2:0.1:30", "file_levels": "3,2"}
    parameters = resolved(flags=flags).spec.parameters()
    assert json.loads(json.dumps(parameters)) == parameters
    assert parameters["cache_dir"] == "s3://bucket/kv"
    assert parameters["load_timeout"] == "2:0.1:30"
    assert parameters["file_levels"] == [3, 2]
    assert parameters["layout"] is None


# Forms


@pytest.mark.parametrize(
    ("given_as", "kept"),
    [
        ([["a", "b"]], (("a", "b"),)),
        ([["--mca x y"]], (("--mca x y",),)),
        ([["a"], ["b"]], (("a",), ("b",))),
        (["a", "b"], (("a", "b"),)),
        ("--mca x y", (("--mca x y",),)),
        ([], ()),
    ],
)
def test_forms_of_mpi_params(given_as: object, kept: object) -> None:
    """Argparse's list of lists, a script's flat list, one string."""
    assert resolved(flags={"mpi_params": given_as}).spec.mpi_params == kept


@pytest.mark.parametrize(
    ("given_as", "kept"),
    [
        ([["a=1", "b=2"], ["c=x=y"]], {"a": "1", "b": "2", "c": "x=y"}),
        (["a=1", "a=2"], {"a": "2"}),
        ("a=1,b=", {"a": "1", "b": ""}),
        ({"a": "1"}, {"a": "1"}),
    ],
)
def test_forms_of_labels(given_as: object, kept: dict[str, str]) -> None:
    """Pairs in any nesting; the last of a name counts, and a value may hold an equals sign or nothing."""
    assert resolved(flags={"label": given_as}).spec.label == kept


def test_hosts_are_expanded_where_they_are_read() -> None:
    """The spec keeps what was written."""
    spec = resolved(flags={"hosts": ["h[1-2]", "x:4"]}).spec
    assert spec.hosts == ("h[1-2]", "x:4")
    assert [(host.name, host.slots) for host in spec.parsed_hosts] == [("h1", None), ("h2", None), ("x", 4)]


@pytest.mark.parametrize(
    ("profile", "target_ms"), [(PerformanceProfile.LATENCY, 450.0), (PerformanceProfile.THROUGHPUT, 2000.0)]
)
def test_targets_of_the_profiles(profile: PerformanceProfile, target_ms: float) -> None:
    """MLPerf Inference, Llama 2 70B: 450 ms interactive, 2 s server."""
    assert KVCacheSpec(performance_profile=profile).ttft_p95_ms_target == target_ms


def test_every_flag_is_its_fields_name() -> None:
    """So that a message, a file and the environment can be read by one another."""
    names = list(KVCacheSpec.options())
    assert set(names) == set(KVCacheSpec.model_fields)
    expected = {name: f"--{name.replace('_', '-')}" for name in names}
    # pydantic keeps this name to itself; outside it is called as its flag says.
    expected["model_config_file"] = "--model-config"
    assert {name: flag_of(KVCacheSpec, name) for name in names} == expected
    assert {name: outside_name(KVCacheSpec, name) for name in names} == {
        name: flag.removeprefix("--").replace("-", "_") for name, flag in expected.items()
    }


# Ranks

POSITIVE = st.floats(min_value=1e-9, max_value=1e12)
PATHS = st.text(st.characters(exclude_categories=["C"], exclude_characters="\x00"), min_size=1).map(
    lambda text: Path("/") / text
)


def none_or(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """A value that may be left out."""
    return st.none() | values


LOCATIONS = st.builds(
    S3Location, st.from_regex(r"[a-z][a-z0-9-]{1,20}[a-z0-9]", fullmatch=True), st.sampled_from(["", "a", "a/b.c/d_e"])
)
PLACES = st.one_of(
    st.fixed_dictionaries(
        {"cache_dir": PATHS},
        optional={
            "layout": st.sampled_from([Layout.FILE, Layout.SLAB, Layout.BUCKET]),
            "direct": st.sampled_from(DirectMode),
            "verify": st.sampled_from(Verify),
            "reuse_cache": st.booleans(),
            "keep_cache": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {"cache_dir": LOCATIONS},
        optional={
            "layout": st.just(Layout.OBJECT),
            "direct": st.sampled_from([DirectMode.AUTO, DirectMode.NEVER]),
            "verify": st.sampled_from(Verify),
            "reuse_cache": st.booleans(),
            "keep_cache": st.booleans(),
            "cache_scope": st.sampled_from(CacheScope),
        },
    ),
    st.fixed_dictionaries({"cache_dir": PATHS, "cache_scope": st.just(CacheScope.SHARED)}),
    st.fixed_dictionaries({"cache_dir": none_or(PATHS), "layout": st.just(Layout.NULL)}),
)
"""Where the objects go, and what fits there."""

DRIVES = st.one_of(
    st.fixed_dictionaries({}, optional={"io_depth": none_or(st.integers(1, 1024))}),
    st.fixed_dictionaries({"io_threads": none_or(st.integers(1, 1024))}),
    st.integers(1, 1024).map(lambda number: {"io_depth": number, "io_threads": number}),
    st.fixed_dictionaries({"io_engine": st.just(IoEngineName.THREADS)}),
)
"""What moves them; io_uring goes with files only."""

COMPUTES = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "accelerator": st.sampled_from([one for one in Accelerator if one is not Accelerator.NONE]),
            "num_accelerators": st.integers(1, 100_000),
            "mfu": st.floats(min_value=0, max_value=1, exclude_min=True),
        },
    ),
    st.fixed_dictionaries(
        {"accelerator": st.just(Accelerator.NONE)},
        optional={"prefill_tokens_per_s": none_or(POSITIVE), "decode_tokens_per_s": none_or(POSITIVE)},
    ),
    st.fixed_dictionaries({"prefill_tokens_per_s": POSITIVE}),
)
"""What computes: a formula, rates, or nothing."""

USERS = st.fixed_dictionaries(
    {},
    optional={
        "workload": st.dictionaries(st.sampled_from(WORKLOADS), POSITIVE, min_size=1) | st.just({"rag": 1.0}),
        "rag_num_docs": st.integers(1, 1_000_000),
        "disable_multi_turn": st.booleans(),
        "arrivals": st.sampled_from([None, Arrivals.CLOSED]),
    },
)
TRACES = st.fixed_dictionaries(
    {"trace": PATHS},
    optional={
        "trace_format": none_or(st.sampled_from(TraceFormat)),
        "max_requests": none_or(st.integers(1, 1 << 60)),
        "arrivals": none_or(st.sampled_from(Arrivals)),
        "time_scale": POSITIVE,
        "spread_arrivals": st.just(0.0) | POSITIVE,
        "placement": st.sampled_from(Placement),
    },
)
AT_A_RATE = st.fixed_dictionaries(
    {"request_rate": POSITIVE},
    optional={
        "trace": none_or(PATHS),
        "arrivals": st.sampled_from([None, Arrivals.OPEN]),
        "placement": st.sampled_from([Placement.SESSION, Placement.ROUND_ROBIN]),
    },
)
LOADS = st.one_of(USERS, st.just({"enable_rag": True, "rag_num_docs": 3}), TRACES, AT_A_RATE)
"""What is played, and when."""

TIMED = ("write_overflow", "write_queue_s", "write_interval_s", "load_timeout")
"""Policies that may decide by time."""

TIMEOUTS = st.tuples(POSITIVE, st.just(0.0) | POSITIVE, st.just(0.0) | POSITIVE).map(
    lambda three: LoadTimeout(base_s=three[0], per_1024_tokens_s=three[1], most_s=three[0] + three[2])
)
PARTS = st.floats(min_value=0, max_value=1, exclude_min=True)
OTHERS: dict[str, st.SearchStrategy[object]] = {
    "model": st.sampled_from(KVCACHE_MODELS),
    "num_users": st.integers(1, 1_000_000),
    "block_tokens": none_or(st.integers(1, 1 << 20)),
    "disable_prefix_caching": st.booleans(),
    "seed": st.integers(0, (1 << 63) - 1),
    "duration": POSITIVE,
    "warmup": none_or(st.just("steady") | st.just(0.0) | POSITIVE),
    "gpu_mem_gb": st.just(0.0) | POSITIVE,
    "cpu_mem_gb": none_or(st.just(0.0) | POSITIVE),
    "storage_gb": none_or(POSITIVE),
    "touch": st.sampled_from(TouchOrder),
    "generation_mode": st.sampled_from(GenerationMode),
    "performance_profile": st.sampled_from(PerformanceProfile),
    # Divide the heads of every model, or are a multiple of them.
    "tensor_parallel": st.sampled_from([1, 2, 4, 64, 1024]),
    "io_priority": st.sampled_from(IoPriority),
    "write_sync": st.sampled_from(WriteSync),
    "file_levels": st.lists(st.integers(1, 4), max_size=4).map(tuple),
    "object_part_mib": st.integers(5, 5 * 1024),
    "io_limit_s": POSITIVE,
    "store_policy": st.sampled_from(StorePolicy),
    "promote": st.sampled_from(Promotion),
    "decisions": none_or(st.sampled_from(Decisions)),
    "eviction": st.sampled_from(Eviction),
    "evict_above": PARTS,
    "evict_to": PARTS,
    "write_overflow": st.sampled_from(WriteOverflow),
    "write_queue_gib": POSITIVE,
    "write_queue_s": none_or(POSITIVE),
    "write_batch": st.integers(1, 1 << 20),
    "write_interval_s": st.just(0.0) | POSITIVE,
    "load_batch": st.integers(0, 1 << 20),
    "min_load_tokens": st.integers(0, 1 << 40),
    "load_timeout": none_or(TIMEOUTS),
    "timeseries_interval": st.floats(min_value=0.1, max_value=3600),
}


def test_the_values_tried_are_of_every_field_that_a_rank_hears() -> None:
    """A new field must join the next test."""
    apart = {"cache_dir", "layout", "direct", "verify", "reuse_cache", "keep_cache"}
    apart |= {"io_engine", "io_depth", "io_threads"}
    apart |= {"workload", "enable_rag", "rag_num_docs", "disable_multi_turn", "trace", "trace_format", "max_requests"}
    apart |= {"arrivals", "request_rate", "time_scale", "spread_arrivals", "placement", "cache_scope"}
    apart |= {"accelerator", "num_accelerators", "mfu", "prefill_tokens_per_s", "decode_tokens_per_s"}
    # A file that must be there: test_spec_compute.py.
    apart |= {"model_config_file"}
    assert {*OTHERS, *apart} == {name for name, option in KVCacheSpec.options().items() if option.rank}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    others=st.fixed_dictionaries({}, optional=OTHERS),
    place=PLACES,
    drive=DRIVES,
    compute=COMPUTES,
    load=LOADS,
    rings=st.booleans(),
)
def test_a_ranks_command_line_gives_the_spec_back(
    others: dict[str, object],
    place: dict[str, object],
    drive: dict[str, object],
    compute: dict[str, object],
    load: dict[str, object],
    *,
    rings: bool,
) -> None:
    """Whatever the values, to the last bit of a float and with any path."""
    values = others | place | drive | compute | load
    if values.get("decisions") is Decisions.ARRIVAL:
        for name in TIMED:
            values.pop(name, None)
    if rings and isinstance(values["cache_dir"], Path) and values.get("layout") is not Layout.NULL:
        values.pop("io_threads", None)
        values["io_engine"] = IoEngineName.URING
    above, to = values.get("evict_above", 1.0), values.get("evict_to", 0.0)
    assert isinstance(above, float)
    assert isinstance(to, float)
    if to > above:
        values["evict_above"], values["evict_to"] = to, above
    spec = KVCacheSpec.model_validate(values)
    assert parse_arguments([*rank_arguments(spec), "--run-id", "r 1"]) == (spec, "r 1")
    # As the launcher sends it.
    settled = with_settled_io(spec)
    assert parse_arguments([*rank_arguments(settled), "--run-id", "r 1"]) == (settled, "r 1")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"mpi_params": [["--mca a b"], ["x"]]}, ["--mpi-params=--mca a b", "--mpi-params=x"]),
        ({"label": {"disk": "nvme 0"}}, ["--label", "disk=nvme 0"]),
        ({"hosts": ["a", "b"]}, ["--hosts", "a", "b"]),
        ({"file_levels": "3,2"}, ["--file-levels", "3,2"]),
        ({"file_levels": []}, ["--file-levels", "flat"]),
        ({"load_timeout": 2.5}, ["--load-timeout", "2.5:0:2.5"]),
        ({"profile": "vllm-fs"}, ["--profile", "vllm-fs"]),
        ({"workload": "chat=3,rag=0.1"}, ["--workload", "chat=3,rag=0.1"]),
        ({"enable_rag": True}, ["--enable-rag"]),
        ({"warmup": "steady"}, ["--warmup", "steady"]),
        ({"warmup": 2.5}, ["--warmup", "2.5"]),
        ({"trials": 3}, ["--trials", "3"]),
        ({"keep_cache": True}, ["--keep-cache"]),
        ({"keep_cache": False}, []),
        ({"storage_gb": None}, []),
    ],
)
def test_words_of_a_field(flags: dict[str, object], words: list[str]) -> None:
    """What one would type to give a field the value that it has; the product's parser reads it back."""
    ((name, _),) = flags.items()
    spec = resolved(flags=flags).spec
    assert flag_words(spec, name) == words
    args = build_parser(["kvcache"]).parse_args(["kvcache", "run", *words])
    assert getattr(resolve(KVCacheSpec, args, environment={}).spec, name) == getattr(spec, name)


def test_a_rank_hears_only_what_concerns_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts, launcher, results and labels stay with the launcher; a rank's environment changes nothing."""
    monkeypatch.setenv("MLPSTORAGE_NUM_USERS", "77")
    spec = KVCacheSpec(
        hosts=("a", "b"), num_processes=4, mpi_params=(("x",),), results_dir=Path("/r"), label={"a": "b"}, num_users=5
    )
    words = rank_arguments(spec)
    for flag in ("--hosts", "--num-processes", "--mpi-params", "--results-dir", "--label", "--exec-type", "--mpi-bin"):
        assert flag not in words
    assert words[:2] == ["--model", "llama3.1-8b"]
    assert parse_arguments([*words, "--run-id", "r"])[0].num_users == 5
