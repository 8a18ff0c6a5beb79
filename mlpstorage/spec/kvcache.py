"""Every parameter of the KV-cache benchmark: its flag, default, range and meaning.

The fields stand in four parts, each a model over the one before: `spec.compute`, `spec.workload`, `spec.storage`, and
here where it runs and where its results go.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from mlpstorage.config import EXEC_TYPE, CacheScope, Decisions, Layout
from mlpstorage.errors import UsageError
from mlpstorage.spec.fields import Option, number_text
from mlpstorage.spec.hosts import Host, parse_hosts
from mlpstorage.spec.profiles import values_beside
from mlpstorage.spec.storage import StorageSpec, levels_text
from mlpstorage.spec.workload import TIERS, mix_text

DISTRIBUTED = "Distributed execution"
OUTPUT = "Output"

_UNSHARED: Mapping[Layout, str] = {
    Layout.SLAB: "keeps its index in the memory of one process",
    Layout.BUCKET: "keeps its index in the memory of one process",
    Layout.NULL: "stores nothing that another rank could find",
}
"""Why ranks cannot share a layout."""

DEFAULT_RESULTS_DIR = Path("mlpstorage-results")


class KVCacheSpec(StorageSpec):
    """What a KV-cache run (or its size estimate) is asked to do. None stands for a value that is worked out."""

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
    cache_scope: Annotated[
        CacheScope,
        Field(
            description="whose blocks a rank finds on storage; private: its own; shared: those of all ranks, in one "
            "directory of a file system that all hosts share, or one prefix of a bucket (layouts file and object)"
        ),
        Option(flags=("--cache-scope",), group=TIERS),
    ] = CacheScope.PRIVATE
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
    timeseries_interval: Annotated[
        float,
        Field(
            ge=0.1,
            le=3600,
            description="seconds between two lines of the time series of ranks and hosts, 0.1 to 3600",
        ),
        Option(flags=("--timeseries-interval",), group=OUTPUT, metavar="SECONDS"),
    ] = 1.0
    label: Annotated[
        dict[str, str],
        Field(description="note kept with the result; may be repeated"),
        Option(flags=("--label",), group=OUTPUT, metavar="KEY=VALUE", nargs="+", repeat=True, rank=False),
    ] = Field(default_factory=dict)

    @property
    def parsed_hosts(self) -> tuple[Host, ...]:
        """The hosts, ranges and lists expanded."""
        return parse_hosts(self.hosts)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.num_processes or sum(host.slots or 1 for host in self.parsed_hosts)

    @property
    def shares_cache(self) -> bool:
        """Whether all ranks use one cache on storage."""
        return self.cache_scope is CacheScope.SHARED

    @model_validator(mode="after")
    def _scope_fits(self) -> "KVCacheSpec":
        if not self.shares_cache:
            return self
        why = _UNSHARED.get(self.store_layout)
        if why is not None:
            raise ValueError(f"--cache-scope shared: layout {self.store_layout} {why}; use --layout file or object")
        if self.decisions is Decisions.ARRIVAL and self.ranks > 1:
            raise ValueError(
                "--decisions arrival: with --cache-scope shared needs one rank: what a rank finds hangs on when others "
                "have written it"
            )
        return self

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

    @classmethod
    def profile_values(cls, given: Mapping[str, Any]) -> Mapping[str, object]:
        """See `Spec.profile_values`."""
        return values_beside(given.get("profile"), given)

    def parameters(self) -> dict[str, Any]:
        """Every value as JSON has it."""
        return self.model_dump(mode="json")


def rank_arguments(spec: KVCacheSpec) -> list[str]:
    """The flags with which a rank's own command line gives back the parts of `spec` that concern it."""
    return [word for name, option in spec.options().items() if option.rank for word in flag_words(spec, name)]


def flag_words(spec: KVCacheSpec, name: str) -> list[str]:
    """The words of a command line that give a field its value; none for what can only be left out."""
    option, value = spec.options()[name], getattr(spec, name)
    flag = option.flags[0]
    named_by_file = name == "model" and spec.model_config_file is not None
    if value is None or value is False or named_by_file:
        return []
    if value is True:
        return [flag]
    if name == "mpi_params":
        # With `=`, because a value may begin with a dash.
        return [f"{flag}={item}" for group in value for item in group]
    if isinstance(value, dict) and option.nargs:
        return [flag, *(f"{key}={text}" for key, text in value.items())] if value else []
    if option.nargs:
        return [flag, *map(str, value)]
    return [flag, value_text(value)]


def value_text(value: object) -> str:
    """A field's value as one would write it on a command line."""
    match value:
        case float():
            return number_text(value)
        case tuple():
            return levels_text(value)
        case dict():
            return mix_text(value)
        case _:
            return str(value)
