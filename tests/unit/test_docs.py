"""The documentation names what exists, all of it where it promises so, and nothing else."""

import argparse
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from mlpstorage.cli.parser import PROGRAMS, build_parser
from mlpstorage.cluster.facts import host_facts
from mlpstorage.config import EXIT_CODE, HOST_SERIES
from mlpstorage.results.models import (
    LATENCIES,
    SCHEMA_VERSION,
    HostSample,
    RankResult,
    Sample,
)
from mlpstorage.results.summary import (
    Summary,
)
from mlpstorage.spec.kvcache import KVCacheSpec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md")))
NUMBERS = (DOCS / "numbers.md").read_text(encoding="utf-8")

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_IN_CODE = re.compile(r"`([^`\n]+)`")


def nested_models(annotation: object) -> Iterator[type[BaseModel]]:
    """The models inside a type such as `dict[str, Latency]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from nested_models(part)


def field_names(model: type[BaseModel]) -> set[str]:
    """Names of a model's fields and of those of all models inside it."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        for inner in nested_models(field.annotation):
            names |= field_names(inner)
    return names


def sections(text: str) -> dict[str, str]:
    """Each second-level heading of a page with what stands below it."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def in_code(text: str) -> set[str]:
    """What stands between backticks."""
    return set(_IN_CODE.findall(text))


def section_of(name: str) -> str:
    """The section of docs/numbers.md whose heading names `name`."""
    return next(body for heading, body in sections(NUMBERS).items() if name in in_code(heading))


def table_keys(text: str) -> set[str]:
    """The names in code in the first cells of all table rows."""
    return {name for row in re.findall(r"^\|([^|]+)\|", text, flags=re.MULTILINE) for name in in_code(row)}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """All option strings of a parser and its subcommands."""
    flags: set[str] = set()
    for action in parser._actions:
        flags.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for chosen in action.choices.values():
                flags |= flags_of(chosen)
    return flags


def commands_of(page: Path) -> list[str]:
    """The `mlpstorage` commands in a page's code blocks that one could type, without synopses in brackets."""
    lines = re.findall(r"^ {4}(mlpstorage .+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [line for line in lines if "[--" not in line]


def test_every_top_level_key_of_the_summary_is_defined() -> None:
    """Each key of summary.json stands in the table of top-level keys."""
    assert table_keys(sections(NUMBERS)["Top level"]) == set(Summary.model_fields)


@pytest.mark.parametrize(
    "name", [name for name, field in Summary.model_fields.items() if any(nested_models(field.annotation))]
)
def test_every_number_of_the_summary_is_defined_in_its_section(name: str) -> None:
    """Each key below a top-level key has a row in a table of the section that names the top-level key."""
    models = list(nested_models(Summary.model_fields[name].annotation))
    wanted = set().union(*map(field_names, models))
    section = section_of(name)
    described = table_keys(section) | ({"tokens", "blocks"} & in_code(section))
    if "(#histograms)" in section:
        described |= table_keys(section_of("latency").partition("### Histograms")[2])
    assert wanted - described == set()


def test_every_latency_is_defined() -> None:
    """Each latency that ranks record has a row that says when it begins and ends."""
    assert set(LATENCIES) <= table_keys(section_of("latency"))


def test_every_key_of_the_time_series_is_defined() -> None:
    """The section of timeseries.jsonl has a row for each key of a line, and no other."""
    assert table_keys(section_of("timeseries.jsonl")) == set(Sample.model_fields)


def test_every_key_of_the_hosts_time_series_is_defined() -> None:
    """The section of timeseries_hosts.jsonl has a row for each key of a line and of its parts, and no other."""
    assert table_keys(section_of(HOST_SERIES)) == field_names(HostSample)


def test_every_key_of_a_rank_file_is_named() -> None:
    """A rank file has the rank's result without its samples and its host's, which are in the time series."""
    series = {"samples", "host_samples"}
    wanted = field_names(RankResult) - set(Sample.model_fields) - series
    assert wanted - in_code(NUMBERS) == set()
    written = set(RankResult.model_fields) - series
    assert written <= table_keys(section_of("ranks/rank_N.json"))


def test_no_number_is_defined_that_does_not_exist() -> None:
    """Every key that a table of docs/numbers.md defines is one of the models'."""
    known = field_names(Summary) | field_names(RankResult) | set(LATENCIES)
    keys = table_keys(NUMBERS)
    assert len(keys) > 80
    assert keys - known == set()


def test_every_fact_of_a_host_is_defined() -> None:
    """The page of the metadata has a row for each fact that is gathered of a host."""
    facts = sections((DOCS / "metadata.md").read_text(encoding="utf-8"))["The hosts"]
    assert set(host_facts(DOCS)) - table_keys(facts) == set()


def test_the_documented_schema_version_is_the_current_one() -> None:
    """Pages and change log name the schema version that the program writes."""
    assert f"schema version {SCHEMA_VERSION}" in NUMBERS
    assert f"schema version: **{SCHEMA_VERSION}**" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_exit_code_is_documented() -> None:
    """The table of exit codes has a row for each, and no other."""
    table = sections((DOCS / "metadata.md").read_text(encoding="utf-8"))["Exit codes"]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)} == set(map(int, EXIT_CODE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page: Path) -> None:
    """A page names no flag that no command takes."""
    existing = set().union(*(flags_of(build_parser([program])) for program in PROGRAMS))
    assert set(KVCacheSpec.options()["num_users"].flags) <= existing
    assert set(_FLAG.findall(page.read_text(encoding="utf-8"))) - existing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_can_be_typed(page: Path) -> None:
    """The command line of each example is understood as it stands."""
    for command in commands_of(page):
        words = shlex.split(command)[1:]
        build_parser(words).parse_args(words)


def test_the_readme_shows_commands() -> None:
    """The check of examples has examples to check."""
    assert len(commands_of(ROOT / "README.md")) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_resolves(page: Path) -> None:
    """A link that is no web address leads to a file of the repository."""
    targets = [
        target for target in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target and target[0] != "#"
    ]
    assert [target for target in targets if not (page.parent / target.partition("#")[0]).is_file()] == []


def test_the_readme_links_to_every_page() -> None:
    """Each page of the documentation can be reached from the README."""
    links = _LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= set(links)
