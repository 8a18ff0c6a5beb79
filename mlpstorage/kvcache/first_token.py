"""The first token of an answer: what its time went to, and what it would have been without a cache."""

from dataclasses import dataclass


@dataclass(slots=True)
class TtftTally:
    """Running sums over first tokens; the fields are those of `results.models.TtftCounts`."""

    requests: int = 0
    within_target: int = 0
    client_late_ns: int = 0
    lookup_ns: int = 0
    storage_load_ns: int = 0
    dram_load_ns: int = 0
    prefill_queue_ns: int = 0
    prefill_ns: int = 0
    storage_loads: int = 0
    storage_load_tokens: int = 0
    storage_loads_ns: int = 0
    storage_recompute_ns: int | None = 0
    storage_slower_loads: int | None = 0

    def add(self, token: "FirstToken", target_ns: int) -> None:
        """Count a first token."""
        self.requests += 1
        self.within_target += token.ttft_ns <= target_ns
        self.client_late_ns += token.client_late_ns
        self.lookup_ns += token.lookup_ns
        self.storage_load_ns += token.storage_load_ns
        self.dram_load_ns += token.dram_load_ns
        self.prefill_queue_ns += token.prefill_queue_ns
        self.prefill_ns += token.prefill_ns
        if not token.storage_load_tokens:
            return
        self.storage_loads += 1
        self.storage_load_tokens += token.storage_load_tokens
        self.storage_loads_ns += token.storage_load_ns
        recompute_ns = token.storage_recompute_ns
        if recompute_ns is None or self.storage_recompute_ns is None or self.storage_slower_loads is None:
            self.storage_recompute_ns = self.storage_slower_loads = None
            return
        self.storage_recompute_ns += recompute_ns
        self.storage_slower_loads += token.storage_load_ns > recompute_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """The first token of an answer, what its time went to, and what it would have been without a cache.

    The parts of the time follow each other and add up to TTFT.

    Attributes:
        at_ns: When it came.
        client_late_ns: From the intended arrival until the request was begun: the client's own delay.
        lookup_ns: The look-up.
        storage_load_ns: Until what storage had was read.
        dram_load_ns: From then, or from the look-up, until what DRAM had was copied.
        copies_ns: From the look-up until what DRAM had was copied; 0 where it had nothing.
        prefill_queue_ns: Until the accelerators were free for it.
        prefill_ns: Until what was not cached was computed.
        storage_load_tokens: Tokens that were read and used.
        storage_recompute_ns: What computing these, too, would have taken in full; None where that is not modelled.
        prompt_prefill_ns: What computing the whole prompt would have taken in full; None likewise.
        needed_prefill_ns: What computing the part that was not cached takes in full; None likewise.
        waits_in_full: Whether the modelled time is waited for in full.
    """

    at_ns: int
    client_late_ns: int
    lookup_ns: int
    storage_load_ns: int
    dram_load_ns: int
    copies_ns: int
    prefill_queue_ns: int
    prefill_ns: int
    storage_load_tokens: int
    storage_recompute_ns: int | None
    prompt_prefill_ns: int | None
    needed_prefill_ns: int | None
    waits_in_full: bool

    @property
    def load_ns(self) -> int:
        """The whole load."""
        return self.storage_load_ns + self.dram_load_ns

    @property
    def ttft_ns(self) -> int:
        """Time to first token, from the intended arrival."""
        waited_ns = self.client_late_ns + self.lookup_ns + self.prefill_queue_ns
        return waited_ns + self.load_ns + self.prefill_ns

    @property
    def saved_ns(self) -> int | None:
        """What all tiers together saved the request: full compute times less the load; None where not modelled."""
        if self.prompt_prefill_ns is None or self.needed_prefill_ns is None:
            return None
        return self.prompt_prefill_ns - self.needed_prefill_ns - self.load_ns

    @property
    def without_cache_ns(self) -> int | None:
        """TTFT of the request had all of its prompt been computed after the same waits; None where not waited for."""
        if self.prompt_prefill_ns is None or not self.waits_in_full:
            return None
        return self.ttft_ns - self.load_ns - self.prefill_ns + self.prompt_prefill_ns

    @property
    def without_storage_ns(self) -> int | None:
        """The same, had what was read from storage been computed; the other tiers as they were."""
        if self.storage_recompute_ns is None or not self.waits_in_full:
            return None
        return self.ttft_ns - self.load_ns + self.copies_ns + self.storage_recompute_ns
