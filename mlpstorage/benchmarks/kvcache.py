"""The KV-cache benchmark as scripts and the command line use it."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mlpstorage.benchmarks.base import Benchmark, print_json, words_of
from mlpstorage.benchmarks.job import Job, judge
from mlpstorage.cluster.facts import (
    FileSystemSpace,
    available_memory_bytes,
    cluster_information,
    difference_warnings,
    host_facts,
    limited_space,
)
from mlpstorage.cluster.locality import is_local
from mlpstorage.config import BENCHMARK_TYPES, EXIT_CODE, HOST_SERIES, Layout
from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError, MLPStorageError, UsageError
from mlpstorage.kvcache.played import build_workload, with_settled_load
from mlpstorage.launch.command import (
    handed_environment,
    hosts_without,
    rank_command,
    rank_environment,
    ranks_on_host,
    shown,
)
from mlpstorage.launch.mpi import (
    DEFAULT_DIALECT,
    Dialect,
    check_names,
    check_root,
    dialect_of,
    find_mpi,
    told_version,
    unknown_launcher,
    version_line,
)
from mlpstorage.launch.process import JobOutcome, run_job
from mlpstorage.plan.datasize import data_sizes
from mlpstorage.plan.kvcache import (
    cache_place,
    check_room,
    layout,
    sizes,
    warmup_s,
    with_automatic_sizes,
    with_settled_io,
)
from mlpstorage.report.progress import progress_view
from mlpstorage.results.directory import (
    CACHE_DIR,
    LOGS_DIR,
    RANKS_DIR,
    TRIALS_DIR,
    write_json_atomic,
    write_jsonl_atomic,
    write_text_atomic,
)
from mlpstorage.results.merge import merge_ranks
from mlpstorage.results.models import IncompleteRank, RankResult
from mlpstorage.results.summary import (
    Summary,
    Trials,
)
from mlpstorage.results.trials import compared, pooled
from mlpstorage.spec.fields import Resolved, Source, resolve
from mlpstorage.spec.kvcache import KVCacheSpec, flag_words
from mlpstorage.storage.cache_dir import clear_leftovers, leftover_bytes
from mlpstorage.storage.claim import Removed
from mlpstorage.storage.location import S3Location

UNBUILT = ("enable_autoscaling", "closed")
"""Switches that a script's namespace may hold and that have nothing behind them yet: refused where they are set."""

WRITERS = 16
"""Rank files that are written at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """How the invocation wants to be told."""

    json: bool
    quiet: bool
    verbose: bool


class KVCacheBenchmark(Benchmark):
    """Plays the KV-cache load of an LLM inference fleet on real storage. See `Benchmark` for the arguments."""

    benchmark_type = BENCHMARK_TYPES.kv_cache

    def _settle(self, args: Namespace) -> None:
        given = vars(args)
        for name in UNBUILT:
            if given.get(name):
                raise UsageError(f"--{name.replace('_', '-')}: this version does not have it")
        config_file = given.get("config_file")
        resolved = resolve(KVCacheSpec, args, config_file=None if config_file is None else Path(config_file))
        self._sources: dict[str, Source] = dict(resolved.sources)
        given_spec = _absolute(resolved)
        self._layout = layout(given_spec, is_local)
        self._spec = with_settled_io(given_spec)
        if self.command == "run":
            self._spec = with_settled_load(self._spec, self._layout.ranks)
        self._sources.update(dict.fromkeys(_changed(given_spec, self._spec), "auto"))
        self._shell = Shell(
            json=bool(given.get("json")), quiet=bool(given.get("quiet")), verbose=bool(given.get("verbose"))
        )
        self._words = words_of(args)
        self._summary: Summary | None = None
        self._mpi: str | None = None
        self._hosts_known = False
        found = self._find_dialect() if self.command == "run" and self._layout.uses_mpi else None
        self._dialect, self._dialect_is_known = found or DEFAULT_DIALECT, found is not None

    def _find_dialect(self) -> Dialect | None:
        """Whose words the launcher understands; None where it is not there or says nothing known.

        A launcher that tells its version contacts nobody.
        """
        try:
            told = told_version(find_mpi(self._spec.mpi_bin))
        except MissingFileError:
            return None
        self._mpi = None if told is None else version_line(told)
        return None if told is None else dialect_of(told)

    @property
    def model(self) -> str:
        """Name of the model."""
        return self._spec.model

    @property
    def results_dir(self) -> Path:
        """Where results are kept."""
        return self._spec.results_dir

    @property
    def num_processes(self) -> int | None:
        """Ranks, where they were given."""
        return self._spec.num_processes

    @property
    def cache_dir(self) -> Path | S3Location:
        """Where the objects of the cache go."""
        if self._spec.cache_dir is not None:
            return self._spec.cache_dir
        if self._result_dir is None:
            return self.results_dir.absolute()
        return self._result_dir.absolute() / CACHE_DIR

    @property
    def _cache_path(self) -> Path | None:
        """Where the cache files go; None where the layout has no files."""
        where = self.cache_dir
        return where if isinstance(where, Path) and self._spec.store_layout is not Layout.NULL else None

    @property
    def summary(self) -> Summary | None:
        """The numbers, once there are some."""
        return self._summary

    def _build_kvcache_command(self, run_id: str | None = None) -> str:
        """The command that runs the ranks, as one would type it."""
        return shown(self._command(run_id))

    def _command(self, run_id: str | None) -> list[str]:
        warmup = self._spec.warmup
        spec = self._spec.model_copy(
            update={"cache_dir": self.cache_dir, "warmup": warmup_s(self._spec) if warmup is None else warmup}
        )
        handed = handed_environment(spec.mpi_bin, self._dialect) if self._layout.uses_mpi else None
        return rank_command(spec, self._layout, run_id=run_id, dialect=self._dialect, handed=handed)

    def _arguments(self) -> list[str]:
        if self._words is not None:
            return list(self._words)
        words = ["kvcache", self.command]
        for name, option in self._spec.options().items():
            if self._sources[name] == "flag" and self.command in option.commands:
                words += flag_words(self._spec, name)
        return words

    def _own_metadata(self) -> dict[str, object]:
        spec = self._spec
        document: dict[str, object] = {
            "kvcache_model": spec.model,
            "num_users": spec.num_users,
            "duration": spec.duration,
            "gpu_mem_gb": spec.gpu_mem_gb,
            "cpu_mem_gb": spec.cpu_mem_gb,
            "storage_gb": spec.storage_gb,
            "cache_dir": str(self.cache_dir),
            "generation_mode": spec.generation_mode.value,
            "performance_profile": spec.performance_profile.value,
            "num_processes": spec.num_processes,
            "ranks": self._layout.ranks,
            "parameters": spec.parameters() | {"cache_dir": str(self.cache_dir)},
            "parameter_sources": dict(self._sources),
            "labels": dict(spec.label),
            "kvcache_metrics": None if self._summary is None else _metrics(self._summary),
        }
        if self._summary is not None:
            from mlpstorage.report.terminal import headline  # noqa: PLC0415 - imports rich

            document["headline"] = headline(self._summary)
        if self._layout.uses_mpi or self._sources["hosts"] != "default":
            document["hosts"] = [host.name for host in spec.parsed_hosts]
        if self._layout.uses_mpi or self._sources["exec_type"] != "default":
            document["exec_type"] = spec.exec_type.value
        return document

    def _collect_cluster_information(self) -> dict[str, object] | None:
        """Facts of this machine where all ranks run here; those of other hosts come from their ranks."""
        if self._cluster_collector is not None:
            return self._cluster_collector()
        return cluster_information([host_facts(self._cache_path)]) if self._layout.ranks_here else None

    def _mpi_version(self) -> str | None:
        return self._mpi

    def _check(self) -> None:
        if self._layout.uses_mpi:
            launcher = find_mpi(self._spec.mpi_bin)
            if not self._dialect_is_known:
                raise unknown_launcher(launcher, self._mpi)
            check_root(self._dialect, allowed=self._spec.allow_run_as_root, environment=os.environ)
            check_names(self._dialect, self._spec.parsed_hosts)
            self._command(self.run_id)
        if self._spec.kvcache_bin_path is not None and not os.access(self._spec.kvcache_bin_path, os.X_OK):
            raise MissingFileError(f"--kvcache-bin-path: {self._spec.kvcache_bin_path} is no program that can be run")
        if self._spec.trace is not None:
            build_workload(self._spec, 0, self._layout.ranks)
        if self._layout.ranks_here:
            if self._cache_path is not None:
                _check_cache_dir(self._cache_path)
            self._fit_to_this_machine()

    def _fit_to_this_machine(self) -> None:
        """Work out the sizes that were left to the program, and refuse what does not fit."""
        space, memory_bytes = self._space(), available_memory_bytes()
        resolved = with_automatic_sizes(
            self._spec,
            memory_free_bytes=memory_bytes,
            space=space,
            ranks_on_host=self._layout.ranks_here,
            ranks_on_storage=self._layout.ranks if self._spec.shares_cache else None,
        )
        self._sources.update(dict.fromkeys(_changed(self._spec, resolved), "auto"))
        self._spec = resolved
        check_room(
            resolved,
            sizes(resolved),
            memory_free_bytes=memory_bytes,
            storage_free_bytes=None if space is None else space.free_bytes,
            ranks_on_host=self._layout.ranks_here,
            ranks_on_storage=self._layout.ranks if self._spec.shares_cache else None,
            where=str(self.cache_dir),
        )

    def _space(self) -> FileSystemSpace | None:
        """Room for the cache files, with what a dead run's take now and what is to be reused; None where unknown."""
        if self._cache_path is None:
            return None
        space = limited_space(self._cache_path)
        if space is None:
            return None
        ranks = range(self._layout.ranks_here)
        places = dict.fromkeys(cache_place(self._spec, self._cache_path, rank) for rank in ranks)
        ours_bytes = sum(leftover_bytes(place, reuse=self._spec.reuse_cache) for place in places)
        return replace(space, free_bytes=space.free_bytes + ours_bytes)

    def _perform(self) -> None:
        trials: list[tuple[RankResult, ...]] = []
        summaries: list[Summary] = []
        while len(trials) < self._spec.trials:
            place = self._trial_place(len(trials))
            outcome, job = self._run_ranks(place)
            summary = None
            ranks, incomplete = job.ranks or job.kept(outcome), job.incomplete(self._layout.ranks)
            if ranks:
                trials.append(ranks)
                summary = self._merged(ranks, incomplete)
                summaries.append(summary)
                if place != self.result_dir:
                    write_results(place, summary, ranks)
            if summaries:
                self._conclude(summaries, trials, incomplete)
            judge(outcome, job, summary)

    def _trial_place(self, number: int) -> Path:
        """Where the results of one trial go: a directory of its own where there are several."""
        if self._spec.trials == 1:
            return self.result_dir
        place = self.result_dir / TRIALS_DIR / f"trial_{number + 1}"
        for directory in (place / RANKS_DIR, place / LOGS_DIR):
            directory.mkdir(parents=True)
        self.logger.info("trial %d of %d", number + 1, self._spec.trials)
        return place

    def _merged(
        self, ranks: Sequence[RankResult], incomplete: Sequence[IncompleteRank], trials: Trials | None = None
    ) -> Summary:
        return merge_ranks(
            ranks,
            bytes_per_token=self._spec.bytes_per_token,
            block_tokens=sizes(self._spec).block_tokens,
            ttft_p95_ms_target=self._spec.ttft_p95_ms_target,
            timeseries_interval_s=self._spec.timeseries_interval,
            trials=trials,
            incomplete_ranks=incomplete,
        )

    def _conclude(
        self,
        summaries: Sequence[Summary],
        trials: Sequence[Sequence[RankResult]],
        incomplete: Sequence[IncompleteRank],
    ) -> None:
        """Write what all trials so far come to."""
        ranks = pooled(trials)
        differ = compared(summaries) if self._spec.trials > 1 else None
        self._summary = self._merged(ranks, incomplete, differ)
        write_results(self.result_dir, self._summary, ranks)

    def _run_ranks(self, place: Path) -> tuple[JobOutcome, Job]:
        """Run the ranks once, and clear away what they left in the cache directory."""
        job = Job(
            progress_view(
                planned_s=warmup_s(self._spec) + self._spec.duration, quiet=self._shell.quiet or self._shell.json
            ),
            place,
            self.logger,
            on_hosts=self._know_hosts,
            ranks_on_host=self._bounded_ranks_on_host(),
            hosts=[host.name for host in self._spec.parsed_hosts],
            hosts_without=lambda package: hosts_without(package, self._spec, self._layout, self._dialect),
        )
        try:
            self.logger.info("results go to %s", self.result_dir)
            self.logger.info("starting %s", self._build_kvcache_command(self.run_id))
            outcome = run_job(
                self._command(self.run_id),
                environment=rank_environment(),
                stderr_path=place / LOGS_DIR / "ranks.stderr.log",
                on_line=job.line,
                must_end=job.must_end,
            )
        finally:
            job.close()
        if job.refusal is None:
            self._clear_leftovers()
        self._remove_own_cache_dir()
        return outcome, job

    def _bounded_ranks_on_host(self) -> int | None:
        """The most ranks of a host, where a launcher starts ours; another program tells nothing while it runs."""
        if not self._layout.uses_mpi or self._spec.kvcache_bin_path is not None:
            return None
        return ranks_on_host(self._spec, self._layout)

    def _know_hosts(self, hosts: Sequence[dict[str, object]]) -> None:
        """Keep what the ranks tell of their hosts before they begin. Trials after the first tell nothing new."""
        if self._cluster_collector is not None or self._hosts_known:
            return
        self._hosts_known = True
        for warning in difference_warnings(hosts):
            self.logger.warning("%s", warning)
        self.cluster_information = cluster_information(hosts)
        self._write_metadata()

    def _clear_leftovers(self) -> None:
        """Remove what a rank that was killed had no time to remove, where it ran on this machine, or all share it."""
        if self._spec.store_layout is Layout.NULL:
            return
        shared = self._spec.shares_cache
        ranks = self._layout.ranks_here
        if shared:
            # Also where its ranks ran elsewhere, but for a bucket, whose keys may be known there alone.
            ranks = int(bool(ranks) or isinstance(self.cache_dir, Path))
        for rank in range(ranks):
            place = cache_place(self._spec, self.cache_dir, rank)
            try:
                cleared = _clear(place, self.run_id)
            except MLPStorageError as error:
                self.logger.warning("cache files of this run are left in %s: %s", place, error)
                continue
            if cleared is None:
                self.logger.warning("cache files of this run are left in %s, a process still holds it", place)
            elif cleared.files:
                self.logger.warning(
                    "removed %d cache files that %s had left in %s",
                    cleared.files,
                    "ranks" if shared else f"rank {rank}",
                    place,
                )

    def _remove_own_cache_dir(self) -> None:
        """Remove the cache directory below the result directory, which the ranks have left empty."""
        where = self._cache_path
        if self._spec.cache_dir is not None or self._spec.keep_cache or not self._layout.ranks_here:
            return
        if where is not None and where.is_dir():
            try:
                where.rmdir()
            except OSError:
                self.logger.warning("%s is not empty and stays", where)

    def _verdict(self) -> EXIT_CODE:
        assert self._summary is not None, "a complete run has numbers"
        return EXIT_CODE.FAILURE if self._spec.fail_on_slo and not self._summary.slo.met else EXIT_CODE.SUCCESS

    def _show_result(self) -> None:
        if self._shell.json:
            print_json({"metadata": self.metadata, "summary": _plain(self._summary)})
        elif self._summary is not None and not self._shell.quiet:
            from mlpstorage.report.terminal import console_for, summary_table  # noqa: PLC0415 - imports rich

            console = console_for()
            console.print(summary_table(self._summary, metadata=self.metadata))
            console.print(
                f"\nResults: {self.result_dir}\nNext:    mlpstorage history show {self.run_id}", soft_wrap=True
            )

    def _show_plan(self) -> int:
        refusal = self._refusal()
        command = self._command(None)
        planned = sizes(self._spec)
        if self._shell.json:
            print_json({"metadata": self.metadata, "command": command, "ranks": self._layout.ranks, "refusal": refusal})
            return EXIT_CODE.SUCCESS
        from mlpstorage.report.plan import plan_text  # noqa: PLC0415 - not needed by a run

        sys.stdout.write(
            plan_text(
                self._spec,
                self._sources,
                planned,
                self._layout,
                result_dir=self.result_dir,
                cache_dir=self.cache_dir,
                command=shown(command),
                refusal=refusal,
            )
        )
        return EXIT_CODE.SUCCESS

    def _refusal(self) -> str | None:
        """Why the planned run would not start on this machine; None where it would, or where it runs elsewhere."""
        try:
            if self._layout.ranks_here:
                self._fit_to_this_machine()
        except ConfigurationError as error:
            return str(error)
        return None

    def _estimate(self) -> int:
        if self.command != "datasize":
            raise UsageError(f"command {self.command!r}: the benchmark has run and datasize")
        estimate = data_sizes(self._spec)
        if self._shell.json:
            print_json(estimate.as_dict())
        else:
            from mlpstorage.report.plan import data_sizes_text  # noqa: PLC0415 - not needed by a run

            sys.stdout.write(data_sizes_text(estimate))
        return EXIT_CODE.SUCCESS


def write_results(place: Path, summary: Summary, ranks: Sequence[RankResult]) -> None:
    """Write the summary, the time series of all ranks in order of time, and a file for each rank."""
    write_json_atomic(place / "summary.json", summary)
    samples = sorted((sample for rank in ranks for sample in rank.samples), key=lambda one: (one.t_s, one.rank))
    write_jsonl_atomic(place / "timeseries.jsonl", samples)
    of_hosts = (sample for rank in ranks for sample in rank.host_samples)
    host_samples = sorted(of_hosts, key=lambda one: (one.t_s, one.host))
    write_jsonl_atomic(place / HOST_SERIES, host_samples)

    def write(rank: RankResult) -> None:
        text = rank.model_dump_json(indent=2, exclude={"samples", "host_samples"})
        write_text_atomic(place / RANKS_DIR / f"rank_{rank.rank}.json", text + "\n")

    # Each file is synced; side by side the file system does that for many at once.
    with ThreadPoolExecutor(WRITERS) as writers:
        for _ in writers.map(write, ranks):
            pass


def _clear(place: Path | S3Location, run_id: str) -> Removed | None:
    if isinstance(place, Path):
        return clear_leftovers(place, run_id)
    from mlpstorage.storage.object_claim import clear_prefix  # noqa: PLC0415 - obstore is an optional package

    return clear_prefix(place, run_id)


def _absolute(resolved: Resolved[KVCacheSpec]) -> KVCacheSpec:
    """The spec with its paths absolute: ranks may run elsewhere, and a rerun starts elsewhere."""
    spec = resolved.spec
    return spec.model_copy(
        update={
            name: path.absolute()
            for name in ("model_config_file", "trace", "cache_dir", "kvcache_bin_path", "results_dir")
            if isinstance(path := getattr(spec, name), Path)
        }
    )


def _changed(before: KVCacheSpec, after: KVCacheSpec) -> list[str]:
    return [name for name in KVCacheSpec.model_fields if getattr(before, name) != getattr(after, name)]


def _metrics(summary: Summary) -> dict[str, object]:
    """The numbers that one compares first."""
    return {
        "requests_completed": summary.requests.completed,
        "requests_per_s": summary.requests.rate_per_s,
        "hit_ratio_tokens": summary.hit_ratio.tokens.total,
        "read_gib_per_s": summary.storage.read_gib_per_s,
        "write_gib_per_s": summary.storage.write_gib_per_s,
        "ttft_p50_ms": summary.latency["ttft"].p50_ms,
        "ttft_p95_ms": summary.latency["ttft"].p95_ms,
        "request_load_p95_ms": summary.latency["request_load"].p95_ms,
        "storage_read_p95_ms": summary.latency["storage_read"].p95_ms,
        "slo_met": summary.slo.met,
        "client_bottleneck": summary.client.bottleneck,
    }


def _plain(summary: Summary | None) -> object:
    return None if summary is None else summary.model_dump(mode="json")


def _check_cache_dir(cache_dir: Path) -> None:
    """Refuse a cache directory that cannot be used, before anything is created."""
    nearest = cache_dir
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise AccessError(f"--cache-dir: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise AccessError(f"--cache-dir: no permission to write in {nearest}; choose another directory")
