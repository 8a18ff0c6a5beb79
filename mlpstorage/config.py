"""Names and constants that the whole suite shares. Imports nothing heavy: `mlpstorage --help` pays for it."""

import enum

from mlpstorage.models import MODELS

GIB = 1 << 30
MIB = 1 << 20
PAGE_BYTES = 4096
"""Alignment of direct I/O, and the unit in which stored data is stamped and verified."""

HOST_SERIES = "timeseries_hosts.jsonl"
"""File of the hosts' time series in a result directory."""

KVCACHE_MODELS: tuple[str, ...] = tuple(MODELS)
"""Models that the KV-cache benchmark can play."""

WORKLOADS: tuple[str, ...] = ("chat", "coding-agent", "document-qa", "rag", "batch")
"""Profiles of synthetic users, by name; `mlpstorage.kvcache.synthetic.PROFILES` has their shapes."""


class BENCHMARK_TYPES(enum.StrEnum):  # noqa: N801 - the name is part of the published interface
    """Benchmarks of the suite; the value names the first directory below the results directory."""

    training = "training"
    checkpointing = "checkpointing"
    kv_cache = "kv_cache"


class EXEC_TYPE(enum.StrEnum):  # noqa: N801 - the name is part of the published interface
    """How ranks are started."""

    MPI = "mpi"


class EXIT_CODE(enum.IntEnum):  # noqa: N801 - the name is part of the published interface
    """What the process tells its caller."""

    SUCCESS = 0
    FAILURE = 1
    USAGE = 2
    FILE_NOT_FOUND = 3
    PERMISSION = 4
    CONFIGURATION = 5
    RUN = 6
    TIMEOUT = 7
    INTERRUPTED = 130


class GenerationMode(enum.StrEnum):
    """How much of the modelled compute and think time is really waited for."""

    NONE = "none"
    FAST = "fast"
    REALISTIC = "realistic"


class Arrivals(enum.StrEnum):
    """When requests arrive."""

    OPEN = "open"
    CLOSED = "closed"
    SESSION = "session"


class Placement(enum.StrEnum):
    """Which rank serves a request."""

    SESSION = "session"
    ROUND_ROBIN = "round-robin"
    PREFIX = "prefix"


class CacheScope(enum.StrEnum):
    """Whose blocks a rank finds on storage."""

    PRIVATE = "private"
    SHARED = "shared"


class Decisions(enum.StrEnum):
    """When it is decided what a request finds, stores and evicts."""

    ARRIVAL = "arrival"
    COMPLETION = "completion"


class Promotion(enum.StrEnum):
    """Whether what was found on storage also goes to DRAM."""

    ALWAYS = "always"
    NEVER = "never"


class Accelerator(enum.StrEnum):
    """What computes in the model; its peaks stand in `plan.compute`."""

    A100 = "a100"
    H100 = "h100"
    H200 = "h200"
    B200 = "b200"
    MI355X = "mi355x"
    NONE = "none"


class PerformanceProfile(enum.StrEnum):
    """Which targets the verdict uses."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


class RunStatus(enum.StrEnum):
    """State of a run, as its metadata tells it."""

    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Tier(enum.StrEnum):
    """Where a block of KV cache can be found, fastest first."""

    GPU = "gpu"
    CPU = "cpu"
    STORAGE = "storage"


class TouchOrder(enum.StrEnum):
    """In which order the blocks of a request become recent."""

    HEAD = "head"
    TAIL = "tail"


class TraceFormat(enum.StrEnum):
    """How a request trace is written."""

    MOONCAKE = "mooncake"
    AGENTIC = "agentic"
    BAILIAN = "bailian"
    BURSTGPT = "burstgpt"
    AZURE = "azure"


class Layout(enum.StrEnum):
    """How objects lie on storage."""

    FILE = "file"
    SLAB = "slab"
    BUCKET = "bucket"
    OBJECT = "object"
    NULL = "null"


class IoEngineName(enum.StrEnum):
    """What moves the bytes."""

    THREADS = "threads"
    URING = "uring"


class IoPriority(enum.StrEnum):
    """Which operation an I/O thread takes next."""

    SPLIT = "split"
    STRICT = "strict"


class DirectMode(enum.StrEnum):
    """Whether files are opened for direct I/O."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class WriteSync(enum.StrEnum):
    """When writes are forced to stable storage."""

    NONE = "none"
    FILE = "file"
    BATCH = "batch"


class Verify(enum.StrEnum):
    """What of an object that was read is checked."""

    OFF = "off"
    STAMP = "stamp"
    FULL = "full"


class StorePolicy(enum.StrEnum):
    """From which use on a block is stored."""

    ALWAYS = "always"
    SECOND_USE = "second-use"


class Eviction(enum.StrEnum):
    """What happens where the storage tier is full."""

    LRU = "lru"
    NONE = "none"


class WriteOverflow(enum.StrEnum):
    """What happens to new blocks where the write queue is full."""

    BLOCK = "block"
    DROP = "drop"
