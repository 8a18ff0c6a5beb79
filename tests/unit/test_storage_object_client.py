"""Requests to S3: what the environment tells, what an error tells, and which requests are tried again."""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import obstore
import pytest

from mlpstorage.errors import AccessError, ConfigurationError
from mlpstorage.storage.location import S3Location
from mlpstorage.storage.object_client import access_from_environment, cause_of, connect, told

if TYPE_CHECKING:
    from tests.swift import S3Server

KEYS: Mapping[str, str] = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "s3cr3t"}


def test_endpoint_and_region_of_the_environment() -> None:
    """The variable for S3 alone comes before the general one; an empty variable counts as none."""
    environment = {
        **KEYS,
        "AWS_ENDPOINT_URL": "http://general:1",
        "AWS_ENDPOINT_URL_S3": "https://storage:9000/",
        "AWS_REGION": "",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_SESSION_TOKEN": "t0ken",
    }
    access = access_from_environment(environment)
    assert (access.endpoint, access.region, access.session_token) == ("https://storage:9000", "eu-central-1", "t0ken")
    assert access_from_environment({**environment, "AWS_ENDPOINT_URL_S3": ""}).endpoint == "http://general:1"


def test_defaults_of_endpoint_and_region() -> None:
    """A region alone means Amazon's server there; an endpoint alone means the region that most servers expect."""
    assert access_from_environment({**KEYS, "AWS_REGION": "eu-west-3"}).endpoint == "https://s3.eu-west-3.amazonaws.com"
    assert access_from_environment({**KEYS, "AWS_ENDPOINT_URL": "http://a:1"}).region == "us-east-1"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (KEYS, "AWS_ENDPOINT_URL"),
        ({"AWS_REGION": "x", "AWS_SECRET_ACCESS_KEY": "s3cr3t"}, "AWS_ACCESS_KEY_ID is not set"),
        ({"AWS_REGION": "x", "AWS_ACCESS_KEY_ID": "me"}, "AWS_SECRET_ACCESS_KEY is not set"),
        ({**KEYS, "AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "'127.0.0.1:9000'"),
        ({**KEYS, "AWS_ENDPOINT_URL": "ftp://a"}, "'ftp://a'"),
        ({**KEYS, "AWS_ENDPOINT_URL": "http://me:s3cr3t@a:1"}, "credentials"),
    ],
)
def test_what_the_environment_lacks_is_named(environment: Mapping[str, str], named: str) -> None:
    """A variable that is missing or wrong is told by name before anything is asked, without the secret."""
    with pytest.raises(ConfigurationError, match="AWS_") as told_error:
        access_from_environment(environment)
    assert named in str(told_error.value)
    assert "s3cr3t" not in str(told_error.value)


def test_secrets_are_in_no_representation() -> None:
    """What is logged or shown of the access holds neither the secret key nor the token."""
    access = access_from_environment({**KEYS, "AWS_REGION": "x", "AWS_SESSION_TOKEN": "t0ken"})
    assert "me" in repr(access)
    assert "s3cr3t" not in repr(access)
    assert "t0ken" not in repr(access)


def test_missing_package_says_how_to_install_it(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without obstore the command that installs it is told."""
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'mlpstorage\[object\]'"):
        connect(s3_bucket)


def test_refused_credentials_are_not_tried_again(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong secret ends the first try, and the message names neither it nor what was signed."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-s3cr3t")
    client = connect(s3_bucket)
    with pytest.raises(PermissionError, match="one try") as refused:
        client.tried("put", "kv/x", lambda: obstore.put(client.s3, "kv/x", b"1"))
    assert refused.value.filename == f"s3://{s3_bucket}/kv/x"
    message = str(refused.value)
    assert os.environ["AWS_ENDPOINT_URL"] in message
    assert "SignatureDoesNotMatch" in message
    assert "wr0ng-s3cr3t" not in message
    assert "AWS4-HMAC-SHA256" not in message


@pytest.mark.parametrize("what", ["list", "put", "get", "delete"])
def test_a_missing_bucket_is_no_missing_object(s3_bucket: str, what: str) -> None:
    """The bucket's absence ends the first try, and is told as such."""
    client = connect(f"{s3_bucket}-not")
    requests = {
        "list": lambda: next(obstore.list(client.s3, "kv")),
        "put": lambda: obstore.put(client.s3, "kv/x", b"1"),
        "get": lambda: obstore.get(client.s3, "kv/x"),
        "delete": lambda: obstore.delete(client.s3, "kv/x"),
    }
    with pytest.raises(OSError, match=r"one try.*NoSuchBucket") as failed:
        client.tried(what, "kv/x", requests[what])
    assert not isinstance(failed.value, FileNotFoundError)


def test_an_answer_of_overload_is_tried_again(s3_server: "S3Server", s3_bucket: str) -> None:
    """While the server behind the proxy is away the proxy answers 503: tried again, and counted in the message."""
    client = connect(s3_bucket, limit_s=4.0)
    with (
        s3_server.stopped("object"),
        pytest.raises(OSError, match=r"put failed after \d+ tries in .*HTTP 503") as failed,
    ):
        client.tried("put", "kv/x", lambda: obstore.put(client.s3, "kv/x", b"1"), retries=10)
    tries = int(str(failed.value).partition("after ")[2].partition(" ")[0])
    assert getattr(failed.value, "retries", None) == 10 + tries - 1
    assert client.tried("put", "kv/x", lambda: obstore.put(client.s3, "kv/x", b"1"))[0]["e_tag"]


def test_other_errors_are_not_tried_again(s3_bucket: str) -> None:
    """What the caller's own code raises passes through, the first time."""
    client = connect(s3_bucket)
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise OSError(5, "mine")

    with pytest.raises(OSError, match="mine") as failed:
        client.tried("get", "kv/x", fails)
    assert getattr(failed.value, "retries", None) == 0
    assert calls == [1]


def test_listing_goes_over_many_pages(s3_server: "S3Server", s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every object below the prefix is listed once, and none beside it."""
    monkeypatch.setattr("mlpstorage.storage.object_client._LIST_ROWS", 2)
    expected = {f"kv/{number}" for number in range(5)}
    for key in (*expected, "kv-other/1", "k"):
        s3_server.raw.put(s3_bucket, key, b"1")
    pages = list(connect(s3_bucket).pages("kv"))
    assert [len(page) for page in pages] == [2, 2, 1]
    assert {entry["path"] for page in pages for entry in page} == expected


def test_many_objects_are_deleted_in_parts(
    s3_server: "S3Server", s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are named are deleted, however many requests it takes, and nothing else."""
    monkeypatch.setattr("mlpstorage.storage.object_client._DELETE_ROWS", 3)
    keys = [f"kv/{number}" for number in range(10)]
    for key in keys:
        s3_server.raw.put(s3_bucket, key, b"1")
    connect(s3_bucket).delete_all(keys[:-1])
    assert s3_server.raw.sizes(s3_bucket) == {"kv/9": 1}


def test_check_leaves_nothing(s3_server: "S3Server", s3_bucket: str) -> None:
    """The probe of a place that can be used is gone afterwards."""
    connect(s3_bucket).check(S3Location(s3_bucket, "kv"))
    assert s3_server.raw.sizes(s3_bucket) == {}


def test_check_of_no_server_is_soon_over(s3_server: "S3Server", s3_bucket: str) -> None:
    """An address where nobody answers is given up after two tries: it is more often wrong than late."""
    client = connect(s3_bucket)
    with (
        s3_server.stopped(),
        pytest.raises(OSError, match=f"2 tries in .* at {s3_server.endpoint}: Connection refused"),
    ):
        client.check(S3Location(s3_bucket, "kv"))


def test_an_error_without_an_answer_is_one_line() -> None:
    """Of a text that cannot be taken apart the first line is told."""
    cause = cause_of(ValueError("something new\nwith more below\n\nDebug source:\nGeneric {}"))
    assert (cause.status, cause.text, cause.passing) == (None, "something new", True)


def test_users_are_told_of_places() -> None:
    """A refusal is an access error, all else a matter of configuration; both begin with the place."""
    location = S3Location("cache", "kv")
    with pytest.raises(AccessError, match=r"^s3://cache/kv: put failed$"), told(location):
        raise PermissionError(13, "put failed", "s3://cache/kv/x")
    with pytest.raises(ConfigurationError, match=r"^s3://cache/kv: list failed$"), told(location):
        raise OSError(5, "list failed", "s3://cache/kv/x")
