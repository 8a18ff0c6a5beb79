"""Arguments of `mlpstorage kvcache`."""

import argparse

from mlpstorage.cli.options import add_options
from mlpstorage.config import TouchOrder, TraceFormat
from mlpstorage.spec.kvcache import OUTPUT, KVCacheSpec


def add_kvcache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands `run`, `datasize` and `trace` to `parser`; the chosen one is in `command`."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(
        commands.add_parser(
            "run", help="play a KV-cache load on real storage", formatter_class=_WideHelp, allow_abbrev=False
        )
    )
    _add_datasize(
        commands.add_parser(
            "datasize", help="sizes and break-even bandwidth of a load", formatter_class=_WideHelp, allow_abbrev=False
        )
    )
    trace = commands.add_parser("trace", help="look into a request trace, or convert it", allow_abbrev=False)
    traces = trace.add_subparsers(dest="trace_command", metavar="COMMAND", required=True)
    _add_inspect(
        traces.add_parser(
            "inspect",
            help="count requests, blocks and what caches would find",
            formatter_class=_WideHelp,
            allow_abbrev=False,
        )
    )
    _add_convert(
        traces.add_parser(
            "convert",
            help="write a trace in the mooncake format, without its sessions and think times",
            description="Write a trace in the mooncake format, in blocks of 512 tokens. Sessions and think times have "
            "no place in that format and are lost.",
            formatter_class=_WideHelp,
            allow_abbrev=False,
        )
    )


class _WideHelp(argparse.HelpFormatter):
    """Help with room for the long flag names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def _add_run(parser: argparse.ArgumentParser) -> None:
    shell = add_options(parser, KVCacheSpec, "run")[OUTPUT]
    shell.add_argument(
        "--what-if",
        action="store_true",
        help="show the full plan and the exact command; contact nobody, create nothing",
    )
    _add_config_file(shell)
    _add_json(shell)
    shell.add_argument("--quiet", action="store_true", help="no progress and no table; errors only")
    shell.add_argument("--verbose", action="store_true", help="say more of what is done")
    shell.add_argument("--debug", action="store_true", help="say all, and show tracebacks")


def _add_datasize(parser: argparse.ArgumentParser) -> None:
    add_options(parser, KVCacheSpec, "datasize")
    shell = parser.add_argument_group(OUTPUT)
    _add_config_file(shell)
    _add_json(shell)
    shell.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_trace(parser)
    parser.add_argument(
        "--block-tokens",
        type=_positive,
        default=None,
        metavar="N",
        help="count in full blocks of N tokens, a multiple of the trace's (default: the trace's own blocks, "
        "partial ones too)",
    )
    parser.add_argument(
        "--capacity-blocks",
        type=_positive,
        action="append",
        default=None,
        metavar="N",
        help="also count what a cache of N blocks would find (1 or more); may be repeated",
    )
    parser.add_argument(
        "--touch",
        type=TouchOrder,
        choices=list(TouchOrder),
        default=TouchOrder.TAIL,
        help="in which order a request's blocks become recent (default: tail)",
    )
    _add_json(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_trace(parser)
    parser.add_argument("out", metavar="OUT", help="the new file; packed if it ends in .gz or .zst")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    _add_json(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", metavar="FILE|DIR", help="a trace, packed (gzip, zstd) or not; a directory of agentic conversations"
    )
    parser.add_argument(
        "--trace-format",
        type=TraceFormat,
        choices=list(TraceFormat),
        default=None,
        help="how the trace is written (default: found out from its content)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more (got {value})")
    return value


def _add_config_file(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--config-file", "-c", metavar="FILE", help="YAML file of options, `num_users: 50`; flags and environment win"
    )


def _add_json(group: argparse._ActionsContainer) -> None:
    group.add_argument("--json", action="store_true", help="print one JSON document on standard output, nothing else")
