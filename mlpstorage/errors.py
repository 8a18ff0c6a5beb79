"""The exception tree: each class carries the exit code that `main` ends with."""

from mlpstorage.config import EXIT_CODE


class MLPStorageError(Exception):
    """A failure that the user is told about in one line, without a traceback.

    The message says what, where, and what to do.
    """

    exit_code: EXIT_CODE = EXIT_CODE.FAILURE


class UsageError(MLPStorageError):
    """A flag or its value is wrong; the message names the flag and the range."""

    exit_code = EXIT_CODE.USAGE


class MissingFileError(MLPStorageError):
    """An input file or an executable is not there."""

    exit_code = EXIT_CODE.FILE_NOT_FOUND


class AccessError(MLPStorageError):
    """A file or a directory may not be read or written."""

    exit_code = EXIT_CODE.PERMISSION


class ConfigurationError(MLPStorageError):
    """The input is readable but cannot be run: a broken trace or config file, too little space, a directory in use."""

    exit_code = EXIT_CODE.CONFIGURATION


class RunError(MLPStorageError):
    """A rank or an I/O failed while the benchmark ran."""

    exit_code = EXIT_CODE.RUN


class RunTimeoutError(MLPStorageError):
    """Something that has a time limit did not end within it."""

    exit_code = EXIT_CODE.TIMEOUT


class InterruptedRunError(MLPStorageError):
    """The user or the system asked the run to stop (SIGINT, SIGTERM)."""

    exit_code = EXIT_CODE.INTERRUPTED
