"""Which hosts are reached from this machine alone: one rule for where the server listens and where clients call."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is reached from this machine alone.

    >>> is_loopback("::1"), is_loopback("127.9.9.9"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
