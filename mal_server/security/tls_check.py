"""Checks the server's TLS files by a handshake in memory. Opens no port.

The health probe runs these checks before it connects, because gRPC reports a refused certificate only as UNAVAILABLE.
The server's certificate itself is the trust anchor, so its authority need not be known on this machine.
"""

import ssl
from pathlib import Path

from mal_server.security.tls import explain, load_key_pair, server_context
from mal_train.core.errors import ConfigError


def verify_handshake(certificate: Path, key: Path, name: str) -> None:
    """Checks that a client which trusts the certificate and expects `name` (a host or an IP address) accepts it today.

    Raises:
        ConfigError: the files are unusable, the certificate is not valid now, or it is not valid for `name`.
    """
    try:
        _handshake(server_context(certificate, key, None), _client_context(certificate, check_name=True), name)
    except ssl.SSLError as error:
        raise ConfigError(
            f"listen.tls_certificate: {certificate}: refused for the name {name!r}: {explain(error)}; set "
            "listen.tls_probe_name (or --tls-name) to a name in the certificate, or renew it"
        ) from None


def verify_client_certificate(
    certificate: Path, key: Path, client_ca: Path, client_certificate: Path, client_key: Path
) -> None:
    """Checks that the server accepts a client's certificate. ConfigError if it does not, or if a file is unusable."""
    client = _client_context(certificate, check_name=False)
    load_key_pair(client, client_certificate, client_key, "client certificate")
    try:
        _handshake(server_context(certificate, key, client_ca), client, None)
    except ssl.SSLError as error:
        setting = "listen.tls_certificate" if client_certificate == certificate else "listen.tls_probe_certificate"
        raise ConfigError(
            f"{setting}: {client_certificate}: not a client certificate of listen.tls_client_ca {client_ca}: "
            f"{explain(error)}; set listen.tls_probe_certificate (or --client-cert) to a client certificate of that "
            "authority"
        ) from None


def _client_context(certificate: Path, *, check_name: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = check_name
    context.load_verify_locations(certificate)
    # A leaf certificate may end the chain.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> None:
    """Runs a handshake to its end; raises SSLError if either side refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    pending = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while pending:
        side = pending.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pending.append(side)
