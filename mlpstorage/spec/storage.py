"""How objects lie on storage, what moves them, and the policies of the storage tier: the third part of the spec."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, field_validator, model_validator

from mlpstorage.config import (
    Decisions,
    DirectMode,
    Eviction,
    IoEngineName,
    IoPriority,
    Layout,
    Promotion,
    StorePolicy,
    Verify,
    WriteOverflow,
    WriteSync,
)
from mlpstorage.spec.compute import BOTH
from mlpstorage.spec.fields import Option
from mlpstorage.spec.load_timeout import LoadTimeout, parse_load_timeout
from mlpstorage.spec.profiles import PROFILES
from mlpstorage.spec.workload import WorkloadSpec
from mlpstorage.storage.location import S3Location

STORAGE = "Storage I/O"
POLICY = "Cache policy"

DEFAULT_IO_DEPTH = 8

FLAT = "flat"
"""What no hash directories are called."""

MAX_LEVEL_DIGITS = 4
"""Hex digits of one hash directory's name: 65,536 directories side by side are the most that make sense."""

MAX_LEVELS = 4

FILE_LAYOUTS = (Layout.FILE, Layout.SLAB, Layout.BUCKET)
"""Layouts that lie in files."""


def parse_levels(value: object) -> object:
    """Hex digits of each level of directories from `1,1` or `flat`; all but texts and numbers as it is.

    Raises:
        ValueError: The text is neither.
    """
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return value
    if value == FLAT:
        return ()
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError("expected numbers of hex digits, such as 1,1 or 3,2, or flat") from None


def levels_text(levels: Sequence[int]) -> str:
    """What `parse_levels` reads."""
    return ",".join(map(str, levels)) or FLAT


class StorageSpec(WorkloadSpec):
    """What is played and how it is kept. None stands for a value that is worked out."""

    profile: Annotated[
        str | None,
        Field(description="layout, blocks, threads and policies of a production engine; each value can be overridden"),
        # A rank gets the values that follow from it.
        Option(
            flags=("--profile",),
            group=STORAGE,
            metavar="NAME",
            commands=BOTH,
            default_text="none",
            rank=False,
            choices=tuple(PROFILES),
            none=True,
        ),
    ] = None
    layout: Annotated[
        Layout | None,
        Field(description="how objects lie on storage; null stores nothing and measures the client"),
        Option(flags=("--layout",), group=STORAGE, default_text="file, or object where --cache-dir is s3://..."),
    ] = None
    tensor_parallel: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="kv ranks over which a block is split, one object each; models with latent attention (MLA) "
            "keep one copy",
        ),
        Option(flags=("--tensor-parallel",), group=STORAGE, metavar="N", commands=BOTH),
    ] = 1
    io_engine: Annotated[
        IoEngineName,
        Field(description="what moves the bytes: threads, or io_uring where it can be used"),
        Option(flags=("--io-engine",), group=STORAGE),
    ] = IoEngineName.THREADS
    io_depth: Annotated[
        int | None,
        Field(ge=1, le=1024, description="objects in flight of each rank"),
        Option(flags=("--io-depth",), group=STORAGE, metavar="N", default_text=f"{DEFAULT_IO_DEPTH}"),
    ] = None
    io_threads: Annotated[
        int | None,
        Field(ge=1, le=1024, description="threads of each rank that drive them"),
        Option(
            flags=("--io-threads",),
            group=STORAGE,
            metavar="N",
            default_text="one for each object in flight; 1 with --io-engine uring",
        ),
    ] = None
    io_priority: Annotated[
        IoPriority,
        Field(
            description="what a thread takes next; split: half of the threads prefer loads, half stores; strict: "
            "loads, then deletes, then stores"
        ),
        Option(flags=("--io-priority",), group=STORAGE),
    ] = IoPriority.SPLIT
    direct: Annotated[
        DirectMode,
        Field(
            description="direct I/O; auto: where the file system takes it, and the result says for how many files; "
            "always: or the run is refused"
        ),
        Option(flags=("--direct",), group=STORAGE),
    ] = DirectMode.AUTO
    write_sync: Annotated[
        WriteSync,
        Field(
            description="force writes to stable storage; file: each object before it can be found; batch: the blocks "
            "of a batch together"
        ),
        Option(flags=("--write-sync",), group=STORAGE),
    ] = WriteSync.NONE
    verify: Annotated[
        Verify,
        Field(description="check of what was read: nothing, the stamp of every page, or every byte"),
        Option(flags=("--verify",), group=STORAGE, default_text=f"{Verify.STAMP}, or off where --layout is null"),
    ] = Verify.STAMP
    file_levels: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MAX_LEVEL_DIGITS)], ...],
        BeforeValidator(parse_levels),
        Field(
            max_length=MAX_LEVELS,
            description="layout file: hex digits of each level of hash directories; `1,1` is x/y/NAME, `flat` is none",
        ),
        Option(flags=("--file-levels",), group=STORAGE, metavar="DIGITS", default_text="1,1"),
    ] = (1, 1)
    object_part_mib: Annotated[
        int,
        # 5 MiB is the least that S3 takes, 5 GiB the most.
        Field(ge=5, le=5 * 1024, description="layout object: MiB of the parts in which larger objects are moved"),
        Option(flags=("--object-part-mib",), group=STORAGE, metavar="MIB"),
    ] = 16
    io_limit_s: Annotated[
        float,
        Field(gt=0, description="layout object: longest time of one operation with its retries"),
        Option(flags=("--io-limit-s",), group=STORAGE, metavar="SECONDS"),
    ] = 30.0
    keep_cache: Annotated[
        bool,
        Field(description="leave the objects on storage when the run is over"),
        Option(flags=("--keep-cache",), group=STORAGE),
    ] = False
    reuse_cache: Annotated[
        bool,
        Field(description="begin with the objects that an earlier run left in --cache-dir"),
        Option(flags=("--reuse-cache",), group=STORAGE),
    ] = False

    store_policy: Annotated[
        StorePolicy,
        Field(description="store a new block always, or from its second use on"),
        Option(flags=("--store-policy",), group=POLICY),
    ] = StorePolicy.ALWAYS
    promote: Annotated[
        Promotion,
        Field(description="whether what was found on storage also goes to DRAM, where the GPU tier has no room for it"),
        Option(flags=("--promote",), group=POLICY),
    ] = Promotion.ALWAYS
    decisions: Annotated[
        Decisions | None,
        Field(
            description="what a request finds, stores and evicts is decided; completion: by what is complete; arrival: "
            "at its arrival, so that two runs of an open loop do the same, and reads wait for the writes they need"
        ),
        Option(
            flags=("--decisions",),
            group=POLICY,
            default_text="arrival in an open loop with --max-requests and one rank, else completion",
        ),
    ] = None
    eviction: Annotated[
        Eviction,
        Field(
            description="where the storage tier is full; lru: delete what was used least recently; none: store nothing "
            "more"
        ),
        Option(flags=("--eviction",), group=POLICY),
    ] = Eviction.LRU
    evict_above: Annotated[
        float,
        Field(gt=0, le=1, description="part of the storage tier beyond which it is not filled, but evicts"),
        Option(flags=("--evict-above",), group=POLICY, metavar="PART"),
    ] = 1.0
    evict_to: Annotated[
        float,
        Field(gt=0, le=1, description="part of the storage tier that an eviction leaves filled"),
        Option(flags=("--evict-to",), group=POLICY, metavar="PART", default_text="that of --evict-above"),
    ] = 1.0
    write_overflow: Annotated[
        WriteOverflow,
        Field(description="new blocks that the write queue cannot take: wait with their request, or are not stored"),
        Option(flags=("--write-overflow",), group=POLICY),
    ] = WriteOverflow.BLOCK
    write_queue_gib: Annotated[
        float,
        Field(
            gt=0,
            description="new blocks that may wait to be written, GiB; takes no memory; two objects for each in flight "
            "at least, a quarter of the storage tier at most",
        ),
        Option(flags=("--write-queue-gib",), group=POLICY, metavar="GIB"),
    ] = 1.0
    write_queue_s: Annotated[
        float | None,
        Field(gt=0, description="longest time that a new block should wait to be written, by the rate so far"),
        Option(flags=("--write-queue-s",), group=POLICY, metavar="SECONDS", default_text="none", none=True),
    ] = None
    write_batch: Annotated[
        int,
        Field(ge=1, le=1 << 20, description="blocks that are written, and can be found, together"),
        Option(flags=("--write-batch",), group=POLICY, metavar="BLOCKS"),
    ] = 16
    write_interval_s: Annotated[
        float,
        Field(ge=0, description="new blocks collect for so long before they are written; 0: at once"),
        Option(flags=("--write-interval-s",), group=POLICY, metavar="SECONDS"),
    ] = 0.0
    load_batch: Annotated[
        int,
        Field(ge=0, le=1 << 20, description="objects of a request that are read in order, one by one; 0: all of them"),
        Option(flags=("--load-batch",), group=POLICY, metavar="OBJECTS"),
    ] = 1
    min_load_tokens: Annotated[
        int,
        Field(ge=0, le=1 << 40, description="load from storage only where it holds more than so many of the tokens"),
        Option(flags=("--min-load-tokens",), group=POLICY, metavar="N"),
    ] = 0
    load_timeout: Annotated[
        InstanceOf[LoadTimeout] | None,
        BeforeValidator(parse_load_timeout),
        PlainSerializer(str, when_used="json-unless-none"),
        Field(
            description="give up a load from storage after so many seconds, and compute; 2:0.1:30 is 2 s, 0.1 s more "
            "for each 1,024 tokens, 30 s at most"
        ),
        Option(flags=("--load-timeout",), group=POLICY, metavar="SECONDS", default_text="none", none=True),
    ] = None

    @property
    def store_layout(self) -> Layout:
        """How objects lie on storage."""
        if self.layout is not None:
            return self.layout
        return Layout.OBJECT if isinstance(self.cache_dir, S3Location) else Layout.FILE

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, on all kv ranks: more than the model's where heads are kept twice."""
        return self.shape.kv_ranks(self.tensor_parallel) * self.shape.kv_rank_bytes_per_token(self.tensor_parallel)

    @property
    def depth(self) -> int:
        """Objects in flight of each rank."""
        if self.io_depth is not None:
            return self.io_depth
        if self.io_threads is not None and self.io_engine is IoEngineName.THREADS:
            return self.io_threads
        return DEFAULT_IO_DEPTH

    @property
    def threads(self) -> int:
        """Threads of each rank that drive them."""
        return self.depth if self.io_engine is IoEngineName.THREADS else 1

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, value: str | None) -> str | None:
        if value is not None and value not in PROFILES:
            raise ValueError(f"must be one of {', '.join(PROFILES)}")
        return value

    @field_validator("layout", mode="before")
    @classmethod
    def _null_is_a_word(cls, value: object) -> object:
        if value is None:
            raise ValueError('"null" needs quotes in a config file; leave the line out to have it worked out')
        return value

    @model_validator(mode="before")
    @classmethod
    def _some_defaults_follow(cls, values: object) -> object:
        """What is not stored cannot be verified, and an eviction goes no further than it must."""
        if not isinstance(values, Mapping):
            return values
        follow: dict[str, Any] = {}
        if values.get("layout") == Layout.NULL:
            follow["verify"] = Verify.OFF
        if "evict_above" in values:
            follow["evict_to"] = values["evict_above"]
        return follow | dict(values)

    @model_validator(mode="after")
    def _layout_fits(self) -> "StorageSpec":
        layout, in_bucket = self.store_layout, isinstance(self.cache_dir, S3Location)
        if layout is Layout.OBJECT and not in_bucket:
            raise ValueError("--layout object: needs --cache-dir s3://bucket/prefix")
        if in_bucket and layout is not Layout.OBJECT:
            raise ValueError(f"--layout {layout}: {self.cache_dir} can hold layout object only: give --layout object")
        if layout is Layout.NULL and self.verify is not Verify.OFF:
            raise ValueError(f"--verify {self.verify}: layout null stores nothing that could be verified")
        if layout not in FILE_LAYOUTS and self.direct is DirectMode.ALWAYS:
            raise ValueError(f"--direct always: layout {layout} has no files")
        if layout not in FILE_LAYOUTS and self.io_engine is IoEngineName.URING:
            raise ValueError(f"--io-engine uring: layout {layout} has no files; use --io-engine threads")
        return self

    @model_validator(mode="after")
    def _cache_can_last(self) -> "StorageSpec":
        for name, wanted in (("keep", self.keep_cache), ("reuse", self.reuse_cache)):
            if wanted and self.store_layout is Layout.NULL:
                raise ValueError(f"--{name}-cache: layout null stores nothing")
        if self.reuse_cache and self.cache_dir is None:
            raise ValueError("--reuse-cache: needs --cache-dir, where an earlier run left its objects")
        return self

    @property
    def timed_policy(self) -> str | None:
        """The flag of a policy whose decisions hang on time, so that they cannot be made at arrival; None without."""
        timed = {
            "--write-overflow drop": self.write_overflow is WriteOverflow.DROP,
            "--write-interval-s": self.write_interval_s > 0,
            "--write-queue-s": self.write_queue_s is not None,
            "--load-timeout": self.load_timeout is not None,
        }
        return next((flag for flag, given in timed.items() if given), None)

    @model_validator(mode="after")
    def _arrival_decides_all(self) -> "StorageSpec":
        if self.decisions is Decisions.ARRIVAL and self.timed_policy is not None:
            raise ValueError(f"--decisions arrival: {self.timed_policy} decides by time")
        return self

    @model_validator(mode="after")
    def _trials_begin_empty(self) -> "StorageSpec":
        if self.trials > 1 and (self.keep_cache or self.reuse_cache):
            raise ValueError(
                f"--trials: each begins with an empty cache: leave out --{'keep' if self.keep_cache else 'reuse'}-cache"
            )
        return self

    @model_validator(mode="after")
    def _heads_can_be_split(self) -> "StorageSpec":
        if not self.shape.splits_over(self.tensor_parallel):
            raise ValueError(
                f"--tensor-parallel {self.tensor_parallel}: {self.model} has {self.shape.kv_heads} KV heads; must "
                "divide them, or be a multiple of them (each head is then kept several times)"
            )
        return self

    @model_validator(mode="after")
    def _depth_has_its_threads(self) -> "StorageSpec":
        if self.io_threads is None:
            return self
        if self.io_engine is IoEngineName.URING and self.io_threads != 1:
            raise ValueError(
                f"--io-threads {self.io_threads}: with --io-engine uring one thread drives all objects in flight: "
                "leave it out, and give --io-depth"
            )
        if self.io_engine is IoEngineName.THREADS and self.io_depth not in {None, self.io_threads}:
            raise ValueError(
                f"--io-threads {self.io_threads} and --io-depth {self.io_depth}: with --io-engine threads one thread "
                "drives one object: give one of the two"
            )
        return self

    @model_validator(mode="after")
    def _eviction_makes_room(self) -> "StorageSpec":
        if self.evict_to > self.evict_above:
            raise ValueError(f"--evict-to {self.evict_to:g}: is above --evict-above {self.evict_above:g}")
        return self
