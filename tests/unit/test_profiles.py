"""Layout profiles: what each sets, that each value can be overridden from everywhere, and what the ranks are told."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlpstorage.errors import ConfigurationError, UsageError
from mlpstorage.kvcache.rank import parse_arguments
from mlpstorage.spec.fields import Resolved, resolve
from mlpstorage.spec.kvcache import KVCacheSpec, rank_arguments
from mlpstorage.spec.profiles import PROFILES

FACTS: dict[str, dict[str, Any]] = {
    "vllm-fs": {
        "block_tokens": 16,
        "layout": "file",
        "file_levels": [3, 2],
        "direct": "auto",
        "io_depth": 32,
        "io_priority": "split",
        "eviction": "none",
    },
    "lmcache-disk": {
        "block_tokens": 256,
        "layout": "file",
        "file_levels": [],
        "io_depth": 4,
        "io_priority": "strict",
        "load_batch": 0,
        "eviction": "lru",
        "touch": "tail",
    },
    "llmd-fs": {
        "block_tokens": 256,
        "layout": "file",
        "io_depth": 64,
        "write_overflow": "drop",
        "write_queue_s": 30.0,
        "write_queue_gib": 1024.0,
        "eviction": "none",
    },
    "sglang-file": {
        "block_tokens": 64,
        "layout": "file",
        "load_batch": 128,
        "min_load_tokens": 256,
        "load_timeout": "2:0.1:30",
        "eviction": "lru",
    },
    "hf3fs-slab": {
        "block_tokens": 64,
        "layout": "slab",
        "io_depth": 16,
        "load_batch": 8,
        "write_batch": 8,
        "eviction": "lru",
    },
    "mooncake-bucket": {
        "block_tokens": 512,
        "layout": "bucket",
        "direct": "always",
        "write_interval_s": 10.0,
        "write_queue_gib": 1024.0,
        "eviction": "lru",
        "evict_above": 0.9,
        "evict_to": 0.8,
    },
    "kvbm-slab": {
        "block_tokens": 32,
        "layout": "slab",
        "direct": "always",
        "io_depth": 16,
        "write_batch": 16,
        "store_policy": "second-use",
    },
}
"""Typed from what is known of the engines; the sizes of queues and KVBM's block are the project's choice."""

OTHER: dict[str, Any] = {
    "block_tokens": 128,
    "layout": "file",
    "file_levels": "2",
    "direct": "never",
    "io_depth": 3,
    "io_priority": "strict",
    "eviction": "none",
    "load_batch": 5,
    "touch": "head",
    "write_overflow": "block",
    "write_queue_s": 7.5,
    "write_queue_gib": 2.5,
    "min_load_tokens": 1,
    "load_timeout": "1:2:3",
    "write_batch": 4,
    "write_interval_s": 0.5,
    "evict_above": 0.85,
    "evict_to": 0.7,
    "store_policy": "always",
}
"""Another value for each."""


def resolved(
    *, flags: dict[str, object] | None = None, env: dict[str, str] | None = None, file: Path | None = None
) -> Resolved[KVCacheSpec]:
    """A spec from a script's namespace, an environment and a file."""
    return resolve(KVCacheSpec, Namespace(**(flags or {})), environment=env or {}, config_file=file)


def written(path: Path, **values: object) -> Path:
    """A config file of the values."""
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_profile_is_checked_here() -> None:
    """None of the program's is missing, and none of these."""
    assert list(PROFILES) == list(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_a_profile_sets_its_values_and_no_other(name: str) -> None:
    """Each has `profile` as its source; the rest are the defaults."""
    found = resolved(flags={"profile": name})
    from_profile = {field for field, source in found.sources.items() if source == "profile"}
    parameters = found.spec.parameters()
    assert {field: parameters[field] for field in from_profile} == FACTS[name]
    plain = KVCacheSpec().parameters()
    others = set(plain) - from_profile - {"profile"}
    assert {field: parameters[field] for field in others} == {field: plain[field] for field in others}
    assert (parameters["profile"], found.sources["profile"]) == (name, "flag")


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in FACTS for field in FACTS[name]])
def test_each_value_of_a_profile_can_be_overridden(tmp_path: Path, name: str, field: str) -> None:
    """By a flag, by the environment, by a config file."""
    other = OTHER[field]
    layers: list[tuple[str, Resolved[KVCacheSpec]]] = [
        ("flag", resolved(flags={"profile": name, field: other})),
        ("env", resolved(flags={"profile": name}, env={f"MLPSTORAGE_{field.upper()}": str(other)})),
        ("file", resolved(flags={"profile": name}, file=written(tmp_path / "c.yaml", **{field: other}))),
    ]
    for source, found in layers:
        value = found.spec.parameters()[field]
        assert found.sources[field] == source
        assert value == ([2] if field == "file_levels" else other), source
        assert value != FACTS[name][field] or other == FACTS[name][field]


def test_the_profile_itself_comes_from_anywhere(tmp_path: Path) -> None:
    """A flag beats the environment beats the file, and brings all its values with it."""
    path = written(tmp_path / "c.yaml", profile="vllm-fs")
    assert resolved(file=path).spec.block_tokens == 16
    env = {"MLPSTORAGE_PROFILE": "mooncake-bucket"}
    assert resolved(env=env, file=path).spec.block_tokens == 512
    found = resolved(flags={"profile": "hf3fs-slab"}, env=env, file=path)
    assert (found.spec.block_tokens, found.spec.store_layout, found.sources["layout"]) == (64, "slab", "profile")
    assert found.sources["evict_above"] == "default"


@pytest.mark.parametrize("word", ["none", None])
def test_no_profile_is_a_value_too(tmp_path: Path, word: str | None) -> None:
    """The word `none` as a flag takes back what the file says; a flag that was not given does not."""
    path = written(tmp_path / "c.yaml", profile="vllm-fs")
    spec = resolved(flags={"profile": word}, file=path).spec
    assert (spec.profile, spec.block_tokens) == ((None, None) if word else ("vllm-fs", 16))


def test_an_unknown_profile_is_refused_by_where_it_came_from(tmp_path: Path) -> None:
    """With the names that there are."""
    with pytest.raises(UsageError, match=r"--profile: must be one of vllm-fs, lmcache-disk.*got 'vllm'"):
        resolved(flags={"profile": "vllm"})
    with pytest.raises(ConfigurationError, match=r"MLPSTORAGE_PROFILE \(--profile\)"):
        resolved(env={"MLPSTORAGE_PROFILE": "vllm"})
    with pytest.raises(ConfigurationError, match=r"c\.yaml: profile \(--profile\)"):
        resolved(file=written(tmp_path / "c.yaml", profile=["vllm-fs"]))


@pytest.mark.parametrize("name", FACTS)
def test_ranks_get_the_values_and_not_the_profile(name: str) -> None:
    """A rank's own command line gives the launcher's values back, overridden ones too."""
    flags: dict[str, object] = {"profile": name, "load_timeout": "none", "write_queue_s": "none", "io_threads": 5}
    spec = resolved(flags=flags).spec
    words = rank_arguments(spec)
    assert "--profile" not in words
    there, _ = parse_arguments([*words, "--run-id", "r"])
    assert there == spec.model_copy(update={"profile": None})
    assert (there.load_timeout, there.write_queue_s, there.depth) == (None, None, 5)


def test_threads_beat_a_profiles_depth() -> None:
    """They are one number with the engine of threads; with io_uring the profile's depth stays."""
    assert resolved(flags={"profile": "vllm-fs", "io_threads": 12}).spec.depth == 12
    spec = resolved(flags={"profile": "vllm-fs", "io_threads": 1, "io_engine": "uring"}).spec
    assert (spec.depth, spec.threads) == (32, 1)


def test_a_layout_without_files_needs_no_direct_io() -> None:
    """A profile that asks for direct I/O can be played on no storage at all, or on an object store."""
    for flags in ({"layout": "null"}, {"layout": "object", "cache_dir": "s3://bucket/kv"}):
        found = resolved(flags={"profile": "kvbm-slab", **flags})
        assert (found.spec.direct, found.sources["direct"]) == ("auto", "default")
        assert found.spec.block_tokens == 32


def test_a_profiles_layout_does_not_go_into_a_bucket() -> None:
    """The message says which flag helps."""
    with pytest.raises(UsageError, match=r"--layout slab: s3://bucket/kv can hold layout object only.*--layout object"):
        resolved(flags={"profile": "hf3fs-slab", "cache_dir": "s3://bucket/kv"})


def test_an_eviction_that_begins_earlier_ends_where_it_begins() -> None:
    """Unless it is told where to end: the profile's end would lie above its beginning."""
    found = resolved(flags={"profile": "mooncake-bucket", "evict_above": 0.5})
    assert (found.spec.evict_above, found.spec.evict_to, found.sources["evict_to"]) == (0.5, 0.5, "auto")
    with pytest.raises(UsageError, match=r"--evict-to 0\.95: is above --evict-above 0\.9"):
        resolved(flags={"profile": "mooncake-bucket", "evict_to": 0.95})
