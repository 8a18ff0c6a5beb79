"""What a rank asks of its own process: an end with its parent's, orderly signals, threads that keep nobody waiting."""

import asyncio
import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TypeVar

from mlpstorage.errors import InterruptedRunError

T = TypeVar("T")
A = TypeVar("A")

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the parent dies: a killed launcher leaves no rank and no file behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Signals:
    """SIGINT and SIGTERM: an error while the rank prepares, a stop while it plays, nothing while it cleans up.

    asyncio's own handlers would not do: closing its loop sets the default back, and a second signal would kill the
    clean-up. (A launcher that is killed sends one for each of its threads.)
    """

    def __init__(self) -> None:
        self.preparing = True
        self.seen = False
        self.notify: Callable[[], object] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._arrived)

    def resume(self) -> None:
        """Have signals raise again, after ranks did something together, which none may break into.

        Raises:
            InterruptedRunError: One has come meanwhile.
        """
        if self.seen:
            raise InterruptedRunError("stopped by a signal before the run began")
        self.preparing = True

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        self.seen = True
        if self.preparing:
            self.preparing = False
            raise InterruptedRunError(f"stopped by {signal.Signals(number).name} before the run began")
        if self.notify is not None:
            self.notify()


async def in_daemon(work: Callable[[A], T], argument: A, name: str = "page-cache") -> T:
    """Do blocking work in a thread that keeps nobody from ending, as those of asyncio's own pool would."""
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[T] = loop.create_future()

    def finish(outcome: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if finished.done() else outcome())

    def run() -> None:
        try:
            value = work(argument)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            finish(partial(finished.set_exception, error))
        else:
            finish(partial(finished.set_result, value))

    threading.Thread(target=run, name=name, daemon=True).start()
    return await finished
