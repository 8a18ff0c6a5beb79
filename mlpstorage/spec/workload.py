"""What is played, for how long and in which tiers: the second part of the spec."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, model_validator

from mlpstorage.config import TouchOrder
from mlpstorage.spec.compute import BOTH, WORKLOAD, ComputeSpec
from mlpstorage.spec.fields import Option
from mlpstorage.storage.location import S3Location, parse_location

TIME = "Time"
TIERS = "Tiers"


def _location(value: object) -> object:
    if isinstance(value, Path) and str(value).startswith("s3:/"):
        raise ValueError("a Path cannot hold s3://bucket/prefix: give it as text")
    return parse_location(value) if isinstance(value, str) else value


class WorkloadSpec(ComputeSpec):
    """What is played, without where it is kept. None stands for a value that is worked out."""

    num_users: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="concurrent users of each rank (synthetic sessions, closed loop)"),
        Option(flags=("--num-users", "-nu"), group=WORKLOAD, metavar="N", commands=BOTH),
    ] = 100
    trace: Annotated[
        Path | None,
        Field(description="play this Mooncake trace (jsonl) by its timestamps, in the place of synthetic users"),
        Option(flags=("--trace",), group=WORKLOAD, metavar="FILE"),
    ] = None
    time_scale: Annotated[
        float,
        Field(gt=0, description="multiply the trace's timestamps: 0.1 plays it ten times as fast"),
        Option(flags=("--time-scale",), group=WORKLOAD, metavar="X"),
    ] = 1.0
    max_requests: Annotated[
        int | None,
        Field(ge=1, description="play the trace's first N requests only"),
        Option(flags=("--max-requests",), group=WORKLOAD, metavar="N", default_text="all"),
    ] = None
    block_tokens: Annotated[
        int,
        Field(ge=1, le=1 << 20, description="tokens of one block; a trace with larger blocks keeps its own"),
        Option(flags=("--block-tokens",), group=WORKLOAD, metavar="N", commands=BOTH),
    ] = 256
    disable_multi_turn: Annotated[
        bool,
        Field(description="every request of a synthetic user begins a new session"),
        Option(flags=("--disable-multi-turn",), group=WORKLOAD),
    ] = False
    disable_prefix_caching: Annotated[
        bool,
        Field(description="look nothing up: every prompt is computed whole, its new blocks are still stored"),
        Option(flags=("--disable-prefix-caching",), group=WORKLOAD),
    ] = False
    seed: Annotated[
        int,
        Field(ge=0, lt=1 << 63, description="seed of rank 0; rank r uses seed + r"),
        Option(flags=("--seed",), group=WORKLOAD, metavar="N"),
    ] = 42

    duration: Annotated[
        float,
        Field(gt=0, description="seconds of the measured window"),
        Option(flags=("--duration", "-d"), group=TIME, metavar="SECONDS"),
    ] = 60
    warmup: Annotated[
        float | None,
        Field(ge=0, description="seconds before the measured window"),
        Option(
            flags=("--warmup",),
            group=TIME,
            metavar="SECONDS",
            default_text="auto: a fifth of the duration, at most 60",
        ),
    ] = None

    gpu_mem_gb: Annotated[
        float,
        Field(ge=0, description="GPU tier of each rank, GiB; capacity only, nothing moves"),
        Option(flags=("--gpu-mem-gb",), group=TIERS, metavar="GIB", commands=BOTH),
    ] = 16.0
    cpu_mem_gb: Annotated[
        float | None,
        Field(ge=0, description="DRAM tier of each rank, GiB; real memory"),
        Option(
            flags=("--cpu-mem-gb",),
            group=TIERS,
            metavar="GIB",
            commands=BOTH,
            default_text="auto: 32 or half of the memory that is free for the rank, whichever is less",
        ),
    ] = None
    storage_gb: Annotated[
        float | None,
        Field(gt=0, description="limit of the storage tier of each rank, GiB"),
        Option(
            flags=("--storage-gb",),
            group=TIERS,
            metavar="GIB",
            commands=BOTH,
            default_text="auto: leaves a fifth of the file system free",
        ),
    ] = None
    cache_dir: Annotated[
        Path | InstanceOf[S3Location] | None,
        BeforeValidator(_location),
        PlainSerializer(str, when_used="json-unless-none"),
        Field(description="where the cache goes, on the storage to be measured: a directory, or s3://bucket/prefix"),
        Option(flags=("--cache-dir",), group=TIERS, metavar="DIR", default_text="below the result directory"),
    ] = None
    touch: Annotated[
        TouchOrder,
        Field(description="in which order a request's blocks become recent"),
        Option(flags=("--touch",), group=TIERS),
    ] = TouchOrder.TAIL

    @model_validator(mode="after")
    def _traces_bring_their_sessions(self) -> "WorkloadSpec":
        if self.trace is None:
            wrong = [name for name in ("max_requests",) if getattr(self, name) is not None]
            if self.time_scale != 1.0:
                wrong.append("time_scale")
            if wrong:
                raise ValueError(f"--{wrong[0].replace('_', '-')}: needs --trace")
        elif self.disable_multi_turn:
            raise ValueError("--disable-multi-turn: is for synthetic users; a trace brings its own sessions")
        return self
