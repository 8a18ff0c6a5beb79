"""Blocks of a trace in the size in which they are played: exact upwards, impossible downwards."""

from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.traces.model import TraceRequest
from mlpstorage.kvcache.traces.trace import Trace


def full_block_ids(request: TraceRequest, trace: Trace) -> tuple[int, ...]:
    """The ids of a request's full blocks: a partial last block is never stored, so it can never be found.

    Empty where the trace has no ids.
    """
    if request.block_ids is None or trace.block_tokens is None:
        return ()
    return request.block_ids[: request.input_tokens // trace.block_tokens]


def check_block_tokens(trace_block_tokens: int, block_tokens: int) -> None:
    """Refuse blocks that cannot be made of the trace's.

    Raises:
        ConfigurationError: `block_tokens` is smaller than the trace's, or no multiple of them.
    """
    if block_tokens < trace_block_tokens:
        raise ConfigurationError(
            f"--block-tokens {block_tokens} is smaller than the trace's blocks of {trace_block_tokens} tokens, and a "
            f"block's id says nothing of its parts; give {trace_block_tokens} or a multiple of it"
        )
    if block_tokens % trace_block_tokens:
        raise ConfigurationError(
            f"--block-tokens {block_tokens} is not a multiple of the trace's blocks of {trace_block_tokens} tokens; "
            "give a multiple"
        )


def regroup(block_ids: tuple[int, ...], trace_block_tokens: int, block_tokens: int) -> tuple[int, ...]:
    """A prompt's full blocks of `block_tokens` tokens, from its full blocks in the trace's size.

    A group takes the id of its last block, which stands for the whole prefix up to there. An incomplete group is
    dropped.

    Raises:
        ConfigurationError: See `check_block_tokens`.
    """
    check_block_tokens(trace_block_tokens, block_tokens)
    size = block_tokens // trace_block_tokens
    return block_ids[size - 1 :: size]
