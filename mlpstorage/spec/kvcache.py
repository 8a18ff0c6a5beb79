"""Every parameter of the KV-cache benchmark: its flag, default, range and meaning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mlpstorage.config import EXEC_TYPE, KVCACHE_MODELS, GenerationMode, PerformanceProfile, TouchOrder
from mlpstorage.errors import UsageError
from mlpstorage.models import MODELS, ModelShape
from mlpstorage.spec.fields import Option, Spec
from mlpstorage.spec.hosts import Host, parse_hosts

BOTH = ("run", "datasize")

WORKLOAD = "Workload"
TIME = "Time"
TIERS = "Tiers"
COMPUTE = "Compute model and targets"
STORAGE = "Storage I/O"
DISTRIBUTED = "Distributed execution"
OUTPUT = "Output"

DEFAULT_RESULTS_DIR = Path("mlpstorage-results")


class KVCacheSpec(Spec):
    """What a KV-cache run (or its size estimate) is asked to do. None stands for a value that is worked out."""

    model: Annotated[
        str,
        Field(description="model whose KV cache is played"),
        Option(flags=("--model", "-m"), group=WORKLOAD, commands=BOTH),
    ] = "llama3.1-8b"
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
        Field(ge=1, le=1 << 20, description="tokens of one stored object; a trace with larger blocks keeps its own"),
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
        Path | None,
        Field(description="directory for the cache files, on the storage to be measured"),
        Option(flags=("--cache-dir",), group=TIERS, metavar="DIR", default_text="below the result directory"),
    ] = None
    touch: Annotated[
        TouchOrder,
        Field(description="in which order a request's blocks become recent"),
        Option(flags=("--touch",), group=TIERS),
    ] = TouchOrder.TAIL

    generation_mode: Annotated[
        GenerationMode,
        Field(
            description="none: no compute and no think time; fast: a tenth of the modelled times; "
            "realistic: the modelled times"
        ),
        Option(flags=("--generation-mode",), group=COMPUTE),
    ] = GenerationMode.REALISTIC
    prefill_tokens_per_s: Annotated[
        float,
        Field(gt=0, description="prompt tokens that the modelled accelerators compute a second, for one request"),
        Option(flags=("--prefill-tokens-per-s",), group=COMPUTE, metavar="N", commands=BOTH),
    ] = 20_000.0
    decode_tokens_per_s: Annotated[
        float,
        Field(gt=0, description="output tokens that they generate a second, for one request"),
        Option(flags=("--decode-tokens-per-s",), group=COMPUTE, metavar="N"),
    ] = 50.0
    performance_profile: Annotated[
        PerformanceProfile,
        Field(description="targets of the verdict: TTFT p95 of 450 ms (latency) or 2,000 ms (throughput)"),
        Option(flags=("--performance-profile",), group=COMPUTE),
    ] = PerformanceProfile.LATENCY
    fail_on_slo: Annotated[
        bool,
        Field(
            description="end with exit code 1 where the target was missed, or too few requests were answered to tell"
        ),
        Option(flags=("--fail-on-slo",), group=COMPUTE, rank=False),
    ] = False

    io_threads: Annotated[
        int,
        Field(ge=1, le=1024, description="threads of each rank that do I/O; half prefer reads, half writes"),
        Option(flags=("--io-threads",), group=STORAGE, metavar="N"),
    ] = 8

    hosts: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="hosts to run on: `a b`, `a,b`, `h[1-4]`, `h1:4` (slots), IPv6"),
        Option(flags=("--hosts", "-s"), group=DISTRIBUTED, metavar="HOST", nargs="+", rank=False),
    ] = ("127.0.0.1",)
    exec_type: Annotated[
        EXEC_TYPE,
        Field(description="how ranks are started on other hosts, or where there are several"),
        Option(flags=("--exec-type", "-et"), group=DISTRIBUTED, rank=False),
    ] = EXEC_TYPE.MPI
    num_processes: Annotated[
        int | None,
        Field(ge=1, description="ranks"),
        Option(
            flags=("--num-processes", "-np"),
            group=DISTRIBUTED,
            metavar="N",
            default_text="number of hosts",
            rank=False,
        ),
    ] = None
    mpi_bin: Annotated[
        str,
        Field(min_length=1, description="MPI launcher: mpirun, mpiexec or a path"),
        Option(flags=("--mpi-bin",), group=DISTRIBUTED, metavar="PROGRAM", rank=False),
    ] = "mpirun"
    oversubscribe: Annotated[
        bool,
        Field(description="allow more ranks than slots"),
        Option(flags=("--oversubscribe",), group=DISTRIBUTED, rank=False),
    ] = False
    allow_run_as_root: Annotated[
        bool,
        Field(description="let MPI run as root"),
        Option(flags=("--allow-run-as-root",), group=DISTRIBUTED, rank=False),
    ] = False
    mpi_params: Annotated[
        tuple[tuple[str, ...], ...],
        Field(description="further launcher parameters; a value that begins with `-` needs `=`"),
        Option(flags=("--mpi-params",), group=DISTRIBUTED, metavar="PARAM", nargs="+", repeat=True, rank=False),
    ] = ()
    kvcache_bin_path: Annotated[
        Path | None,
        Field(description="another worker program to start in the place of the built-in one"),
        Option(
            flags=("--kvcache-bin-path",),
            group=DISTRIBUTED,
            metavar="PROGRAM",
            default_text="the built-in one",
            rank=False,
        ),
    ] = None

    results_dir: Annotated[
        Path,
        Field(description="where results are kept"),
        Option(flags=("--results-dir", "-rd"), group=OUTPUT, metavar="DIR", rank=False),
    ] = DEFAULT_RESULTS_DIR
    label: Annotated[
        dict[str, str],
        Field(description="note kept with the result; may be repeated"),
        Option(flags=("--label",), group=OUTPUT, metavar="KEY=VALUE", nargs="+", repeat=True, rank=False),
    ] = Field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return MODELS[self.model]

    @property
    def parsed_hosts(self) -> tuple[Host, ...]:
        """The hosts, ranges and lists expanded."""
        return parse_hosts(self.hosts)

    @property
    def ttft_p95_ms_target(self) -> float:
        """Target of the verdict: MLPerf Inference's TTFT limits for Llama 2 70B, interactive and server scenario."""
        return {PerformanceProfile.LATENCY: 450.0, PerformanceProfile.THROUGHPUT: 2000.0}[self.performance_profile]

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_value(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("takes a value, not true or false")
        return value

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        if value not in MODELS:
            raise ValueError(f"must be one of {', '.join(KVCACHE_MODELS)}")
        return value

    @field_validator("hosts", mode="before")
    @classmethod
    def _one_host_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("hosts")
    @classmethod
    def _hosts_parse(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse_hosts(value)
        except UsageError as error:
            # The names may have come from a file: who explains the error knows, and puts the flag in front.
            raise ValueError(str(error).removeprefix("--hosts ")) from None
        return value

    @field_validator("mpi_params", mode="before")
    @classmethod
    def _params_are_nested(cls, value: object) -> object:
        """Accept one string, a flat list, or argparse's list of lists."""
        if isinstance(value, str):
            return ((value,),)
        if isinstance(value, Sequence) and any(isinstance(item, str) for item in value):
            return (tuple(value),)
        return value

    @field_validator("label", mode="before")
    @classmethod
    def _labels_are_pairs(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, Sequence):
            return value
        flat = [item for part in value for item in ([part] if isinstance(part, str) else part)]
        pairs: dict[str, str] = {}
        for item in flat:
            key, separator, text = item.partition("=")
            if not separator or not key:
                raise ValueError(f"must be KEY=VALUE (got {item!r})")
            pairs[key] = text
        return pairs

    @model_validator(mode="after")
    def _options_fit_together(self) -> "KVCacheSpec":
        if self.trace is None:
            wrong = [name for name in ("max_requests",) if getattr(self, name) is not None]
            if self.time_scale != 1.0:
                wrong.append("time_scale")
            if wrong:
                raise ValueError(f"--{wrong[0].replace('_', '-')}: needs --trace")
        elif self.disable_multi_turn:
            raise ValueError("--disable-multi-turn: is for synthetic users; a trace brings its own sessions")
        return self

    def parameters(self) -> dict[str, Any]:
        """Every value as JSON has it."""
        return self.model_dump(mode="json")


def rank_arguments(spec: KVCacheSpec) -> list[str]:
    """The flags with which a rank's own command line gives back the parts of `spec` that concern it."""
    words: list[str] = []
    for name, option in spec.options().items():
        value = getattr(spec, name)
        if not option.rank or value is None or value is False:
            continue
        words.append(option.flags[0])
        if value is not True:
            words.append(_word(value))
    return words


def _word(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return repr(value) if isinstance(value, float) else str(value)
