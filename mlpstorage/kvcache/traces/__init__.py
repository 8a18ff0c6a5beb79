"""Request traces: found, read as streams, and cut into blocks, in five formats. See docs/traces.md."""

from mlpstorage.kvcache.traces.blocks import check_block_tokens, full_block_ids, regroup
from mlpstorage.kvcache.traces.model import After, TraceRequest
from mlpstorage.kvcache.traces.mooncake import MOONCAKE_BLOCK_TOKENS
from mlpstorage.kvcache.traces.trace import Trace, open_trace

__all__ = [
    "MOONCAKE_BLOCK_TOKENS",
    "After",
    "Trace",
    "TraceRequest",
    "check_block_tokens",
    "full_block_ids",
    "open_trace",
    "regroup",
]
