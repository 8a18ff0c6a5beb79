"""Trace files: opened, unpacked and cut into lines, with every failure told in one line.

A packed file is known by its first bytes, whatever its name is.
"""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from mlpstorage.errors import AccessError, ConfigurationError, MissingFileError

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_INPUT_BYTES = (64, 1 << 12)
"""Least and most packed bytes that are unpacked at a time."""
_ZSTD_OUTPUT_BYTES = 1 << 18
"""Where they make more than that, fewer are taken the next time: repetitive text packs to nearly nothing."""
_READ_BYTES = 1 << 20


class _CorruptError(Exception):
    """The archive cannot be unpacked any further."""


@dataclass(slots=True)
class Progress:
    """How far a file was read, in words, for the message about a broken archive."""

    words: str = "at its beginning"


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of the unpacked lines that are not blank.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: It is no regular file, or its archive is cut off or damaged; the message says after which
            line.
    """
    progress = Progress()
    with _unpacked(path, progress) as file:
        for number, raw in enumerate(file, start=1):
            progress.words = f"after line {number}"
            if not raw.isspace():
                yield number, raw


def content(path: Path) -> bytes:
    """The whole unpacked file.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: See `lines`; the message says after how many bytes.
    """
    return b"".join(_chunks(path))


def head(path: Path, size: int) -> bytes:
    """The first `size` bytes of the unpacked file, fewer where it ends before.

    Raises:
        MissingFileError: There is no such file.
        AccessError: The file may not be read.
        ConfigurationError: See `content`.
    """
    with _unpacked(path, Progress()) as file:
        return file.read(size)


def is_directory(path: Path) -> bool:
    """Whether `path` is a directory.

    Raises:
        AccessError: A directory above it may not be searched.
    """
    try:
        return path.is_dir()
    except PermissionError as error:
        raise _no_access(path) from error


def zstd(path: Path) -> Any:  # noqa: ANN401 - a module
    """The package zstandard, which is optional.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        import zstandard  # noqa: PLC0415 - optional, and only for files that need it
    except ImportError as error:
        raise ConfigurationError(
            f"{path}: zstd needs the package zstandard ({error}); install it with: pip install 'mlpstorage[zstd]', "
            "or use an unpacked file"
        ) from error
    return zstandard


def _chunks(path: Path) -> Iterator[bytes]:
    progress = Progress()
    done = 0
    with _unpacked(path, progress) as file:
        while chunk := file.read(_READ_BYTES):
            done += len(chunk)
            progress.words = f"after {done} unpacked bytes"
            yield chunk


@contextmanager
def _unpacked(path: Path, progress: Progress) -> Iterator[IO[bytes]]:
    """The file's content as a buffered stream; failures to read it, also inside the `with`, become ours."""
    try:
        # A pipe would be empty when the trace is read again: once for its digest, once to play it.
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"{path}: not a regular file; give the trace file itself")
        with path.open("rb") as raw:
            yield _stream(raw, path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path}: there is no such trace; check the path") from error
    except PermissionError as error:
        raise _no_access(path) from error
    except EOFError:
        _refuse_archive(path, f"cut off {progress.words}")
    except (_CorruptError, zlib.error) as error:
        _refuse_archive(path, f"damaged {progress.words} ({error})")
    except OSError as error:
        if error.errno is None:  # gzip's own complaint, which is an OSError without a number
            _refuse_archive(path, f"damaged {progress.words} ({error})")
        raise ConfigurationError(f"{path}: the trace cannot be read: {error.strerror}; copy it elsewhere") from error


def _stream(raw: io.BufferedReader, path: Path) -> IO[bytes]:
    magic = raw.peek(len(_ZSTD_MAGIC))
    if magic.startswith(_GZIP_MAGIC):
        import gzip  # noqa: PLC0415 - only for files that need it

        # The buffer around it makes iteration over lines three times as fast.
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _READ_BYTES)
    if magic.startswith(_ZSTD_MAGIC):
        return io.BufferedReader(_Zstd(raw, path), _READ_BYTES)
    return raw


class _Zstd(io.RawIOBase):
    """The unpacked content of a zstd file of any number of frames.

    The package's own reader takes a file that is cut off for one that has ended; this one raises EOFError.
    """

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        self._raw = raw
        self._zstd = zstd(path)
        self._frame: Any = None
        self._input_bytes = _ZSTD_INPUT_BYTES[0]
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer, as in the base class
        while not self._ready:
            if not self._packed:
                self._packed = self._raw.read(self._input_bytes)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError
                    return 0
            self._unpack()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._zstd.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(self._packed))
        except self._zstd.ZstdError as error:
            raise _CorruptError(str(error)) from error
        least, most = _ZSTD_INPUT_BYTES
        if len(self._ready) > _ZSTD_OUTPUT_BYTES:
            self._input_bytes = max(self._input_bytes // 2, least)
        else:
            self._input_bytes = min(self._input_bytes * 2, most)
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None


def _no_access(path: Path) -> AccessError:
    return AccessError(f"{path}: the trace may not be read; give yourself read permission")


def _refuse_archive(path: Path, what: str) -> NoReturn:
    raise ConfigurationError(f"{path}: the archive is {what}; get the file again")
