"""From PEM files to gRPC's server credentials, with an error that says what is wrong. Opens no port.

gRPC itself says nothing more than "cannot bind" about a bad certificate, so Python's own TLS library reads the files
first.
"""

import ssl
from pathlib import Path

import grpc

from mal_server.config import Listen
from mal_train.errors import ConfigError


def server_credentials(listen: Listen) -> grpc.ServerCredentials | None:
    """Credentials of the configured certificate; None without one (plaintext). Clients' certificates as `Listen` says.

    Raises:
        ConfigError: a file is missing or no PEM, or the key does not belong to the certificate.
    """
    if listen.tls_certificate is None or listen.tls_key is None:
        return None
    certificate = _read(listen.tls_certificate, "listen.tls_certificate")
    key = _read(listen.tls_key, "listen.tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal; gRPC takes no encrypted keys anyhow.
        context.load_cert_chain(listen.tls_certificate, listen.tls_key, password=lambda: b"encrypted keys do not work")
    except ssl.SSLError as error:
        raise ConfigError(
            f"listen.tls_certificate, listen.tls_key: {listen.tls_certificate} and {listen.tls_key} are no PEM "
            f"certificate with its unencrypted private key ({error.reason or error})"
        ) from None
    if listen.tls_client_ca is None:
        return grpc.ssl_server_credentials([(key, certificate)])
    authority = _read(listen.tls_client_ca, "listen.tls_client_ca")
    try:
        context.load_verify_locations(listen.tls_client_ca)
    except ssl.SSLError as error:
        raise ConfigError(
            f"listen.tls_client_ca: {listen.tls_client_ca} holds no PEM certificate ({error.reason or error})"
        ) from None
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=authority, require_client_auth=True)


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error.strerror}") from None
