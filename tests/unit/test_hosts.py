"""`--hosts`: what is accepted, and what is refused with words that help."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpstorage.errors import UsageError
from mlpstorage.spec.hosts import MAX_HOSTS, Host, parse_hosts


def names(*values: str) -> list[str]:
    """Only the names, for tests in which no slots are given."""
    hosts = parse_hosts(values)
    assert all(host.slots is None for host in hosts)
    return [host.name for host in hosts]


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b", "c"],
        ["a,b,c"],
        ["a,b", "c"],
        ["a b c"],
        [" a ,  b", " c "],
        ["a,", "b ,c"],
        ["a", ",b,c"],
    ],
)
def test_separators_mean_the_same(values: list[str]) -> None:
    """Commas, blanks and separate words give one list, in the order written."""
    assert names(*values) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("h[1-4]", ["h1", "h2", "h3", "h4"]),
        ("h[01-03]", ["h01", "h02", "h03"]),
        ("h[08-11]", ["h08", "h09", "h10", "h11"]),
        ("h[9-10]", ["h9", "h10"]),
        ("h[1,3-5]x", ["h1x", "h3x", "h4x", "h5x"]),
        ("h[1, 3-4]", ["h1", "h3", "h4"]),
        ("h[7]", ["h7"]),
        ("rack[1-2]-n[1-2].lab", ["rack1-n1.lab", "rack1-n2.lab", "rack2-n1.lab", "rack2-n2.lab"]),
        ("10.0.0.[9-11]", ["10.0.0.9", "10.0.0.10", "10.0.0.11"]),
        ("a,h[1-2],b", ["a", "h1", "h2", "b"]),
        ("[1-2]h", ["1h", "2h"]),
    ],
)
def test_ranges_expand_with_their_padding(value: str, expected: list[str]) -> None:
    """A bracket lists numbers and ranges; zeros of the lower end are kept."""
    assert names(value) == expected


@given(low=st.integers(0, 2000), extra=st.integers(0, 300), width=st.integers(1, 6))
def test_a_range_holds_every_number_once(low: int, extra: int, width: int) -> None:
    """`h[low-high]` names high - low + 1 hosts, equal to numbers formatted one by one."""
    expected = ["h" + str(number).zfill(max(width, len(str(low)))) for number in range(low, low + extra + 1)]
    assert names(f"h[{str(low).zfill(width)}-{low + extra}]") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("h1:4", [("h1", 4)]),
        ("h1:4,h2", [("h1", 4), ("h2", None)]),
        ("h[1-2]:8", [("h1", 8), ("h2", 8)]),
        ("127.0.0.1:2", [("127.0.0.1", 2)]),
        ("::1", [("::1", None)]),
        ("[::1]", [("::1", None)]),
        ("[::1]:2", [("::1", 2)]),
        ("fe80::1", [("fe80::1", None)]),
        ("[fe80::1]:4", [("fe80::1", 4)]),
        ("fe80::1%eth0", [("fe80::1%eth0", None)]),
        ("::1:4", [("::1:4", None)]),
        ("[2001:db8::7]:3,h1", [("2001:db8::7", 3), ("h1", None)]),
    ],
)
def test_slots_and_ipv6(value: str, expected: list[tuple[str, int | None]]) -> None:
    """A number behind one colon is slots; an IPv6 address needs brackets to have any."""
    assert [(host.name, host.slots) for host in parse_hosts([value])] == expected


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "empty name"),
        ("  ", "empty name"),
        ("a,,b", "empty name"),
        ("a,", "empty name"),
        (",a", "empty name"),
        (":4", "empty name"),
        ("h[4-1]", "backwards"),
        ("h[]", "bad range"),
        ("h[a-b]", "bad range"),
        ("h[1-]", "bad range"),
        ("h[-3]", "bad range"),
        ("h[1,]", "bad range"),
        ("h[1-2-3]", "bad range"),
        ("h[\N{ARABIC-INDIC DIGIT ONE}-3]", "bad range"),
        ("h[" + "9" * 5000 + "]", "bad range"),
        ("h[1-4", "brackets"),
        ("h1-4]", "brackets"),
        ("h[[1-4]]", "brackets"),
        ("h[1-100001]", "more than 100000 hosts"),
        ("h[1-999999999999]", "more than 100000 hosts"),
        ("h[1-1000]x[1-1000]", "more than 100000 hosts"),
        ("a[1-60000],b[1-60000]", "more than 100000 hosts"),
        ("h1:0", "slots"),
        ("h1:-1", "slots"),
        ("h1:", "slots"),
        ("h1:x", "slots"),
        ("h1:1.5", "slots"),
        ("[::1]:0", "slots"),
        ("-x", "no host name"),
        ("--mca", "no host name"),
        ("a-", "no host name"),
        ("a..b", "no host name"),
        ("a;b", "no host name"),
        ("$(id)", "no host name"),
        ("a/b", "no host name"),
        ("h\N{LATIN SMALL LETTER U WITH DIAERESIS}", "no host name"),
        ("x" * 254, "no host name"),
        ("4", "no IPv4 address"),
        ("10.0.0.256", "no IPv4 address"),
        ("fe80:::1", "no IPv6 address"),
        ("[fe80::1]x", "no IPv6 address"),
        ("1:2:3", "no IPv6 address"),
        ("fe80::1%a;b", "zone"),
    ],
)
def test_refusals_name_the_flag_the_cause_and_the_forms(value: str, problem: str) -> None:
    """What no host can be called is a usage error, in one line."""
    with pytest.raises(UsageError) as caught:
        parse_hosts([value])
    message = str(caught.value)
    assert message.startswith("--hosts ")
    assert problem in message
    assert "accepted: " in message
    assert "h[1-4]" in message
    assert "\n" not in message


def test_an_empty_word_among_others_is_refused() -> None:
    """An unset shell variable does not silently make the list shorter."""
    with pytest.raises(UsageError, match="empty name"):
        parse_hosts(["a", "", "b"])


def test_no_value_is_refused() -> None:
    """An empty list of hosts is a usage error, not an empty cluster."""
    with pytest.raises(UsageError, match=r"--hosts .*no host given"):
        parse_hosts([])


def test_the_longest_range_is_accepted() -> None:
    """The limit itself is allowed."""
    hosts = parse_hosts([f"h[1-{MAX_HOSTS}]"])
    assert (len(hosts), hosts[-1].name) == (MAX_HOSTS, f"h{MAX_HOSTS}")


def test_repeated_names_are_a_node_file() -> None:
    """Where a name repeats, each mention is a slot, for every name without slots of its own."""
    assert parse_hosts(["a", "a", "b", "c:4"]) == (
        Host(name="a", slots=2),
        Host(name="b", slots=1),
        Host(name="c", slots=4),
    )


@pytest.mark.parametrize("value", ["a:2,a:2", "a,a:2", "a:2,A", "[::1]:2,0:0:0:0:0:0:0:1"])
def test_repeated_names_with_slots_are_refused(value: str) -> None:
    """Two numbers for one host could be a sum or a correction, whatever the spelling of the host."""
    with pytest.raises(UsageError, match="more than once"):
        parse_hosts([value])
