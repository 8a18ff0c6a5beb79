"""Whether a host name means this machine, found without DNS and without a packet."""

import ipaddress
import os

_LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})


def is_local(name: str) -> bool:
    """True for loopback names and addresses, this machine's host name, and the addresses of its interfaces.

    An alias that only DNS or /etc/hosts knows is not recognised: asking them could send packets, and a plan must not.
    """
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return _is_own_name(name)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or _is_interface_address(address)


def _is_own_name(name: str) -> bool:
    wanted = name.lower()
    own = os.uname().nodename.lower()
    return wanted in _LOOPBACK_NAMES or (bool(wanted) and wanted in {own, own.partition(".")[0]})


def _is_interface_address(wanted: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    import psutil  # noqa: PLC0415 - needed for addresses only; names, the usual case, start faster without

    for interface in psutil.net_if_addrs().values():
        for entry in interface:
            try:
                address = ipaddress.ip_address(entry.address)
            except ValueError:  # a link-layer address
                continue
            if address == wanted or _without_zone(address) == wanted:
                return True
    return False


def _without_zone(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The system gives link-local addresses with their zone (`fe80::1%eth0`); users often leave it out."""
    return ipaddress.IPv6Address(int(address)) if isinstance(address, ipaddress.IPv6Address) else address
