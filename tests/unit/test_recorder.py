"""What a rank counts: cases worked by hand, at the edges of the window."""

import errno
from dataclasses import replace

import pytest

from mlpstorage.config import Tier
from mlpstorage.kvcache.first_token import FirstToken, TtftTally
from mlpstorage.kvcache.recorder import Answered, Recorder, RequestTally, StorageTally, TierTally, counts
from mlpstorage.results.models import LATENCIES, RequestCounts, StorageCounts, TtftCounts
from mlpstorage.storage.ops import Op, OpDone, OperationSkippedError, OpKind
from mlpstorage.storage.payload import VerifyError


def recorder() -> Recorder:
    """Objects of 1,000 bytes, padded to 4,096, in a window from 100 ns to 200 ns."""
    return Recorder(object_bytes=1000, stored_bytes=4096, ttft_target_ns=50, window_ns=(100, 200))


def done(
    kind: OpKind,
    end_ns: int = 150,
    *,
    direct: bool | None = None,
    verified: int = 0,
    error: Exception | None = None,
    page_cache_bytes: int | None = 0,
    retries: int = 0,
) -> OpDone:
    """An operation that waited 5 ns and took 20 ns, and whose payload took 3 ns."""
    op, queued_ns, start_ns = Op(kind, 1), end_ns - 25, end_ns - 20
    return OpDone(op, queued_ns, start_ns, end_ns, direct, verified, error, 3, page_cache_bytes, retries)


def token(at_ns: int) -> FirstToken:
    """A first token 9 ns after its request should have come: 1 late, 1 to look up, 2 + 1 to load, 1 to wait, 3.

    Of ten tokens in ten nanoseconds one was read from storage, four came from elsewhere.
    """
    return FirstToken(
        at_ns=at_ns,
        client_late_ns=1,
        lookup_ns=1,
        storage_load_ns=2,
        dram_load_ns=1,
        copies_ns=3,
        prefill_queue_ns=1,
        prefill_ns=3,
        storage_load_tokens=1,
        storage_recompute_ns=1,
        prompt_prefill_ns=10,
        needed_prefill_ns=5,
        waits_in_full=True,
    )


def answered(done_ns: int) -> Answered:
    """A request of ten tokens in five blocks, of which three were found."""
    return Answered(
        done_ns=done_ns,
        prompt_tokens=10,
        output_tokens=4,
        prompt_blocks=5,
        cached_tokens={Tier.GPU: 2, Tier.CPU: 3, Tier.STORAGE: 1},
        hit_blocks={Tier.GPU: 1, Tier.CPU: 1, Tier.STORAGE: 1},
        load_skipped=False,
        load_abandoned=False,
    )


# Without storage 1 ns of computing is added, as the copies end last all the same; without a cache 3 + 3 would be 10.
TAKEN_NS = {
    "ttft": 9,
    "ttft_without_storage": 10,
    "ttft_without_cache": 13,
    "client_late": 1,
    "prefill_queue": 1,
    "storage_load": 2,
    "lookup": 4,
    "write_behind": 50,
    "storage_read": 20,
    "queue_wait": 5,
}


@pytest.mark.parametrize(("at_ns", "inside"), [(99, False), (100, True), (199, True), (200, False)])
def test_the_window_holds_its_first_moment_and_not_its_end(at_ns: int, inside: bool) -> None:
    """Completion decides, for operations, requests and latencies alike; the totals take all."""
    it = recorder()
    it.operations([done(OpKind.READ, at_ns)])
    it.answered(answered(at_ns))
    it.first_token(token(at_ns))
    it.failed(at_ns)
    it.dropped(at_ns, 2)
    it.deduplicated(at_ns, 3)
    it.deferred(at_ns, 4)
    it.took("lookup", at_ns - 4, at_ns)
    it.took("write_behind", at_ns - 50, at_ns)
    assert it.inside(at_ns) is inside
    expected = int(inside)
    assert (it.window.read_ops, it.total.read_ops) == (expected, 1)
    assert (it.requests.completed, it.total_requests.completed) == (expected, 1)
    assert (it.requests.failed, it.total_requests.failed) == (expected, 1)
    assert (it.window.writes_dropped, it.total.writes_dropped) == (2 * expected, 2)
    assert (it.window.dedup_skipped_bytes, it.total.dedup_skipped_bytes) == (3000 * expected, 3000)
    assert (it.window.writes_deferred, it.total.writes_deferred) == (4 * expected, 4)
    assert it.payload_ns == 3 * expected
    assert (it.first_tokens.requests, it.first_tokens.prefill_ns) == (expected, 3 * expected)
    assert (it.saved.gains.count, it.saved.gains.sum_ns, it.saved.losses.count) == (expected, 2 * expected, 0)
    for name, value_ns in TAKEN_NS.items():
        assert (it.latency[name].count, it.latency[name].sum_ns) == (expected, value_ns * expected)


def test_operations_by_kind() -> None:
    """Bytes are payload; padding is counted apart for what was read and written; a delete moves no bytes."""
    it = recorder()
    it.operations([done(OpKind.READ, direct=True, verified=1000), done(OpKind.READ, direct=False, verified=1000)])
    it.operations([done(OpKind.WRITE, direct=True), done(OpKind.DELETE)])
    assert it.window == it.total
    assert it.window == StorageTally(
        read_bytes=2000,
        written_bytes=1000,
        padding_bytes=3 * 3096,
        deleted_bytes=1000,
        read_ops=2,
        write_ops=1,
        delete_ops=1,
        direct_files=2,
        buffered_files=1,
        verified_bytes=2000,
    )
    assert {name: it.latency[name].count for name in ("storage_read", "storage_write", "storage_delete")} == {
        "storage_read": 2,
        "storage_write": 1,
        "storage_delete": 1,
    }


def test_what_came_together_counts_by_its_own_kind_and_moment() -> None:
    """Of one batch with several kinds, some of it outside the window and some failed, each operation counts for it."""
    it = recorder()
    it.operations(
        [
            done(OpKind.WRITE, 150),
            done(OpKind.SYNC, 160),
            done(OpKind.WRITE, 250),
            done(OpKind.WRITE, 170, error=OSError(28, "full")),
            done(OpKind.SYNC, 180, error=OperationSkippedError("the one before it failed")),
            done(OpKind.COPY_IN, 190),
        ]
    )
    assert (it.window.write_ops, it.window.sync_ops, it.window.io_errors) == (1, 1, 1)
    assert (it.total.write_ops, it.total.sync_ops, it.total.io_errors) == (2, 1, 1)
    counted = {name: histogram.count for name, histogram in it.latency.items() if histogram.count}
    assert counted == {"queue_wait": 4, "storage_write": 1, "storage_sync": 1}
    assert it.payload_ns == 4 * 3


def test_latencies_of_one_kind_count_where_they_end() -> None:
    """Each is inside by its own end."""
    it = recorder()
    it.took_each("write_behind", [(90, 99), (95, 100), (120, 199), (150, 200)])
    assert (it.latency["write_behind"].count, it.latency["write_behind"].sum_ns) == (2, 5 + 79)


def test_a_sync_moves_no_bytes_and_has_a_latency_of_its_own() -> None:
    """It waits for what a write has moved."""
    it = recorder()
    it.operations([done(OpKind.SYNC), done(OpKind.SYNC)])
    assert it.window == StorageTally(sync_ops=2)
    assert (it.latency["storage_sync"].count, it.latency["storage_sync"].sum_ns) == (2, 40)


def test_bytes_that_can_have_come_from_the_page_cache_add_up() -> None:
    """Of reads alone; a write that tells some is no read."""
    it = recorder()
    reads = [done(OpKind.READ, page_cache_bytes=known) for known in (0, 4096, 500)]
    it.operations([*reads, done(OpKind.WRITE, page_cache_bytes=7)])
    assert it.window.page_cache_bytes == 4596


def test_one_read_of_which_it_is_unknown_makes_the_page_cache_unknown() -> None:
    """A sum over the others would pass for the whole; a window without that read still knows its own."""
    it = recorder()
    it.operations([done(OpKind.READ, 150, page_cache_bytes=4096), done(OpKind.READ, 250, page_cache_bytes=None)])
    it.operations([done(OpKind.READ, 250, page_cache_bytes=1)])
    assert (it.window.page_cache_bytes, it.total.page_cache_bytes) == (4096, None)


def test_tries_beyond_the_first_count_whatever_became_of_the_operation() -> None:
    """Two retries of a read that got through, three of a write that did not."""
    it = recorder()
    it.operations([done(OpKind.READ, retries=2), done(OpKind.WRITE, retries=3, error=OSError(5, "Input/output error"))])
    assert (it.window.retries, it.window.read_ops, it.window.io_errors) == (5, 1, 1)


def test_messages_of_the_first_hundred_verification_failures_are_kept() -> None:
    """All are counted, wherever they fell, those of copies from DRAM too; only reads are errors of storage."""
    it = recorder()
    it.operations([done(OpKind.READ, 250, error=VerifyError("object", page, (1, page), (0, 0))) for page in range(100)])
    it.operations([done(OpKind.COPY_OUT, error=VerifyError("copy", 0, (1, 0), (0, 0)))])
    assert it.verify_failures == 101
    assert it.total.verify_errors == 100
    assert len(it.failures) == 100
    assert "page 99" in it.failures[-1]


def test_copies_in_memory_are_no_storage_operations() -> None:
    """Only their wait in the queue is counted."""
    it = recorder()
    it.operations([done(OpKind.COPY_IN), done(OpKind.COPY_OUT)])
    assert it.total == it.window == StorageTally()
    assert {name for name in LATENCIES if it.latency[name].count} == {"queue_wait"}


def test_failed_operations_move_no_bytes() -> None:
    """A wrong stamp and a failed call are counted apart; neither has a latency of storage."""
    it = recorder()
    it.operations(
        [
            done(OpKind.READ, error=VerifyError("object", 3, (1, 3), (0, 0))),
            done(OpKind.WRITE, error=OSError(28, "full")),
        ]
    )
    assert it.window == StorageTally(io_errors=1, verify_errors=1)
    assert it.latency["storage_read"].count == it.latency["storage_write"].count == 0


def test_operations_that_were_never_tried_do_not_count() -> None:
    """Cancelled in the queue: no count, no error, no wait."""
    it = recorder()
    it.operations([done(OpKind.WRITE, error=OperationSkippedError("cancelled"))])
    assert it.total == StorageTally()
    assert it.latency["queue_wait"].count == 0


def test_requests_add_up_by_tier() -> None:
    """Two answers inside the window, one after it."""
    it = recorder()
    it.answered(answered(150))
    it.answered(answered(160))
    it.answered(answered(250))
    assert (it.requests.completed, it.requests.prompt_tokens, it.requests.output_tokens) == (2, 20, 8)
    assert it.requests.prompt_blocks == 10
    assert it.requests.cached_tokens == TierTally(gpu=4, cpu=6, storage=2)
    assert it.requests.hit_blocks == TierTally(gpu=2, cpu=2, storage=2)
    assert (it.total_requests.completed, it.total_requests.hit_blocks.gpu) == (3, 3)


def test_what_was_saved_may_be_less_than_nothing() -> None:
    """Loads of 3, 40 and 5 ns in the place of 5 ns of computing: 2 ns saved, 35 ns lost, nothing."""
    it = recorder()
    for load_ns in (2, 39, 4):
        it.first_token(replace(token(150), storage_load_ns=load_ns))
    assert (it.saved.gains.count, it.saved.gains.sum_ns) == (2, 2)
    assert (it.saved.losses.count, it.saved.losses.sum_ns) == (1, 35)
    assert it.saved.mean_ns == -11


def test_first_tokens_that_cannot_be_compared_are_left_out_of_comparisons() -> None:
    """Where nothing is modelled there is no saving, and where time is not waited for in full no other TTFT."""
    it = recorder()
    it.first_token(replace(token(150), prompt_prefill_ns=None, needed_prefill_ns=None, storage_recompute_ns=None))
    assert (it.saved.count, it.latency["ttft"].count) == (0, 1)
    it.first_token(replace(token(150), waits_in_full=False))
    assert (it.saved.count, it.latency["ttft"].count) == (1, 2)
    assert it.latency["ttft_without_cache"].count == it.latency["ttft_without_storage"].count == 0


def test_a_storage_load_is_one_that_was_used() -> None:
    """A first token that used nothing from storage has no time of it, although it waited for reads in vain."""
    it = recorder()
    it.first_token(replace(token(150), storage_load_tokens=0, storage_recompute_ns=0))
    assert (it.latency["storage_load"].count, it.first_tokens.storage_loads) == (0, 0)
    assert it.first_tokens.storage_load_ns == 2


def test_loads_that_were_not_made_are_counted_with_their_requests() -> None:
    """Skipped and abandoned ones, by when the answer was complete."""
    it = recorder()
    it.answered(replace(answered(150), load_skipped=True))
    it.answered(replace(answered(150), load_abandoned=True))
    it.answered(replace(answered(250), load_abandoned=True))
    assert (it.requests.loads_skipped, it.requests.loads_abandoned) == (1, 1)
    assert it.total_requests.loads_abandoned == 2


def test_nothing_is_inside_a_window_that_is_not_known_yet() -> None:
    """What happens before the run begins is in the totals only."""
    it = Recorder(object_bytes=1000, stored_bytes=4096, ttft_target_ns=50)
    assert [it.start_ns, it.measured_ns] == [None, 0]
    it.operations([done(OpKind.DELETE, 0), done(OpKind.DELETE, 150)])
    assert (it.window.delete_ops, it.total.delete_ops, it.measured_ns) == (0, 2, 0)
    it.open((100, 200))
    it.operations([done(OpKind.DELETE, 150)])
    assert (it.window.delete_ops, it.measured_ns, it.start_ns) == (1, 100, 100)


def test_a_window_that_is_closed_early_has_its_true_length() -> None:
    """What ends later is outside; closing it later than its end changes nothing."""
    it = recorder()
    it.close(170)
    it.answered(answered(169))
    it.answered(answered(170))
    assert (it.measured_ns, it.requests.completed) == (70, 1)
    it.close(190)
    assert it.measured_ns == 70
    late = recorder()
    late.close(500)
    assert late.measured_ns == 100


def test_a_window_that_never_began_has_no_length() -> None:
    """Stopped in the warm-up: nothing is inside."""
    it = recorder()
    it.close(40)
    it.answered(answered(150))
    assert (it.measured_ns, it.requests.completed, it.total_requests.completed) == (0, 0, 1)


def test_tallies_have_the_fields_of_the_results() -> None:
    """Every counter goes into the result files under its own name."""
    assert StorageCounts.model_validate(counts(StorageTally(read_ops=3))).read_ops == 3
    assert RequestCounts.model_validate(counts(RequestTally(completed=4))).completed == 4
    assert TtftCounts.model_validate(counts(TtftTally(requests=5))).requests == 5


# Storage that ranks share


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("kind", "error", "gone"),
    [
        (OpKind.READ, FileNotFoundError(errno.ENOENT, "gone", "x"), "reads_gone"),
        (OpKind.READ, OSError(errno.ESTALE, "deleted by another host"), "reads_gone"),
        (OpKind.DELETE, FileNotFoundError(errno.ENOENT, "gone", "x"), "deletes_gone"),
        (OpKind.SYNC, FileNotFoundError(errno.ENOENT, "gone", "x"), "deletes_gone"),
        (OpKind.WRITE, FileNotFoundError(errno.ENOENT, "the directory is gone", "x"), None),
        (OpKind.READ, OSError(errno.EIO, "broken"), None),
    ],
)
def test_what_others_may_delete_is_no_error_where_it_is_gone(
    kind: OpKind, error: OSError, gone: str | None, *, shared: bool
) -> None:
    """Only where storage is shared, and only of what needs an object that is there."""
    recorder = Recorder(object_bytes=8, stored_bytes=8, ttft_target_ns=1, window_ns=(0, 1_000), shared=shared)
    recorder.operations([done(kind, 500, error=error)])
    expected = gone if shared and gone else "io_errors"
    for tally in (recorder.window, recorder.total):
        counted = {name: getattr(tally, name) for name in ("io_errors", "reads_gone", "deletes_gone")}
        assert counted == {"io_errors": 0, "reads_gone": 0, "deletes_gone": 0} | {expected: 1}
        assert tally.read_ops == tally.delete_ops == tally.sync_ops == tally.write_ops == 0


def test_questions_count_where_they_end() -> None:
    """Each objects asked for, and its own time; of the window those that ended in it."""
    recorder = Recorder(object_bytes=8, stored_bytes=8, ttft_target_ns=1, window_ns=(100, 200))
    recorder.looked_for(90, 150, 12)
    recorder.looked_for(150, 210, 4)
    assert (recorder.window.exists_ops, recorder.total.exists_ops) == (12, 16)
    latency = recorder.latency["existence_check"]
    assert (latency.count, latency.sum_ns) == (1, 60)
