"""Signals while ranks prepare: they break in, but not into what ranks do together."""

import subprocess
import sys

PROGRAM = """
import os, signal, sys
from mlpstorage.errors import InterruptedRunError
from mlpstorage.kvcache.process import Signals

signals = Signals()
try:
    signals.preparing = False
    if "inside" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    print("together to the end")
    signals.resume()
    os.kill(os.getpid(), signal.SIGTERM)
    print("never")
except InterruptedRunError as error:
    print(error)
"""


def said(*words: str) -> list[str]:
    """What the program prints, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True, timeout=60
    )
    return ended.stdout.splitlines()


def test_a_signal_waits_for_the_end_of_what_ranks_do_together() -> None:
    """Then it ends the preparation."""
    assert said("inside") == ["together to the end", "stopped by a signal before the run began"]


def test_the_next_signal_breaks_in_again() -> None:
    """As before."""
    assert said() == ["together to the end", "stopped by SIGTERM before the run began"]
