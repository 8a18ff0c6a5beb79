"""The trace as the rest of the program sees it, whatever its format."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mlpstorage.config import TraceFormat
from mlpstorage.errors import ConfigurationError
from mlpstorage.kvcache.traces.agentic import conversation_files, read_agentic, read_sessions
from mlpstorage.kvcache.traces.bailian import BAILIAN_BLOCK_TOKENS, read_bailian
from mlpstorage.kvcache.traces.conversation import block_size_of
from mlpstorage.kvcache.traces.detect import detect_format, refuse_empty
from mlpstorage.kvcache.traces.fields import refuse
from mlpstorage.kvcache.traces.files import is_directory
from mlpstorage.kvcache.traces.model import TraceRequest
from mlpstorage.kvcache.traces.mooncake import MOONCAKE_BLOCK_TOKENS, read_mooncake
from mlpstorage.kvcache.traces.tables import read_azure, read_burstgpt

_BLOCK_TOKENS: Mapping[TraceFormat, int] = {
    TraceFormat.MOONCAKE: MOONCAKE_BLOCK_TOKENS,
    TraceFormat.BAILIAN: BAILIAN_BLOCK_TOKENS,
}
"""Of the formats whose blocks have one size for all traces."""

_READERS: Mapping[TraceFormat, Callable[[Path, Counter[str]], Iterator[TraceRequest]]] = {
    TraceFormat.MOONCAKE: read_mooncake,
    TraceFormat.BAILIAN: read_bailian,
    TraceFormat.BURSTGPT: read_burstgpt,
    TraceFormat.AZURE: read_azure,
}
"""Of the formats that are read line by line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A trace that has been found and not been read yet. It is made by `open_trace`.

    Attributes:
        path: The file or directory.
        format: How it is written.
        block_tokens: Tokens of its blocks; None where the format has no block ids.
        has_partial_block: Whether a prompt's last id may stand for a partial block.
        has_sessions: Whether it says which requests belong together.
        has_think_times: Whether it says how long users paused, so that its sessions can be played closed.
    """

    path: Path
    format: TraceFormat
    block_tokens: int | None
    has_partial_block: bool
    has_sessions: bool
    has_think_times: bool

    def requests(self, max_requests: int | None = None, warnings: Counter[str] | None = None) -> Iterator[TraceRequest]:
        """All requests in order of arrival, read as a stream; each call begins anew.

        A trace is refused at its first broken line. Skipping lines would play a workload that nobody recorded, and the
        hit ratios of a prefix cache hang on every request before.

        Args:
            max_requests: Stop after so many, and look at no line behind them; None for all.
            warnings: Counts what was amended or left out, by its description.

        Raises:
            MissingFileError: There is no such file.
            AccessError: The file may not be read.
            ConfigurationError: It is no file, it holds no request, its archive or a line is broken; the message names
                the place.
        """
        last_s = 0.0
        found = False
        for request in islice(self._read(Counter() if warnings is None else warnings), max_requests):
            if request.timestamp_s < last_s:
                what = "its timestamp lies before that of the request above"
                refuse(self.path, request.place, what, "sort the trace by timestamp")
            last_s = request.timestamp_s
            found = True
            yield request
        if not found:
            refuse_empty(self.path)

    def sessions(self, warnings: Counter[str] | None = None) -> Iterator[tuple[TraceRequest, ...]]:
        """Whole sessions, in the order in which `requests` numbers them; one is in memory at a time.

        Raises:
            ConfigurationError: The trace tells no think times, or see `requests`.
        """
        if not self.has_think_times:
            raise ConfigurationError(
                f"{self.path}: the {self.format} format tells no think times; play the trace by its times"
            )
        assert self.block_tokens is not None, "a trace with think times has block ids"
        yield from read_sessions(self.path, self.block_tokens, Counter() if warnings is None else warnings)

    def _read(self, warnings: Counter[str]) -> Iterator[TraceRequest]:
        if self.format is TraceFormat.AGENTIC:
            assert self.block_tokens is not None, "an agentic trace has block ids"
            return read_agentic(self.path, self.block_tokens, warnings)
        return _READERS[self.format](self.path, warnings)


def open_trace(path: Path, trace_format: TraceFormat | None = None) -> Trace:
    """The trace at `path`; its requests are checked when they are read.

    Args:
        path: A file, or a directory of agentic conversations.
        trace_format: Its format; None to find it by content. One that does not fit shows when the first request is
            read.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: It is of no known format, or a directory without conversations.
    """
    if is_directory(path):
        if trace_format not in {None, TraceFormat.AGENTIC}:
            raise ConfigurationError(
                f"{path}: a trace of the {trace_format} format is a file, not a directory; give the file"
            )
        trace_format = TraceFormat.AGENTIC
    trace_format = trace_format or detect_format(path)
    agentic = trace_format is TraceFormat.AGENTIC
    return Trace(
        path=path,
        format=trace_format,
        block_tokens=block_size_of(conversation_files(path)[0]) if agentic else _BLOCK_TOKENS.get(trace_format),
        has_partial_block=trace_format in _BLOCK_TOKENS,
        has_sessions=agentic or trace_format is TraceFormat.BAILIAN,
        has_think_times=agentic,
    )
