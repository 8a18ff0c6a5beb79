"""From argv to exit code: the only place that prints an error and turns it into an exit code."""

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from types import FrameType

from mlpstorage import __version__
from mlpstorage.cli.parser import build_parser
from mlpstorage.config import EXIT_CODE
from mlpstorage.errors import InterruptedRunError, MLPStorageError


def entry() -> None:
    """The `mlpstorage` command."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` (without the program's name); returns the exit code."""
    debug = "--debug" in argv
    signal.signal(signal.SIGTERM, _terminated)
    try:
        try:
            args = build_parser(argv).parse_args(argv)
        except MLPStorageError as error:
            _record(argv, error)
            raise
        args.argv = list(argv)
        _set_up_logging(args)
        return _command(args)
    except MLPStorageError as error:
        return _told(error, str(error), error.exit_code, debug=debug)
    except KeyboardInterrupt as error:
        return _told(error, "interrupted", EXIT_CODE.INTERRUPTED, debug=debug)
    except BrokenPipeError:
        # Who read our output has had enough. Without this, closing standard output at exit would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CODE.FAILURE


def _told(error: BaseException, message: str, exit_code: EXIT_CODE, *, debug: bool) -> EXIT_CODE:
    if debug:
        logging.getLogger("mlpstorage").debug("traceback", exc_info=error)
    sys.stderr.write(f"mlpstorage: error: {message}\n")
    return exit_code


def _terminated(number: int, _frame: FrameType | None) -> None:
    raise InterruptedRunError(f"stopped by {signal.Signals(number).name}")


def _set_up_logging(args: Namespace) -> None:
    level = logging.WARNING
    if getattr(args, "verbose", False):
        level = logging.INFO
    if getattr(args, "debug", False):
        level = logging.DEBUG
    logging.basicConfig(stream=sys.stderr, level=level, format="mlpstorage: %(levelname)s: %(message)s")


def _command(args: Namespace) -> int:
    if args.program == "version":
        sys.stdout.write(f"mlpstorage {__version__}\n")
        return EXIT_CODE.SUCCESS
    from mlpstorage import commands  # noqa: PLC0415 - imports what the commands need; --help and version need nothing

    return commands.run(args)


def _record(argv: Sequence[str], error: BaseException) -> None:
    """Keep a note of an invocation of `kvcache run` that failed before it had metadata of its own."""
    from mlpstorage.commands import record_refused  # noqa: PLC0415 - only where something failed

    record_refused(argv, error)
