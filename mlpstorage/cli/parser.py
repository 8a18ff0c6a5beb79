"""The `mlpstorage` command line. Only the chosen command's arguments are built, so that `--help` starts fast."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NoReturn

from mlpstorage import __version__
from mlpstorage.errors import UsageError

PROGRAMS = {
    "kvcache": "KV cache of LLM inference: run, datasize, trace",
    "history": "what ran: list, show, rerun",
    "version": "show the version",
}


class Parser(argparse.ArgumentParser):
    """A parser that raises a one-line error instead of printing the whole usage and exiting."""

    def __init__(self, **keywords: Any) -> None:  # noqa: ANN401 - argparse's own keywords
        # An abbreviated flag would change its meaning when a longer one is added.
        super().__init__(**({"allow_abbrev": False} | keywords))
        self.help_of: str | None = None

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message} (see `{self.help_of or self.prog} --help`)")


def build_parser(argv: Sequence[str]) -> Parser:
    """The parser, with the arguments of the program that `argv` names."""
    parser = Parser(prog="mlpstorage", description="Benchmark suite for the storage of AI systems.")
    parser.add_argument("--version", action="version", version=f"mlpstorage {__version__}")
    programs = parser.add_subparsers(dest="program", metavar="PROGRAM", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, text in PROGRAMS.items():
        program = programs.add_parser(name, help=text, description=text)
        if name == chosen:
            _add_arguments(name, program)
    # argparse tells of an unknown flag at the top; its help is that of the command it stands behind.
    command = list(takewhile(lambda word: not word.startswith("-"), argv))[:2]
    parser.help_of = " ".join([parser.prog, *command])
    return parser


def _add_arguments(name: str, parser: Parser) -> None:
    if name == "kvcache":
        from mlpstorage.cli.kvcache_args import add_kvcache_arguments  # noqa: PLC0415 - imports the spec

        add_kvcache_arguments(parser)
    elif name == "history":
        from mlpstorage.cli.history_args import add_history_arguments  # noqa: PLC0415 - only where it is needed

        add_history_arguments(parser)
