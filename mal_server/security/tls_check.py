"""A handshake of the server's own TLS files with themselves, in memory: what a probe on the same machine may rely on.

It tells the name that the certificate bears, and whether clients with a given certificate are let in. The certificate
itself is what is trusted: its authority need not be known here. Opens no port.
"""

import ipaddress
import ssl
from pathlib import Path
from typing import Any

from mal_server.security.tls import explain, server_context
from mal_train.core.errors import ConfigError


def verify_handshake(certificate: Path, key: Path) -> str:
    """The first name in the certificate, as a client would have to call the server: a host's, else an address.

    Raises:
        ConfigError: the files cannot be used, no client could accept them today, or they hold no name.
    """
    try:
        shown = _handshake(server_context(certificate, key, None), _trusting(certificate))
    except ssl.SSLError as error:
        raise ConfigError(f"listen.tls_certificate: no client accepts {certificate}: {_told(error)}") from None
    names: dict[str, str] = {}
    for kind, name in shown.get("subjectAltName", ()):
        names.setdefault(kind, name)
    if "DNS" in names:
        # Of *.example.org any name will do.
        return names["DNS"].replace("*", "mal-server", 1)
    if "IP Address" in names:
        # gRPC compares text, and has the short form of IPv6.
        return ipaddress.ip_address(names["IP Address"].strip()).compressed
    raise ConfigError(f"listen.tls_certificate: {certificate} names no host (subjectAltName), so no client accepts it")


def check_shown(certificate: Path, key: Path, client_ca: Path, shown: Path, shown_key: Path) -> None:
    """Raises ConfigError where the server would not let a client with the certificate `shown` in."""
    client = _trusting(certificate)
    try:
        client.load_cert_chain(shown, shown_key, password=lambda: b"encrypted keys do not work")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{shown}, {shown_key}: no PEM certificate with its unencrypted private key ({explain(error)})"
        ) from None
    try:
        _handshake(server_context(certificate, key, client_ca), client)
    except ssl.SSLError as error:
        own = "the server's own certificate " if shown == certificate else ""
        raise ConfigError(
            f"{own}{shown} does not count as a client's before listen.tls_client_ca {client_ca}: {_told(error)}; give "
            "listen.tls_probe_certificate (or --client-cert) one that a client would show"
        ) from None


def _trusting(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the name is what is asked for
    context.load_verify_locations(certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """The server's certificate as the client sees it. Raises SSLError where either side refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server)
    waiting = [near, server.wrap_bio(to_server, to_client, server_side=True)]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)
    return near.getpeercert() or {}


def _told(error: ssl.SSLError) -> str:
    return error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else explain(error)
