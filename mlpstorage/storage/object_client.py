"""Requests to an S3 bucket, each tried again within a bound of time, with errors that say what went wrong.

The client library is obstore. Its own retries are switched off: they are neither counted nor bounded as a run needs it.
"""

import contextlib
import errno
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

from mlpstorage.errors import AccessError, ConfigurationError, MLPStorageError
from mlpstorage.storage.keys import KEY_BYTES
from mlpstorage.storage.location import S3Location

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Store

_T = TypeVar("_T")

LIMIT_S: Final = 30.0
"""Default of how long one operation may take with all its tries."""

_REQUEST_SHARE = 0.4
"""Of an operation's time, what one request may take: a server that hangs is asked twice."""

_CONNECT_LIMIT_S = 5.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_IMPATIENT_TRIES = 2
"""One on a connection that was kept and that the server may have closed by now, and one on a new one."""

_LIST_ROWS = 1000
"""Keys of one page of a listing: the most that S3 returns at once."""

_DELETE_ROWS = 100
_DELETE_REQUESTS = 8
"""Small requests, many at once: a server may delete the objects of one request one after the other."""

_PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "OperationAborted", "ConditionalRequestConflict"})
"""Error codes of S3 that say "try again", whatever status they come with."""

_REFUSING_STATUSES = frozenset({401, 403})

_HINTS: Mapping[str, str] = {
    "NoSuchBucket": "there is no such bucket",
    "SignatureDoesNotMatch": "are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY right?",
    "InvalidAccessKeyId": "is AWS_ACCESS_KEY_ID right?",
    "AccessDenied": "may this user list, read, write and delete there?",
    "RequestTimeTooSkewed": "is this host's clock right?",
    "AuthorizationHeaderMalformed": "is AWS_REGION right?",
}

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_SYSTEM_MESSAGE = re.compile(r'(?:message|error): "([^"]+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Access:
    """How a bucket is reached.

    Attributes:
        endpoint: Address of the server.
        region: Name of its region, which is part of every signature.
        access_key_id: Whose request it is.
        secret_access_key: What signs it; in no message and no representation.
        session_token: Goes with temporary credentials; likewise.
    """

    endpoint: str
    region: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(repr=False)


def access_from_environment(environment: Mapping[str, str]) -> S3Access:
    """Endpoint and credentials from the usual AWS variables. Profile files and instance roles are not looked at.

    AWS_ENDPOINT_URL_S3 comes before AWS_ENDPOINT_URL, AWS_REGION before AWS_DEFAULT_REGION; an empty variable is as one
    that is not set. Without an endpoint it is Amazon's of the region, without a region `us-east-1` is signed for, as
    most servers expect. The library itself reads further ones, such as AWS_VIRTUAL_HOSTED_STYLE_REQUEST.

    Raises:
        ConfigurationError: A variable is missing or cannot be right.
    """

    def value(*names: str) -> str | None:
        return next((environment[name] for name in names if environment.get(name)), None)

    endpoint = value("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = value("AWS_REGION", "AWS_DEFAULT_REGION")
    if endpoint is None and region is None:
        raise ConfigurationError(
            "S3: neither AWS_ENDPOINT_URL nor AWS_REGION is set, so it is not known which server to ask; set one"
        )
    region = region or "us-east-1"
    endpoint = endpoint or f"https://s3.{region}.amazonaws.com"
    parts = urlsplit(endpoint)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(f"AWS_ENDPOINT_URL: {endpoint!r} is no address; expected http://host:port or https://")
    if parts.username or parts.password:  # it would appear in messages, and S3 takes credentials in no address
        raise ConfigurationError("AWS_ENDPOINT_URL: credentials go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    access_key_id, secret_access_key = value("AWS_ACCESS_KEY_ID"), value("AWS_SECRET_ACCESS_KEY")
    if access_key_id is None or secret_access_key is None:
        missing = "AWS_ACCESS_KEY_ID" if access_key_id is None else "AWS_SECRET_ACCESS_KEY"
        raise ConfigurationError(f"S3: {missing} is not set; profile files and instance roles are not read")
    return S3Access(
        endpoint=endpoint.rstrip("/"),
        region=region,
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
        session_token=value("AWS_SESSION_TOKEN"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a request failed, as far as the library tells.

    Attributes:
        status: HTTP status of the answer; None where there was no answer.
        code: Error code of S3; None where the answer has none (to HEAD it never has).
        text: One line for the user.
    """

    status: int | None
    code: str | None
    text: str

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed a little later."""
        return self.status is None or self.status in _PASSING_STATUSES or self.code in _PASSING_CODES

    @property
    def errno(self) -> int:
        """The system's number for it, which chooses the class of the `OSError`."""
        if self.status in _REFUSING_STATUSES:
            return errno.EACCES
        if self.status == HTTPStatus.NOT_FOUND and self.code != "NoSuchBucket":
            return errno.ENOENT
        return errno.EIO


def cause_of(error: Exception) -> Cause:
    """What the library's error says.

    It offers its cause as text only: a sentence, the body of the server's answer, and a dump of its own structures. The
    answer may hold what was signed; nothing of it but the error code is repeated.
    """
    told, _, dump = str(error).partition("\n\nDebug source")
    status_found, code_found = _STATUS.search(told), _CODE.search(told)
    code = code_found[1] if code_found else None
    if status_found:
        hint = _HINTS.get(code or "")
        parts = (f"HTTP {status_found[1]}", code, f"({hint})" if hint else None)
        return Cause(status=int(status_found[1]), code=code, text=" ".join(part for part in parts if part))
    system = _SYSTEM_MESSAGE.findall(dump)
    if "TimedOut" in dump:
        text = "no answer in time"
    elif system:
        text = system[-1]
    else:
        text = code or told.partition("\n")[0][:200]
    return Cause(status=None, code=code, text=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectClient:
    """A bucket that can be asked; made by `connect`.

    Attributes:
        bucket: Name of the bucket.
        endpoint: Address of the server, for messages.
        limit_s: How long one operation may take with all its tries.
        s3: The library's client. Its calls let go of the interpreter while they wait, and never try again themselves.
        s3_bulk: Another, which deletes many objects with one request. Some servers lack that; the library can be told
            so with AWS_DISABLE_BULK_DELETE.
        library_errors: What calls of the library raise.
    """

    bucket: str
    endpoint: str
    limit_s: float
    s3: "S3Store"
    s3_bulk: "S3Store"
    library_errors: tuple[type[Exception], ...]

    def where(self, key: str) -> str:
        """An object, for messages."""
        return str(S3Location(self.bucket, key))

    def tried(
        self,
        doing: str,
        key: str,
        do: Callable[[], _T],
        *,
        begin_s: float | None = None,
        patient: bool = True,
        retries: int = 0,
    ) -> tuple[_T, int]:
        """Do a request, again after a growing pause where it failed for a reason that may pass.

        A connection that cannot be made or breaks, no answer in time, and what a server says when it is overloaded may
        pass; refused credentials, a missing object or bucket, and all other errors do not. No try is begun that could
        end later than `limit_s` after the first. An operation of several requests that are all slow, but each in time,
        can take longer.

        Args:
            doing: What, for messages.
            key: The object.
            do: The request; whatever else than the library's errors it raises ends it.
            begin_s: When the operation began (`time.monotonic`), where this is a part of one.
            patient: Whether to go on where there was no answer at all, and not just see whether it was the connection.
            retries: Of the operation's requests before this one.

        Returns:
            What `do` returned, and how many tries failed before, `retries` included.

        Raises:
            OSError: It failed; a `FileNotFoundError` where there is no such object, a `PermissionError` where access
                was refused. It names the object, the endpoint, the tries and the last cause, and no secret; see
                `note_retries`.
        """
        begin_s = time.monotonic() if begin_s is None else begin_s
        pause_s = _FIRST_PAUSE_S
        failed = 0
        while True:
            try:
                return do(), retries + failed
            except self.library_errors as error:
                cause = cause_of(error)
                failed += 1
                wait_s = pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - it only keeps clients from trying in step
                spent_s = time.monotonic() - begin_s
                late = spent_s + wait_s + request_limit_s(self.limit_s) > self.limit_s
                hopeless = cause.status is None and not patient and failed == _IMPATIENT_TRIES
                if late or hopeless or not cause.passing:
                    tries = f"{failed} tries in {spent_s:.1f} s" if failed > 1 else "one try"
                    message = f"{doing} failed after {tries} at {self.endpoint}: {cause.text}"
                    failure = OSError(cause.errno, message, self.where(key))
                    note_retries(failure, retries + failed - 1)
                    raise failure from error
            except OSError as error:
                note_retries(error, retries + failed)
                raise
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def pages(self, prefix: str) -> Iterator[Sequence["ObjectMeta"]]:
        """All objects below a prefix, by key, as many at once as the server hands out.

        Raises:
            OSError: See `tried`.
        """
        page: Sequence[ObjectMeta] = self._page(prefix, None)
        while page:
            yield page
            page = self._page(prefix, page[-1]["path"])

    def _page(self, prefix: str, last_key: str | None) -> Sequence["ObjectMeta"]:
        """One page of a listing. A stream of pages that fails cannot go on, so that each is a listing of its own."""
        import obstore  # noqa: PLC0415 - an optional package

        def first_page() -> "Sequence[ObjectMeta]":
            return next(obstore.list(self.s3, prefix or None, offset=last_key, chunk_size=_LIST_ROWS), ())

        return self.tried("list", prefix, first_page)[0]

    def delete_all(self, keys: Sequence[str]) -> None:
        """Delete objects, many with one request.

        Raises:
            OSError: See `tried`.
        """
        import obstore  # noqa: PLC0415 - an optional package

        parts = [keys[first : first + _DELETE_ROWS] for first in range(0, len(keys), _DELETE_ROWS)]
        with ThreadPoolExecutor(_DELETE_REQUESTS) as threads:
            for _ in threads.map(
                lambda part: self.tried("delete", part[0], lambda: obstore.delete(self.s3_bulk, part)), parts
            ):
                pass

    def check(self, location: S3Location) -> None:
        """See that objects below a place can be listed, written and deleted; a server that is not there fails soon.

        Raises:
            OSError: They cannot.
        """
        import obstore  # noqa: PLC0415 - an optional package

        # The name of an object, so that one that is left behind by a crash is cleared with the others.
        key = (location / secrets.token_hex(KEY_BYTES)).prefix

        def probe() -> None:
            next(obstore.list(self.s3, key), ())
            obstore.put(self.s3, key, b"probe", use_multipart=False)
            obstore.delete(self.s3, key)

        self.tried("the probe", key, probe, patient=False)


def note_retries(error: OSError, retries: int) -> None:
    """Note in an error, as its attribute `retries`, how often the operation that it ended was tried beyond the first.

    An attribute, and no class: the system's number chooses the class of an `OSError`.
    """
    error.retries = retries  # type: ignore[attr-defined]


def request_limit_s(limit_s: float) -> float:
    """How long one request may take of an operation that may take `limit_s`."""
    return limit_s * _REQUEST_SHARE


def connect(bucket: str, limit_s: float = LIMIT_S) -> ObjectClient:
    """A client of a bucket, with the endpoint and the credentials of the environment. Asks nothing yet.

    Raises:
        ConfigurationError: The package is missing, or the environment lacks something.
    """
    access = access_from_environment(os.environ)
    try:
        from obstore.exceptions import BaseError  # noqa: PLC0415 - an optional package
        from obstore.store import S3Store  # noqa: PLC0415 - likewise
    except ImportError as error:
        raise ConfigurationError(
            f"s3://{bucket} needs the package obstore ({error}); install it with: pip install 'mlpstorage[object]'"
        ) from error
    config: S3Config = {
        "access_key_id": access.access_key_id,
        "secret_access_key": access.secret_access_key,
        "region": access.region,
        "endpoint": access.endpoint,
        # Else the client hashes all it writes, with SHA-256; the proof of what was read is `storage.payload`'s.
        "unsigned_payload": True,
    }
    if access.session_token is not None:
        config["session_token"] = access.session_token
    client_options: ClientConfig = {
        "allow_http": access.endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=min(_CONNECT_LIMIT_S, request_limit_s(limit_s))),
        "timeout": timedelta(seconds=request_limit_s(limit_s)),
    }
    retry_config: RetryConfig = {"max_retries": 0}
    one_by_one: S3Config = {"disable_bulk_delete": True}
    return ObjectClient(
        bucket=bucket,
        endpoint=access.endpoint,
        limit_s=limit_s,
        s3=S3Store(bucket, config=config | one_by_one, client_options=client_options, retry_config=retry_config),
        s3_bulk=S3Store(bucket, config=config, client_options=client_options, retry_config=retry_config),
        library_errors=(BaseError, FileNotFoundError),
    )


@contextlib.contextmanager
def told(location: S3Location, otherwise: type[MLPStorageError] = ConfigurationError) -> Iterator[None]:
    """Turn what goes wrong with a place into the user's errors: an access error, or else the one that is given."""
    try:
        yield
    except OSError as error:
        kind = AccessError if isinstance(error, PermissionError) else otherwise
        raise kind(f"{location}: {error.strerror}") from error
