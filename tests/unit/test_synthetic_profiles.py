"""Profiles keep to their stated targets, and the switches show in the hit ratios of a cache without limit."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean, median, stdev

import pytest

from mlpstorage.config import WORKLOADS
from mlpstorage.kvcache.request import Request
from mlpstorage.kvcache.synthetic import PROFILES, Mix, user_requests
from mlpstorage.kvcache.synthetic.profile import TARGET_SEED, TARGET_USERS, Range

DOCS = Path(__file__).parents[2] / "docs" / "workloads.md"
AGENTIC = Path(__file__).parents[3] / "shared" / "traces" / "agentic"


@dataclass
class Trie:
    """A cache without limit, told in prefixes: each block is found below the one before it, or nowhere."""

    below: dict[int, "Trie"] = field(default_factory=dict)

    def found_and_kept(self, block_ids: tuple[int, ...]) -> int:
        """How many leading blocks are there; afterwards all are."""
        node, found, missed = self, 0, False
        for block_id in block_ids:
            missed = missed or block_id not in node.below
            found += not missed
            node = node.below.setdefault(block_id, Trie())
        return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a cache without limit makes of requests."""

    requests: list[Request]
    cached_tokens: list[int]
    stored_tokens: int

    @property
    def new_tokens(self) -> list[int]:
        """Tokens of each prompt that were not found."""
        return [
            request.prompt_tokens - cached for request, cached in zip(self.requests, self.cached_tokens, strict=True)
        ]

    @property
    def hit_ratio_tokens(self) -> float:
        """Tokens found, of all."""
        return sum(self.cached_tokens) / sum(request.prompt_tokens for request in self.requests)

    @property
    def reads_per_write(self) -> float:
        """Tokens found, for each one that is stored."""
        return sum(self.cached_tokens) / self.stored_tokens


def sessions_of(
    mix: Mix, sessions: int, block_tokens: int, *, seed: int = TARGET_SEED, multi_turn: bool = True
) -> Iterator[Request]:
    """The first sessions of all users that targets are of."""
    for user in range(TARGET_USERS):
        stream = user_requests(mix, seed, user, block_tokens, multi_turn=multi_turn)
        yield from takewhile(lambda request: request.session < sessions, stream)


def find(requests: Iterator[Request], block_tokens: int) -> Found:
    """Play requests against a cache without limit."""
    cache = Trie()
    played: list[Request] = []
    cached: list[int] = []
    stored = 0
    for request in requests:
        blocks = cache.found_and_kept(request.block_ids)
        played.append(request)
        cached.append(blocks * block_tokens)
        stored += (len(request.block_ids) - blocks) * block_tokens
    return Found(requests=played, cached_tokens=cached, stored_tokens=stored)


def numbers_of(found: Found, sessions: int) -> dict[str, float]:
    """The numbers that a profile has targets for, by the targets' names."""
    return {
        "turns_mean": len(found.requests) / sessions,
        "prompt_tokens_median": median(request.prompt_tokens for request in found.requests),
        "output_tokens_mean": fmean(request.output_tokens for request in found.requests),
        "cached_tokens_median": median(found.cached_tokens),
        "new_tokens_median": median(found.new_tokens),
        "hit_ratio_tokens": found.hit_ratio_tokens,
        "reads_per_write": found.reads_per_write,
    }


def test_the_names_in_config_are_those_of_the_profiles() -> None:
    """The command line knows the names without importing the profiles."""
    assert tuple(PROFILES) == WORKLOADS
    assert all(name == profile.name for name, profile in PROFILES.items())


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_profile_keeps_to_its_targets_and_its_documented_numbers(name: str) -> None:
    """Every number lies within the stated range, and docs/workloads.md shows the range and the number."""
    targets = PROFILES[name].targets
    mix = Mix(weights={name: 1.0})
    found = find(sessions_of(mix, targets.sessions, targets.block_tokens), targets.block_tokens)
    assert len(found.requests) >= 1_000
    numbers = numbers_of(found, TARGET_USERS * targets.sessions)
    page = DOCS.read_text(encoding="utf-8").partition(f"\n## `{name}`")[2].partition("\n## ")[0]
    for key, number in numbers.items():
        least, most = getattr(targets, key)
        assert least <= number <= most, key
        assert f"| `{key}` | {shown((least, most))} | {number:,.{digits(most)}f} |" in page
    assert targets.source.partition(";")[0].partition(":")[0] in " ".join(page.split())


def shown(limits: Range) -> str:
    """A range as the page shows it."""
    return " to ".join(f"{limit:,.{digits(limits[1])}f}" for limit in limits)


def digits(size: float) -> int:
    """Decimals that a number of this size is shown with."""
    return 3 if size < 1.0 else 1 if size < 100.0 else 0


@pytest.mark.skipif(not AGENTIC.is_dir(), reason="the traces are not beside the project")
def test_the_agent_is_what_the_ten_conversations_show() -> None:
    """The statistics that the profile's comments and docs/workloads.md tell, counted from the conversations."""
    shared: list[tuple[int, int]] = []
    openings: list[int] = []
    messages: list[int] = []
    pauses: dict[bool, list[float]] = {True: [], False: []}
    for path in sorted(AGENTIC.glob("*.json")):
        conversation = json.loads(path.read_text(encoding="utf-8"))
        shared.append((conversation["tool_tokens"], conversation["system_tokens"]))
        openings.append(conversation["requests"][0]["in"])
        nested = [entry["requests"] for entry in conversation["requests"] if "requests" in entry]
        for requests in ([entry for entry in conversation["requests"] if "requests" not in entry], *nested):
            for last, this in pairwise(requests):
                messages.append(this["in"] - last["in"] - last["out"])
                if "think_time" in this:
                    pauses["tool_result" in this["input_types"]].append(this["think_time"])
    assert len(shared) == 10
    assert [median(column) for column in zip(*shared, strict=True)] == [12_482, 2_969]
    assert median(openings) == 32_151
    assert median(messages) == pytest.approx(240, abs=2)
    assert max(messages) == 57_816
    assert fmean(messages) == pytest.approx(3_580, abs=1)
    assert stdev(math.log(tokens) for tokens in messages if tokens > 0) == pytest.approx(2.1, abs=0.05)
    assert {tool: (len(found), median(found)) for tool, found in pauses.items()} == {True: (89, 9), False: (15, 182)}
    assert [fmean(pauses[tool]) for tool in (True, False)] == pytest.approx([18, 435.3], abs=0.1)


def test_the_two_poles_are_far_apart() -> None:
    """An agent reads at least four times as many bytes for each one written as people who chat do."""
    ratio = {
        name: find(sessions_of(Mix(weights={name: 1.0}), 5, 64, seed=7), 64).reads_per_write
        for name in ("chat", "coding-agent")
    }
    assert ratio["coding-agent"] > 4 * ratio["chat"] > 0


@pytest.mark.parametrize("name", ["chat", "coding-agent", "document-qa"])
def test_without_multi_turn_nothing_but_the_system_prompt_is_found(name: str) -> None:
    """Of what is a session's own, a third or more is found with turns, and nothing without: the switch shows."""
    mix = Mix(weights={name: 1.0})
    block_tokens = PROFILES[name].targets.block_tokens
    with_turns = find(sessions_of(mix, 3, block_tokens), block_tokens)
    without = find(sessions_of(mix, 50, block_tokens, multi_turn=False), block_tokens)
    assert len(without.requests) == 1_000
    shared = PROFILES[name].system_prompt_tokens // block_tokens * block_tokens
    assert without.cached_tokens == [0] + [shared] * 999
    own = sum(with_turns.cached_tokens) - shared * (len(with_turns.requests) - 1)
    assert own > 0.33 * sum(request.prompt_tokens - shared for request in with_turns.requests)


@pytest.mark.parametrize(("name", "ratio"), [("chat", 0.86), ("coding-agent", 0.40), ("document-qa", 0.04)])
def test_hit_ratios_without_multi_turn(name: str, ratio: float) -> None:
    """What docs/workloads.md says of the switch, for 50 sessions of each user."""
    block_tokens = PROFILES[name].targets.block_tokens
    mix = Mix(weights={name: 1.0})
    found = find(sessions_of(mix, 50, block_tokens, multi_turn=False), block_tokens)
    assert found.hit_ratio_tokens == pytest.approx(ratio, abs=0.005)
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert f"{100 * ratio:.0f} % for `{name}`" in page


def test_more_documents_are_found_less_often() -> None:
    """The same 2,000 questions over 10, 100 and 1,000 documents: each larger corpus has a lower hit ratio."""
    ratios = [
        find(sessions_of(Mix(weights={"rag": 1.0}, rag_num_docs=documents), 100, 256), 256).hit_ratio_tokens
        for documents in (10, 100, 1_000)
    ]
    assert ratios[0] > ratios[1] + 0.1 > ratios[2] + 0.2
    assert ratios[2] > 0.1


def test_a_profile_without_room_for_one_turn_is_refused() -> None:
    """Such a user would never send a request: documents and opening count too."""
    with pytest.raises(ValueError, match="a first turn of 9216 tokens exceeds max_context_tokens 8192"):
        replace(PROFILES["chat"], max_context_tokens=8_192)
    with pytest.raises(ValueError, match="a first turn of 103584 tokens exceeds max_context_tokens 100000"):
        replace(PROFILES["document-qa"], max_context_tokens=100_000)
    with pytest.raises(ValueError, match="a first turn of 19968 tokens exceeds max_context_tokens 19967"):
        replace(PROFILES["rag"], max_context_tokens=19_967)


def test_a_profile_with_less_than_a_turn_is_refused() -> None:
    """Every session has at least one request."""
    with pytest.raises(ValueError, match=r"mean_turns 0\.5 is less than the one request"):
        replace(PROFILES["chat"], mean_turns=0.5)
