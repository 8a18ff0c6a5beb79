"""What of a file was written since it was last forced to stable storage: one fdatasync does for many objects."""

import os
import threading


class PendingSync:
    """Objects of one file that were written and not synced. Threads may share it."""

    __slots__ = ("_lock", "_pending", "_syncing", "_written")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._written = 0
        # Object id to the number of its write: ascending, as an object that is written again moves to the end.
        self._pending: dict[int, int] = {}

    def add(self, object_id: int) -> None:
        """Note that an object was written."""
        with self._lock:
            self._written += 1
            self._pending.pop(object_id, None)
            self._pending[object_id] = self._written

    def sync(self, object_id: int, descriptor: int) -> None:
        """Return when what was written of an object is on stable storage.

        The calls of several threads share one fdatasync: those that come while one is under way wait for it, the first
        of them then does the next, which covers all that were written before it began.

        Raises:
            OSError: The file could not be synced. It counts as not synced.
        """
        if object_id not in self._pending:
            return
        with self._syncing:
            with self._lock:
                covered = self._written
                if object_id not in self._pending:
                    return
            os.fdatasync(descriptor)
            with self._lock:
                self._forget(covered)

    def _forget(self, covered: int) -> None:
        while self._pending:
            object_id, number = next(iter(self._pending.items()))
            if number > covered:
                return
            del self._pending[object_id]
