"""What is played, for how long and in which tiers: the second part of the spec."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, field_validator, model_validator

from mlpstorage.config import WORKLOADS, Arrivals, Placement, TouchOrder, TraceFormat
from mlpstorage.spec.compute import BOTH, WORKLOAD, ComputeSpec
from mlpstorage.spec.fields import Option, number_text
from mlpstorage.storage.location import S3Location, parse_location

CHAT_ONLY: Mapping[str, float] = MappingProxyType({"chat": 1.0})
RAG_ONLY: Mapping[str, float] = MappingProxyType({"rag": 1.0})

TIME = "Time"
TIERS = "Tiers"


DEFAULT_BLOCK_TOKENS = 256

STEADY: Final = "steady"
"""The warm-up that goes on until the hit ratio has settled."""

STEADY_WARMUP_MOST_S = 600.0
"""A warm-up that should go on until the hit ratio has settled ends after this long all the same."""


def parse_mix(value: object) -> object:
    """Weights by profile from `chat` or `chat=3,rag=1`; all but text as it is.

    Raises:
        ValueError: A part is no NAME or NAME=WEIGHT, or a name stands twice.
    """
    if not isinstance(value, str):
        return value
    mix: dict[str, float] = {}
    for part in value.split(","):
        name, separator, weight = part.strip().partition("=")
        if name in mix:
            raise ValueError(f"names {name} twice")
        try:
            mix[name] = float(weight) if separator else 1.0
        except ValueError:
            raise ValueError(f"must be NAME or NAME=WEIGHT, several with commas (got {part!r})") from None
    return mix


def mix_text(mix: Mapping[str, float]) -> str:
    """What `parse_mix` reads."""
    return ",".join(f"{name}={number_text(weight)}" for name, weight in mix.items())


def parse_warmup(value: object) -> object:
    """Seconds from text, but for the word `steady`.

    Raises:
        ValueError: The text is neither.
    """
    if not isinstance(value, str) or value == STEADY:
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"must be a number of seconds, or {STEADY}") from None


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
    workload: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        BeforeValidator(parse_mix),
        Field(
            min_length=1,
            description="synthetic users: a profile, or several with the weights of their sessions, `chat=3,rag=1`; "
            f"profiles: {', '.join(WORKLOADS)}",
        ),
        Option(flags=("--workload",), group=WORKLOAD, metavar="NAME[=WEIGHT],...", default_text="chat"),
    ] = Field(default_factory=lambda: dict(CHAT_ONLY))
    enable_rag: Annotated[
        bool,
        Field(description="synthetic users ask about retrieved documents: the same as --workload rag"),
        Option(flags=("--enable-rag",), group=WORKLOAD),
    ] = False
    rag_num_docs: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="documents that are retrieved from, the same for all users and ranks"),
        Option(flags=("--rag-num-docs",), group=WORKLOAD, metavar="N"),
    ] = 10
    trace: Annotated[
        Path | None,
        Field(description="play this request trace, a file or a directory, in the place of synthetic users"),
        Option(flags=("--trace",), group=WORKLOAD, metavar="FILE"),
    ] = None
    trace_format: Annotated[
        TraceFormat | None,
        Field(description="format of the trace"),
        Option(flags=("--trace-format",), group=WORKLOAD, default_text="found by its content"),
    ] = None
    max_requests: Annotated[
        int | None,
        Field(ge=1, description="play the trace's first N requests only"),
        Option(flags=("--max-requests",), group=WORKLOAD, metavar="N", default_text="all"),
    ] = None
    block_tokens: Annotated[
        int | None,
        Field(ge=1, le=1 << 20, description="tokens of one block; of a trace with block ids a multiple of its own"),
        Option(
            flags=("--block-tokens",),
            group=WORKLOAD,
            metavar="N",
            commands=BOTH,
            default_text=f"the trace's own, else {DEFAULT_BLOCK_TOKENS}",
        ),
    ] = None
    placement: Annotated[
        Placement,
        Field(
            description="which rank serves a request; session: all of a session the same; round-robin: one after the "
            "other (of sessions that wait for their answers, session after session); prefix: that of the prompt's "
            "beginning, so that equal ones meet"
        ),
        Option(flags=("--placement",), group=WORKLOAD),
    ] = Placement.SESSION
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

    arrivals: Annotated[
        Arrivals | None,
        Field(
            description="when requests arrive; open: at their own times, however long answers take; closed: "
            "--num-users users each wait for the answer; session: a session's next request comes a pause after the "
            "answer to the last"
        ),
        Option(
            flags=("--arrivals",),
            group=TIME,
            default_text="closed; of a trace session where it tells pauses, else open",
        ),
    ] = None
    request_rate: Annotated[
        float | None,
        Field(
            gt=0, description="requests a second of all ranks together, at random times (Poisson); needs an open loop"
        ),
        Option(flags=("--request-rate",), group=TIME, metavar="R", default_text="the trace's times"),
    ] = None
    time_scale: Annotated[
        float,
        Field(gt=0, description="multiply the trace's times: 0.1 plays it ten times as fast"),
        Option(flags=("--time-scale",), group=TIME, metavar="X"),
    ] = 1.0
    spread_arrivals: Annotated[
        float,
        Field(
            ge=0,
            description="delay each request of a trace by a random time below this, in the trace's seconds: undoes the "
            "rounding of its timestamps",
        ),
        Option(flags=("--spread-arrivals",), group=TIME, metavar="SECONDS"),
    ] = 0.0
    duration: Annotated[
        float,
        Field(gt=0, description="seconds of the measured window"),
        Option(flags=("--duration", "-d"), group=TIME, metavar="SECONDS"),
    ] = 60
    warmup: Annotated[
        # The word first: argparse is to hand on what it gets.
        Literal["steady"] | Annotated[float, Field(ge=0)] | None,
        BeforeValidator(parse_warmup),
        Field(
            description="seconds before the measured window; steady: until the hit ratio has settled, at most "
            f"{STEADY_WARMUP_MOST_S:g} s (one rank)",
        ),
        Option(
            flags=("--warmup",),
            group=TIME,
            metavar="SECONDS|steady",
            default_text="auto: a fifth of the duration, at most 60",
        ),
    ] = None
    trials: Annotated[
        int,
        Field(
            ge=1, le=1000, description="run so often, each time from an empty cache, and say how much the runs differ"
        ),
        Option(flags=("--trials",), group=TIME, metavar="N", rank=False),
    ] = 1

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

    @property
    def mix(self) -> Mapping[str, float]:
        """Weights of the synthetic users' profiles."""
        return RAG_ONLY if self.enable_rag else self.workload

    @field_validator("workload")
    @classmethod
    def _known_profiles(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in WORKLOADS:
                raise ValueError(f"there is no profile {name!r}; must be of {', '.join(WORKLOADS)}")
        return value

    @model_validator(mode="after")
    def _rag_is_one_profile(self) -> "WorkloadSpec":
        if self.enable_rag and self.workload not in (CHAT_ONLY, RAG_ONLY):
            raise ValueError("--enable-rag: is --workload rag; of a mix give rag a weight in --workload")
        return self

    @model_validator(mode="after")
    def _traces_bring_their_sessions(self) -> "WorkloadSpec":
        if self.trace is None:
            for name in ("trace_format", "max_requests", "time_scale", "spread_arrivals"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"--{name.replace('_', '-')}: needs --trace")
        elif self.disable_multi_turn:
            raise ValueError("--disable-multi-turn: is for synthetic users; a trace brings its own sessions")
        elif self.enable_rag or self.workload != CHAT_ONLY:
            flag = "--enable-rag" if self.enable_rag else "--workload"
            raise ValueError(f"{flag}: is for synthetic users; a trace brings its own requests")
        return self

    @model_validator(mode="after")
    def _requests_can_be_placed(self) -> "WorkloadSpec":
        if self.trace is not None or self.placement is Placement.SESSION:
            return self
        if self.placement is Placement.PREFIX:
            raise ValueError(
                "--placement prefix: needs --trace; synthetic users begin with the few system prompts of their profile"
            )
        if self.request_rate is None:
            raise ValueError(
                f"--placement {self.placement}: synthetic users in a closed loop stay with their rank; "
                "needs --trace or --request-rate"
            )
        return self

    @model_validator(mode="after")
    def _arrivals_can_be_had(self) -> "WorkloadSpec":
        if self.trace is None and self.arrivals is Arrivals.SESSION:
            raise ValueError("--arrivals session: needs --trace; synthetic users pause in a closed loop")
        if self.trace is None and self.arrivals is Arrivals.OPEN and self.request_rate is None:
            raise ValueError("--arrivals open: synthetic users need --request-rate")
        if self.request_rate is None:
            return self
        if self.arrivals not in {None, Arrivals.OPEN}:
            raise ValueError(f"--request-rate: is for an open loop, not for --arrivals {self.arrivals}")
        for name in ("time_scale", "spread_arrivals"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"--{name.replace('_', '-')}: changes the trace's times, which --request-rate replaces"
                )
        return self
