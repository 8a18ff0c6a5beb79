"""The text of `--what-if` and of `datasize`: what a storage engineer would ask of a plan stands in it."""

from argparse import Namespace
from pathlib import Path

import pytest

from mlpstorage.plan.datasize import data_sizes
from mlpstorage.plan.kvcache import layout, sizes
from mlpstorage.report.plan import data_sizes_text, plan_text
from mlpstorage.spec.fields import resolve
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.location import S3Location


def rows(**flags: object) -> dict[str, str]:
    """The rows of the plan of a spec with those flags by their names; those of the parameters as `=name`."""
    found = resolve(KVCacheSpec, Namespace(**flags), environment={})
    text = plan_text(
        found.spec,
        found.sources,
        sizes(found.spec),
        layout(found.spec, lambda _: True),
        result_dir=Path("/results"),
        cache_dir=found.spec.cache_dir or Path("/results/cache"),
        command="the command",
        refusal=None,
    )
    plan, _, parameters = text.partition("Parameters:")
    found_rows = {}
    for part, prefix in ((plan, ""), (parameters, "=")):
        for line in part.splitlines():
            name, separator, rest = line.strip().partition("  ")
            if line.startswith("  ") and separator:
                found_rows[prefix + name] = rest.strip()
    return found_rows


def test_a_plain_plan_names_what_moves_the_bytes() -> None:
    """Layout, objects in flight, direct I/O, syncs and checks; nothing of profiles and policies."""
    shown = rows()
    assert shown["layout"] == "file, hash directories 1,1"
    assert shown["I/O"] == (
        "threads, 8 objects in flight, 8 threads, priority split, direct auto, write sync none, verify stamp"
    )
    assert shown["blocks"].startswith("256 tokens, 32.00 MiB each")
    assert (shown["objects"], shown["profile"], shown["policies"]) == ("one a block", "none", "the default ones")
    assert shown["cache files"] == "/results/cache"


def test_a_profiles_plan_names_what_it_sets() -> None:
    """And how its policies differ from the default ones; values have their source."""
    shown = rows(profile="mooncake-bucket", io_depth=4)
    assert shown["profile"].startswith("mooncake-bucket: block_tokens, layout, direct, ")
    assert shown["layout"] == "bucket"
    assert "direct always" in shown["I/O"]
    assert "4 objects in flight" in shown["I/O"]
    assert shown["policies"] == "evict-above 0.9, evict-to 0.8, write-queue-gib 1024, write-interval-s 10"
    assert shown["=evict_above"] == "0.9  (profile)"
    assert shown["=io_depth"] == "4  (flag)"


@pytest.mark.parametrize(
    ("flags", "name", "text"),
    [
        ({"profile": "lmcache-disk"}, "layout", "file, hash directories flat"),
        ({"profile": "lmcache-disk"}, "=file_levels", "flat  (profile)"),
        ({"profile": "sglang-file"}, "policies", "load-batch 128, min-load-tokens 256, load-timeout 2:0.1:30"),
        ({"tensor_parallel": 4}, "objects", "4 a block, 8.00 MiB each (tensor parallel 4)"),
        (
            {"model": "deepseek-v3", "tensor_parallel": 8},
            "objects",
            "one a block (tensor parallel 8, MLA is kept once)",
        ),
        ({}, "compute", "1 x h100, 0.5 of their peak in prefill; generation mode realistic"),
        (
            {"prefill_tokens_per_s": 20_000, "decode_tokens_per_s": 50, "generation_mode": "fast"},
            "compute",
            "prefill of 20,000 tokens/s, decode of 50 tokens/s; generation mode fast",
        ),
        ({"accelerator": "none"}, "compute", "not modelled; generation mode realistic"),
        ({"layout": "null"}, "layout", "null: nothing is stored, the client is measured"),
        ({"layout": "null"}, "cache files", "none"),
        ({"layout": "null"}, "=verify", "off  (auto)"),
        (
            {"io_engine": "uring", "layout": "slab", "write_sync": "batch", "verify": "full", "direct": "always"},
            "I/O",
            "uring, 8 objects in flight, 1 thread, direct always, write sync batch, verify full",
        ),
        ({}, "load", "100 synthetic users a rank (chat=1), closed loop"),
        ({"workload": "chat=3,rag=1", "num_users": 5}, "load", "5 synthetic users a rank (chat=3,rag=1), closed loop"),
        ({"enable_rag": True}, "load", "100 synthetic users a rank (rag=1), closed loop"),
        (
            {"request_rate": 2.5},
            "load",
            "100 synthetic users a rank (chat=1), 2.5 requests a second of all ranks together",
        ),
        (
            {"trace": "t", "trace_format": "mooncake", "arrivals": "open", "time_scale": 0.5, "spread_arrivals": 3},
            "load",
            "trace t (mooncake), open loop, times x 0.5, spread over 3 s, first all requests",
        ),
        (
            {"trace": "t", "trace_format": "agentic", "arrivals": "session", "max_requests": 7},
            "load",
            "trace t (agentic), sessions at their starts, with their pauses, times x 1, first 7 requests",
        ),
        (
            {"trace": "t", "trace_format": "agentic", "arrivals": "closed", "num_users": 4},
            "load",
            "trace t (agentic), its sessions one after the other by 4 users a rank, first all requests",
        ),
        (
            {"trace": "t", "trace_format": "azure", "arrivals": "open", "request_rate": 9},
            "load",
            "trace t (azure), open loop, 9 requests a second of all ranks together, first all requests",
        ),
        ({"duration": 10}, "phases", "warm-up 2 s, measured window 10 s, drain"),
        ({"duration": 10, "trials": 3}, "phases", "3 times: warm-up 2 s, measured window 10 s, drain"),
        (
            {"duration": 10, "warmup": "steady"},
            "phases",
            "warm-up to a steady hit ratio, at most 600 s, measured window 10 s, drain",
        ),
        ({"promote": "never", "decisions": "completion"}, "policies", "promote never, decisions completion"),
        ({"cache_dir": "/c", "reuse_cache": True, "keep_cache": True}, "policies", "reuses the cache, keeps it"),
    ],
)
def test_rows_of_a_plan(flags: dict[str, object], name: str, text: str) -> None:
    """Each says what would be done, and no more than applies to the layout and the engine."""
    assert rows(**flags)[name] == text


def test_a_plan_for_an_object_store_contacts_nobody() -> None:
    """Without credentials or an endpoint its text is there, with bucket, parts and the limit of an operation."""
    shown = rows(cache_dir="s3://bucket/kv", io_limit_s=5, object_part_mib=8, storage_gb=10)
    assert shown["cache files"] == str(S3Location("bucket", "kv")) == "s3://bucket/kv"
    assert shown["layout"] == "object, parts of 8 MiB, 5 s an operation at most"
    assert shown["I/O"] == "threads, 8 objects in flight, 8 threads, priority split, verify stamp"


def test_sizes_name_what_they_are_of() -> None:
    """Profile and tensor parallelism stand beside the model where there are any; objects are counted."""
    plain = data_sizes_text(data_sizes(KVCacheSpec()))
    assert plain.startswith("llama3.1-8b, 100 users, sizes of one rank:\n")
    assert "1 a block, 33,554,432 bytes each" in plain
    spec = resolve(KVCacheSpec, Namespace(profile="hf3fs-slab", tensor_parallel=8), environment={}).spec
    split = data_sizes_text(data_sizes(spec))
    assert split.startswith("llama3.1-8b, profile hf3fs-slab, tensor parallel 8, 100 users, ")
    assert "64 tokens, 8,388,608 bytes" in split
    assert "8 a block, 1,048,576 bytes each" in split


def test_a_plan_says_what_ranks_share() -> None:
    """Where the one cache lies, how large it may grow, and how requests come to the ranks."""
    shown = rows(
        cache_scope="shared", num_processes=4, storage_gb=2.5, trace="t.jsonl", placement="prefix", cache_dir="/mnt/kv"
    )
    assert shown["cache files"] == "/mnt/kv, one cache of all ranks"
    assert shown["storage tier"] == "at most 2.5 GiB a rank of what it writes, 10 GiB together"
    assert "placed by prefix" in shown["load"]
    assert rows(cache_scope="shared")["storage tier"] == rows()["storage tier"]
    assert "placed by round-robin" in rows(request_rate=5, placement="round-robin")["load"]
    assert rows(num_processes=4, storage_gb=2.5)["storage tier"] == "at most 2.5 GiB a rank"
