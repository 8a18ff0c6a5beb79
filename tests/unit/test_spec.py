"""The KV-cache spec: where values come from, what is refused and by what name, and the ranks' own command line."""

from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlpstorage.config import KVCACHE_MODELS, GenerationMode, PerformanceProfile, TouchOrder
from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, MLPStorageError, UsageError
from mlpstorage.kvcache.rank import parse_arguments
from mlpstorage.spec.fields import Resolved, flag_of, resolve
from mlpstorage.spec.kvcache import KVCacheSpec, rank_arguments


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
        ("model", "gpt-9", "--model"),
        ("touch", "middle", "--touch"),
        ("hosts", "h[3-1]", "--hosts"),
        ("num_processes", "0", "--num-processes"),
        ("label", "disk", "--label"),
        ("prefill_tokens_per_s", "0", "--prefill-tokens-per-s"),
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
    ],
)
def test_options_that_do_not_go_together_are_refused(flags: dict[str, object], flag: str) -> None:
    """What belongs to a trace needs one, and the other way round."""
    with pytest.raises(UsageError, match=flag):
        resolved(flags=flags)


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
    assert [flag_of(KVCacheSpec, name) for name in names] == [f"--{name.replace('_', '-')}" for name in names]


# Ranks

POSITIVE = st.floats(min_value=1e-9, max_value=1e12)
PATHS = st.text(st.characters(exclude_categories=["C"], exclude_characters="\x00"), min_size=1).map(
    lambda text: Path("/") / text
)


def none_or(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """A value that may be left out."""
    return st.none() | values


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(KVCACHE_MODELS),
            "num_users": st.integers(1, 1_000_000),
            "trace": none_or(PATHS),
            "time_scale": POSITIVE,
            "max_requests": none_or(st.integers(1, 1 << 60)),
            "block_tokens": st.integers(1, 1 << 20),
            "disable_multi_turn": st.booleans(),
            "disable_prefix_caching": st.booleans(),
            "seed": st.integers(0, (1 << 63) - 1),
            "duration": POSITIVE,
            "warmup": none_or(st.just(0.0) | POSITIVE),
            "gpu_mem_gb": st.just(0.0) | POSITIVE,
            "cpu_mem_gb": none_or(st.just(0.0) | POSITIVE),
            "storage_gb": none_or(POSITIVE),
            "cache_dir": none_or(PATHS),
            "touch": st.sampled_from(TouchOrder),
            "generation_mode": st.sampled_from(GenerationMode),
            "prefill_tokens_per_s": POSITIVE,
            "decode_tokens_per_s": POSITIVE,
            "performance_profile": st.sampled_from(PerformanceProfile),
            "io_threads": st.integers(1, 1024),
        },
    )
)
def test_a_ranks_command_line_gives_the_spec_back(values: dict[str, object]) -> None:
    """Whatever the values, to the last bit of a float and with any path."""
    if values.get("trace") is None:
        assume("max_requests" not in values or values["max_requests"] is None)
        values.pop("time_scale", None)
    else:
        values.pop("disable_multi_turn", None)
    spec = KVCacheSpec.model_validate(values)
    assert parse_arguments([*rank_arguments(spec), "--run-id", "r 1"]) == (spec, "r 1")


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
