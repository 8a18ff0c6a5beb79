"""The value of `--hosts`: names, ranges, slots and addresses, read in one place and in one way."""

import ipaddress
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlpstorage.errors import UsageError

MAX_HOSTS = 100_000
"""Most hosts that one `--hosts` may name; a longer range is a typing error."""

ACCEPTED_FORMS = "a b | a,b | h[1-4] | h[01-16] | h[1,3-5]x | h1:4 (slots) | 10.0.0.1 | fe80::1 | [fe80::1]:4"

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_NUMERIC_NAME = re.compile(r"[0-9.]+")
_ZONE = re.compile(r"[A-Za-z0-9_.-]+")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_SLOTS = re.compile(r"[0-9]{1,9}")
_SEPARATORS = re.compile(r"\s*,\s*|\s+")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_MAX_NAME_CHARS = 253
"""Longest DNS name (RFC 1035, without the final dot)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that runs ranks; `slots` is how many it may run, None where the user left that open.

    An IPv6 address stands in `name` without brackets.
    """

    name: str
    slots: int | None


def parse_hosts(values: Sequence[str]) -> tuple[Host, ...]:
    """Read the values of `--hosts` in the order given.

    A name that comes twice without slots is read as in a node file: each mention of a name is then one slot, for all
    names of the list that have none (`a a b` is `a:2 b:1`). A repeated name that has slots is refused, because the two
    numbers could be meant as a sum or as a correction.

    Raises:
        UsageError: An empty name, a broken or huge range, fewer slots than one, characters that no host name or
            address has, or a repeated host with slots.
    """
    hosts: list[Host] = []
    for token in _tokens(values):
        hosts.extend(_hosts_of(token))
        if len(hosts) > MAX_HOSTS:
            raise _usage_error(token, f"more than {MAX_HOSTS} hosts")
    return _merge_repeated(hosts)


def _usage_error(token: str, problem: str) -> UsageError:
    return UsageError(f"--hosts {token!r}: {problem}; accepted: {ACCEPTED_FORMS}")


def _tokens(values: Sequence[str]) -> Iterator[str]:
    """Cut at commas and blanks, but not inside brackets."""
    if not values:
        raise _usage_error("", "no host given")
    for value in values:
        if not value.strip():
            raise _usage_error(value, "empty name")
    # Joined before the cut, so that `--hosts a, b` and `--hosts "a, b"` are the same.
    text = " ".join(values).strip()
    closed = _BRACKETS.sub(lambda match: "x" * len(match.group()), text)
    start = 0
    for separator in itertools.chain(_SEPARATORS.finditer(closed), (None,)):
        end = len(text) if separator is None else separator.start()
        if end == start:
            raise _usage_error(text, "empty name")
        yield text[start:end]
        start = end if separator is None else separator.end()


def _hosts_of(token: str) -> Iterator[Host]:
    """Hosts of one word: an address, or a name whose ranges are expanded."""
    body, slots = _split_slots(token)
    if ":" in body:
        yield Host(name=_checked_ipv6(token, body), slots=slots)
        return
    for name in _expand(token, body):
        yield Host(name=_checked_name(token, name), slots=slots)


def _split_slots(token: str) -> tuple[str, int | None]:
    """Take `:slots` off; what comes back holds a colon only where it is an IPv6 address, without its brackets."""
    bracketed = re.fullmatch(r"\[([^\[\]]*:[^\[\]]*)\](?::(.*))?", token)
    if bracketed:
        return bracketed[1], None if bracketed[2] is None else _slots(token, bracketed[2])
    # Two colons and more: an address without brackets has no room for slots.
    if token.count(":") != 1:
        return token, None
    body, _, slots = token.partition(":")
    return body, _slots(token, slots)


def _slots(token: str, text: str) -> int:
    if not _SLOTS.fullmatch(text) or int(text) < 1:
        raise _usage_error(token, f"slots must be a whole number from 1, not {text!r}")
    return int(text)


def _expand(token: str, body: str) -> Iterator[str]:
    """Names that `body` stands for: every bracket is a list of numbers and ranges, padded as its lower end is."""
    parts = _BRACKETS.split(body)
    if any("[" in part or "]" in part for part in parts[::2]):
        raise _usage_error(token, "brackets do not match")
    # re.split puts what the brackets hold at odd places.
    choices: list[Sequence[str]] = []
    count = 1
    for place, part in enumerate(parts):
        numbers = _numbers(token, part) if place % 2 else [part]
        count *= len(numbers)
        if count > MAX_HOSTS:
            raise _usage_error(token, f"more than {MAX_HOSTS} hosts")
        choices.append(numbers)
    return map("".join, itertools.product(*choices))


def _numbers(token: str, text: str) -> list[str]:
    numbers: list[str] = []
    for piece in text.split(","):
        match = _RANGE.fullmatch(piece.strip())
        if match is None:
            raise _usage_error(token, f"bad range [{text}]")
        first, last = match[1], match[2] or match[1]
        low, high = int(first), int(last)
        if high < low:
            raise _usage_error(token, f"range {piece.strip()} runs backwards")
        if len(numbers) + high - low + 1 > MAX_HOSTS:
            raise _usage_error(token, f"more than {MAX_HOSTS} hosts")
        numbers.extend(f"{number:0{len(first)}d}" for number in range(low, high + 1))
    return numbers


def _checked_name(token: str, name: str) -> str:
    """`name`, if a host can have it; a leading '-' would be an option for mpirun."""
    if not name:
        raise _usage_error(token, "empty name")
    if len(name) > _MAX_NAME_CHARS or ".." in name or not _NAME.fullmatch(name):
        raise _usage_error(token, f"{name!r} is no host name or address")
    if _NUMERIC_NAME.fullmatch(name):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise _usage_error(token, f"{name!r} is no IPv4 address") from None
    return name


def _checked_ipv6(token: str, text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise _usage_error(token, f"{text!r} is no IPv6 address") from None
    if address.scope_id is not None and not _ZONE.fullmatch(address.scope_id):
        raise _usage_error(token, f"{text!r} has a zone that no interface can have")
    return text


def _identity(name: str) -> str:
    """The same for two spellings of one host: case and the forms of an IPv6 address do not matter."""
    return str(ipaddress.IPv6Address(name)) if ":" in name else name.lower()


def _merge_repeated(hosts: Sequence[Host]) -> tuple[Host, ...]:
    mentions: dict[str, list[Host]] = {}
    for host in hosts:
        mentions.setdefault(_identity(host.name), []).append(host)
    if len(mentions) == len(hosts):
        return tuple(hosts)
    merged: list[Host] = []
    for same in mentions.values():
        first = same[0]
        if len(same) > 1 and any(host.slots is not None for host in same):
            raise _usage_error(first.name, "named more than once, with slots; name it once, with all its slots")
        merged.append(first if first.slots is not None else Host(name=first.name, slots=len(same)))
    return tuple(merged)
