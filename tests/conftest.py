"""What tests of every folder share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.swift import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3Server"]:
    """A real S3 server on loopback, one for all tests; skips where it cannot be had.

    A test that stops or suspends it does so in a `with` block, so that the next one finds it running.
    """
    from tests.swift import UnavailableError, running  # noqa: PLC0415 - most runs of tests need no server

    try:
        with tempfile.TemporaryDirectory(prefix="mlpstorage-s3-") as directory, running(Path(directory)) as server:
            yield server
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def s3_bucket(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket on that server, which the environment tells of."""
    for name in ("AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()
