"""Plans, worked by hand: sizes, automatic limits, refusals, layouts, estimates."""

from pathlib import Path
from typing import Any

import pytest

from mlpstorage.cluster.facts import FileSystemSpace
from mlpstorage.config import GIB, MIB
from mlpstorage.errors import ConfigurationError
from mlpstorage.plan.datasize import data_sizes
from mlpstorage.plan.kvcache import (
    NULL_STORAGE_GIB,
    Layout,
    cache_place,
    check_room,
    gib,
    layout,
    rank_directory,
    sizes,
    warmup_s,
    with_automatic_sizes,
    with_settled_io,
)
from mlpstorage.spec.kvcache import KVCacheSpec
from mlpstorage.storage.location import S3Location


def spec(**values: Any) -> KVCacheSpec:  # noqa: ANN401 - fields of the spec
    """A spec with those values."""
    return KVCacheSpec.model_validate(values)


def is_here(name: str) -> bool:
    """Whether a host of these tests is this machine."""
    return name in {"127.0.0.1", "here"}


# Sizes


def test_sizes_of_llama() -> None:
    """2 x 32 layers x 8 heads x 128 values x 2 bytes = 128 KiB a token; 256 tokens are 32 MiB, without padding."""
    planned = sizes(spec(model="llama3.1-8b", gpu_mem_gb=16, cpu_mem_gb=1, storage_gb=2.5, io_threads=8))
    assert planned.bytes_per_token == 128 * 1024
    assert planned.object_bytes == planned.stored_bytes == 32 * MIB
    assert (planned.gpu_blocks, planned.cpu_blocks, planned.storage_blocks) == (512, 32, 80)
    assert (planned.kv_ranks, planned.block_bytes, planned.stored_block_bytes) == (1, 32 * MIB, 32 * MIB)
    assert planned.in_flight_bytes == planned.io_memory_bytes == 256 * MIB
    assert planned.storage_objects == 80


def test_sizes_of_deepseek_are_padded() -> None:
    """61 layers x 576 values x 2 bytes = 70,272 a token; 16 tokens are 1,124,352 bytes, 274.5 pages, so 275."""
    planned = sizes(spec(model="deepseek-v3", gpu_mem_gb=1, cpu_mem_gb=1, storage_gb=1, block_tokens=16))
    assert planned.bytes_per_token == 70_272
    assert planned.object_bytes == 1_124_352
    assert planned.stored_bytes == 275 * 4096 == 1_126_400
    # The GPU holds objects without padding.
    assert planned.gpu_blocks == GIB // 1_124_352 == 954
    assert planned.cpu_blocks == planned.storage_blocks == GIB // 1_126_400 == 953


def test_sizes_of_a_block_that_is_split() -> None:
    """4 of 8 heads of llama are 64 KiB a token: 2 objects of 16 MiB a block of 256; capacities stay in blocks."""
    planned = sizes(spec(tensor_parallel=2, gpu_mem_gb=16, cpu_mem_gb=1, storage_gb=2.5, io_depth=4))
    assert (planned.kv_ranks, planned.bytes_per_token) == (2, 128 * 1024)
    assert planned.object_bytes == planned.stored_bytes == 16 * MIB
    assert planned.block_bytes == planned.stored_block_bytes == 32 * MIB
    assert (planned.gpu_blocks, planned.cpu_blocks, planned.storage_blocks) == (512, 32, 80)
    assert planned.storage_objects == 160
    assert planned.in_flight_bytes == 64 * MIB


def test_sizes_of_heads_that_are_kept_twice() -> None:
    """One head of llama is 16 KiB a token; on 16 ranks a block is 16 objects of 4 MiB, twice what the model has."""
    planned = sizes(spec(tensor_parallel=16, gpu_mem_gb=1, storage_gb=1))
    assert (planned.kv_ranks, planned.object_bytes, planned.block_bytes) == (16, 4 * MIB, 64 * MIB)
    assert planned.bytes_per_token == 256 * 1024
    assert (planned.gpu_blocks, planned.storage_blocks, planned.storage_objects) == (16, 16, 256)


def test_every_part_of_a_split_block_is_padded() -> None:
    """One token of tiny-1b on 4 ranks is 6,144 bytes, 1.5 pages, each: 4 x 8,192 on storage."""
    planned = sizes(spec(model="tiny-1b", tensor_parallel=4, gpu_mem_gb=0, storage_gb=1, block_tokens=1))
    assert (planned.object_bytes, planned.stored_bytes) == (6_144, 8_192)
    assert (planned.block_bytes, planned.stored_block_bytes) == (24_576, 32_768)
    assert planned.storage_blocks == GIB // 32_768


def test_latent_attention_is_kept_once() -> None:
    """However many ranks."""
    one, eight = (
        sizes(spec(model="deepseek-v3", tensor_parallel=number, storage_gb=1, block_tokens=16)) for number in (1, 8)
    )
    assert one == eight
    assert eight.kv_ranks == 1


def test_io_buffers_take_the_objects_and_the_random_bytes() -> None:
    """384 KiB objects at depth 32: 32 to read into, and 64 MiB to write from, in whole objects a buffer (6 each)."""
    small = sizes(spec(model="tiny-1b", io_depth=32, block_tokens=16))
    assert small.stored_bytes == 384 * 1024
    assert small.in_flight_bytes == 32 * 384 * 1024
    assert small.io_memory_bytes == 32 * (1 + 6) * 384 * 1024
    # An HTTP client has the object once more.
    remote = sizes(spec(model="tiny-1b", io_depth=32, cache_dir="s3://bucket/kv", storage_gb=1, block_tokens=16))
    assert remote.io_memory_bytes == small.io_memory_bytes + small.in_flight_bytes


def test_capacities_are_whole_objects() -> None:
    """A tier of one byte less than three objects holds two; what is left to the run is not known."""
    planned = sizes(spec(cpu_mem_gb=(96 * MIB - 1) / GIB, gpu_mem_gb=0))
    assert (planned.gpu_blocks, planned.cpu_blocks, planned.storage_blocks) == (0, 2, None)
    assert sizes(spec()).cpu_blocks is None
    assert sizes(spec()).storage_objects == 0


def test_the_write_queue_holds_two_objects_for_each_in_flight_at_least() -> None:
    """As many GiB of them as asked for where they are small; large objects would leave threads idle."""
    assert sizes(spec(write_queue_gib=2.5)).write_queue_blocks == 80
    assert sizes(spec(write_queue_gib=0.001)).write_queue_blocks == 16
    # 16 objects are 4 blocks of 4 kv ranks.
    assert sizes(spec(write_queue_gib=0.001, tensor_parallel=4)).write_queue_blocks == 4
    assert sizes(spec()).write_queue_blocks == 32
    assert sizes(spec(model="llama2-7b", io_threads=64, block_tokens=4096)).write_queue_blocks == 128
    assert (
        sizes(spec(model="tiny-1b", block_tokens=16)).write_queue_blocks == GIB // (12 * 2 * 4 * 128 * 2 * 16) == 2730
    )


@pytest.mark.parametrize(("storage_gb", "blocks"), [(100, 32), (4, 32), (2.5, 20), (0.1, 1), (0.01, 1)])
def test_the_write_queue_takes_a_quarter_of_the_storage_tier_at_most(storage_gb: float, blocks: int) -> None:
    """2.5 GiB are 80 objects of 32 MiB; a queue of none would let nothing through."""
    assert sizes(spec(storage_gb=storage_gb)).write_queue_blocks == blocks


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({"duration": 60}, 12.0),
        ({"duration": 10}, 2.0),
        ({"duration": 300}, 60.0),
        ({"duration": 3600}, 60.0),
        ({"duration": 60, "warmup": 0}, 0.0),
        ({"duration": 60, "warmup": 100}, 100.0),
        # At most; it ends as soon as the hit ratio is steady.
        ({"duration": 60, "warmup": "steady"}, 600.0),
    ],
)
def test_warm_up(values: dict[str, float], seconds: float) -> None:
    """A fifth of the duration, at most a minute, unless it is given."""
    assert warmup_s(spec(**values)) == seconds


def test_blocks_are_of_256_tokens_where_nothing_else_is_said() -> None:
    """The default where neither a flag, a profile nor a trace says more; a size that is given is taken."""
    assert sizes(spec()).block_tokens == 256
    assert sizes(spec(block_tokens=16)).block_tokens == 16


# Automatic sizes


def automatic(given: KVCacheSpec, memory_gib: float, total_gib: float, free_gib: float, ranks: int = 1) -> KVCacheSpec:
    """The spec with its sizes worked out for such a host."""
    space = FileSystemSpace(
        total_bytes=int(total_gib * GIB), free_bytes=int(free_gib * GIB), mount="/mnt", fs_type="ext4"
    )
    return with_automatic_sizes(given, memory_free_bytes=int(memory_gib * GIB), space=space, ranks_on_host=ranks)


def automatic_without_space(given: KVCacheSpec) -> KVCacheSpec:
    """The same, where nobody tells how much room there is."""
    return with_automatic_sizes(given, memory_free_bytes=20 * GIB, space=None, ranks_on_host=1)


@pytest.mark.parametrize(
    ("memory_gib", "ranks", "cpu_mem_gb"),
    [(20, 1, 10.0), (20, 4, 2.5), (1000, 1, 32.0), (200, 2, 32.0), (0.001, 1, 0.0)],
)
def test_dram_is_32_gib_or_half_of_what_is_free_for_the_rank(memory_gib: float, ranks: int, cpu_mem_gb: float) -> None:
    """Whichever is less, in whole MiB."""
    assert automatic(spec(), memory_gib, 100, 100, ranks).cpu_mem_gb == cpu_mem_gb


@pytest.mark.parametrize(("free_gib", "ranks", "storage_gb"), [(100, 1, 80.0), (50, 1, 30.0), (50, 3, 10.0)])
def test_storage_leaves_a_fifth_of_the_file_system_free(free_gib: float, ranks: int, storage_gb: float) -> None:
    """Of 100 GiB, 20 stay free; the ranks of a host share the rest."""
    assert automatic(spec(), 10, 100, free_gib, ranks).storage_gb == storage_gb


def test_a_file_system_that_is_nearly_full_needs_a_limit_from_the_user() -> None:
    """The message names what is free, and the flags that help."""
    with pytest.raises(ConfigurationError, match=r"15\.00 GiB free of 100\.00 GiB.*--storage-gb.*--cache-dir"):
        automatic(spec(), 10, 100, 15)
    assert automatic(spec(storage_gb=3), 10, 100, 15).storage_gb == 3


def test_what_was_given_is_kept() -> None:
    """Only what was left to the program is worked out, the warm-up too."""
    given = spec(cpu_mem_gb=0, storage_gb=7, warmup=1, layout="slab", io_depth=3, io_threads=3)
    assert automatic(given, 10, 100, 100) == given
    assert automatic(spec(duration=50), 10, 100, 100).warmup == 10.0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cache_dir": "s3://bucket/kv"}, "--storage-gb: an object store tells no size"),
        ({"cache_dir": "/ramfs"}, "--storage-gb: the file system of the cache directory tells no size"),
    ],
)
def test_a_place_without_a_size_needs_a_limit_from_the_user(values: dict[str, object], said: str) -> None:
    """An object store, and a file system such as ramfs."""
    with pytest.raises(ConfigurationError, match=said):
        automatic_without_space(spec(**values))
    assert automatic_without_space(spec(storage_gb=3, **values)).storage_gb == 3


def test_what_stores_nothing_has_a_limit_all_the_same() -> None:
    """Layout null takes a fixed one, whatever the file system, and its sizes follow as usual."""
    found = automatic_without_space(spec(layout="null"))
    assert found.storage_gb == NULL_STORAGE_GIB == 100
    assert sizes(found).storage_blocks == 3200


def test_layout_and_threads_are_settled_without_a_host() -> None:
    """Here as in the automatic sizes; what was given stays."""
    settled = with_settled_io(spec(io_depth=5))
    assert (settled.layout, settled.io_depth, settled.io_threads) == ("file", 5, 5)
    settled = automatic_without_space(spec(cache_dir="s3://bucket/kv", storage_gb=1))
    assert (settled.layout, settled.io_depth, settled.io_threads) == ("object", 8, 8)
    settled = with_settled_io(spec(io_engine="uring", layout="slab"))
    assert (settled.layout, settled.io_depth, settled.io_threads) == ("slab", 8, 1)


# Room


def check(given: KVCacheSpec, *, memory_gib: float = 100, free_gib: float = 100, ranks: int = 1) -> None:
    """Check a spec against such a host."""
    check_room(
        given,
        sizes(given),
        memory_free_bytes=int(memory_gib * GIB),
        storage_free_bytes=int(free_gib * GIB),
        ranks_on_host=ranks,
        where="/mnt/cache",
    )


def test_a_plan_that_fits_is_not_refused() -> None:
    """To the byte: 1 GiB of DRAM, 8 x 32 MiB in flight and 250 MiB; 10 GiB of storage."""
    check(spec(cpu_mem_gb=1, storage_gb=10), memory_gib=(1024 + 256 + 250) / 1024, free_gib=10)


def test_too_little_memory_is_refused_with_the_need_and_the_flag() -> None:
    """Two ranks of 1 GiB + 256 MiB + 250 MiB each need 2.99 GiB."""
    with pytest.raises(
        ConfigurationError,
        match=r"not enough memory.*2\.99 GiB for 2 ranks.*2\.90 GiB are free.*--cpu-mem-gb, --io-depth",
    ):
        check(spec(cpu_mem_gb=1, storage_gb=10), memory_gib=2.9, ranks=2)


def test_a_place_that_tells_no_size_is_not_too_small() -> None:
    """Its room is not checked; memory is."""
    given = spec(cpu_mem_gb=0, storage_gb=10_000, cache_dir="s3://bucket/kv")
    planned = sizes(given)

    def check_it(memory_bytes: int) -> None:
        check_room(
            given,
            planned,
            memory_free_bytes=memory_bytes,
            storage_free_bytes=None,
            ranks_on_host=1,
            where="s3://bucket/kv",
        )

    # 8 objects of 32 MiB, the client's copies of them, 250 MiB.
    check_it((256 + 256 + 250) * MIB)
    with pytest.raises(ConfigurationError, match=r"I/O buffers 0\.50 GiB"):
        check_it((256 + 256 + 250) * MIB - 1)


def test_too_little_space_is_refused_with_the_need_and_the_flag() -> None:
    """Three ranks of 10 GiB do not fit into 29."""
    with pytest.raises(
        ConfigurationError,
        match=r"not enough space.*30\.00 GiB for 3 ranks in /mnt/cache, 29\.00 GiB are free.*--storage-gb.*--cache-dir",
    ):
        check(spec(cpu_mem_gb=0, storage_gb=10), free_gib=29, ranks=3)


def test_a_storage_tier_without_room_for_one_object_is_refused() -> None:
    """31 MiB hold no object of 32 MiB; they do hold one of half its tokens."""
    small = spec(cpu_mem_gb=0, storage_gb=31 / 1024)
    with pytest.raises(ConfigurationError, match=r"holds no block of 32\.00 MiB.*--storage-gb.*--block-tokens"):
        check(small)
    check(small.model_copy(update={"block_tokens": 128}))


# Layout


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Layout(ranks=1, ranks_here=1, uses_mpi=False)),
        ({"num_processes": 1}, Layout(ranks=1, ranks_here=1, uses_mpi=False)),
        ({"num_processes": 4}, Layout(ranks=4, ranks_here=4, uses_mpi=True)),
        ({"hosts": ["here:3"]}, Layout(ranks=3, ranks_here=3, uses_mpi=True)),
        ({"hosts": ["there"]}, Layout(ranks=1, ranks_here=0, uses_mpi=True)),
        ({"hosts": ["h[1-4]"]}, Layout(ranks=4, ranks_here=0, uses_mpi=True)),
        ({"hosts": ["h1:4", "h2"]}, Layout(ranks=5, ranks_here=0, uses_mpi=True)),
        ({"hosts": ["h1", "h2"], "num_processes": 8}, Layout(ranks=8, ranks_here=0, uses_mpi=True)),
    ],
)
def test_layout(values: dict[str, object], expected: Layout) -> None:
    """MPI where another machine is named or there are several ranks; a rank for each host or slot by default."""
    assert layout(spec(**values), is_here) == expected


def test_each_rank_has_a_directory_of_its_own() -> None:
    """Below the cache directory."""
    assert rank_directory(Path("/c"), 0) != rank_directory(Path("/c"), 1)
    assert rank_directory(Path("/c"), 12).parent == Path("/c")
    assert rank_directory(S3Location("bucket", "kv"), 3) == S3Location("bucket", "kv/rank_3")


def test_ranks_that_share_a_cache_have_one_place() -> None:
    """The cache directory itself; else one each below it."""
    shared = spec(cache_scope="shared")
    assert {cache_place(shared, Path("/c"), rank) for rank in range(3)} == {Path("/c")}
    assert cache_place(shared, S3Location("bucket", "kv"), 1) == S3Location("bucket", "kv")
    assert cache_place(spec(), Path("/c"), 1) == rank_directory(Path("/c"), 1)


def test_ranks_of_other_hosts_count_where_they_share_the_file_system() -> None:
    """The automatic limit is shared out among them all, and all of them must fit; memory is that of one host."""
    space = FileSystemSpace(mount="/", fs_type="nfs4", total_bytes=100 * GIB, free_bytes=60 * GIB)
    asked = spec(cache_scope="shared", cpu_mem_gb=0.1, model="tiny-1b")
    found = with_automatic_sizes(asked, memory_free_bytes=64 * GIB, space=space, ranks_on_host=2, ranks_on_storage=8)
    assert found.storage_gb == (60 - 20) / 8
    large = found.model_copy(update={"storage_gb": 10.0})

    def check(ranks_on_storage: int | None) -> None:
        check_room(
            large,
            sizes(large),
            memory_free_bytes=64 * GIB,
            storage_free_bytes=60 * GIB,
            ranks_on_host=2,
            where="/c",
            ranks_on_storage=ranks_on_storage,
        )

    check(None)
    check(6)
    with pytest.raises(ConfigurationError, match=r"80.00 GiB for 8 ranks in /c, 60.00 GiB are free"):
        check(8)


@pytest.mark.parametrize(
    ("count", "text"), [(GIB, "1.00 GiB"), (GIB // 2, "0.50 GiB"), (32 * MIB, "32.00 MiB"), (0, "0.00 MiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    """GiB from a tenth of one, MiB below."""
    assert gib(count) == text


# Estimates


def test_data_sizes_of_llama() -> None:
    """131,072 bytes a token x 20,000 tokens a second = 2.44 GiB/s; 2,048 tokens are 8 blocks of 32 MiB a user."""
    estimate = data_sizes(
        spec(num_users=100, gpu_mem_gb=16, cpu_mem_gb=32, storage_gb=100, prefill_tokens_per_s=20_000)
    )
    assert estimate.bytes_per_token == 131_072
    assert estimate.bytes_per_block == estimate.stored_bytes_per_block == 33_554_432
    assert estimate.padding_bytes_per_block == 0
    assert estimate.break_even_gib_per_s == pytest.approx(2_621_440_000 / 1_073_741_824)
    first = estimate.contexts[0]
    assert (first.context_tokens, first.blocks_per_user) == (2048, 8)
    assert first.bytes_per_user == 8 * 33_554_432
    assert first.bytes_all_users == 100 * 8 * 33_554_432
    assert [(tier.tier, tier.blocks, tier.tokens) for tier in estimate.tiers] == [
        ("gpu", 512, 131_072),
        ("cpu", 1024, 262_144),
        ("storage", 3200, 819_200),
    ]
    assert (estimate.total_blocks, estimate.total_tokens) == (4736, 1_212_416)


def test_data_sizes_without_every_tier_have_no_total() -> None:
    """What is left to the run is None, never 0."""
    estimate = data_sizes(spec())
    assert [tier.blocks for tier in estimate.tiers] == [512, None, None]
    assert (estimate.total_blocks, estimate.total_tokens) == (None, None)
    assert estimate.as_dict()["total_blocks"] is None


def test_data_sizes_count_full_blocks_with_their_padding() -> None:
    """2,048 tokens hold 20 blocks of 100; each of DeepSeek's is 7,027,200 bytes in 1,716 pages."""
    estimate = data_sizes(spec(model="deepseek-v3", block_tokens=100, num_users=3))
    assert estimate.bytes_per_block == 7_027_200
    assert estimate.stored_bytes_per_block == 1716 * 4096
    assert estimate.padding_bytes_per_block == 1536
    assert estimate.contexts[0].blocks_per_user == 20
    assert estimate.contexts[0].bytes_all_users == 3 * 20 * 1716 * 4096


def test_data_sizes_of_a_split_block() -> None:
    """Two objects a block; the bytes of a block and of a user stay, those of an object are half."""
    whole, split = (data_sizes(spec(tensor_parallel=number, storage_gb=1)) for number in (1, 2))
    assert (whole.objects_per_block, whole.bytes_per_object) == (1, 33_554_432)
    assert (split.objects_per_block, split.bytes_per_object) == (2, 16_777_216)
    assert split.bytes_per_block == whole.bytes_per_block
    assert split.contexts == whole.contexts
    # One head each on 16 ranks: all is kept twice, and read twice.
    twice = data_sizes(spec(tensor_parallel=16, storage_gb=1))
    assert twice.contexts[0].bytes_per_user == 2 * whole.contexts[0].bytes_per_user
    assert twice.break_even_gib_per_s is not None
    assert whole.break_even_gib_per_s is not None
    assert twice.break_even_gib_per_s == pytest.approx(2 * whole.break_even_gib_per_s)
    assert (twice.as_dict()["tensor_parallel"], twice.as_dict()["profile"]) == (16, None)
