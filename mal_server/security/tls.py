"""From PEM files to gRPC's server credentials, with an error that says what is wrong. Opens no port.

gRPC itself says nothing more than "cannot bind" about a bad certificate, so Python's own TLS library reads the files
first. The files are looked at again with every new connection, so that a renewed certificate needs no restart; one that
cannot be used is logged, and the one before goes on.
"""

import logging
import os
import ssl
from pathlib import Path

import grpc

from mal_server.config.listen import Listen
from mal_train.core.errors import ConfigError

log = logging.getLogger(__name__)

FileStamp = tuple[tuple[int, int, int], ...]
"""Device-independent signs that a file is another one: inode, size, time of change."""


def server_credentials(listen: Listen) -> grpc.ServerCredentials | None:
    """Credentials of the configured certificate; None without one (plaintext). Clients' certificates as `Listen` says.

    Raises:
        ConfigError: a file is missing or no PEM, or the key does not belong to the certificate.
    """
    if listen.tls_certificate is None or listen.tls_key is None:
        return None
    papers = CertificateReloader(listen, listen.tls_certificate, listen.tls_key)
    return grpc.dynamic_ssl_server_credentials(
        papers.first,
        papers.changed,  # type: ignore[arg-type]  # the stubs do not know of None, gRPC's documentation does
        require_client_authentication=listen.tls_client_ca is not None,
    )


class CertificateReloader:
    """The certificate, key and client authorities as they lie on disk.

    Args:
        listen: names the files.
        certificate: of `listen`.
        key: of `listen`.

    Raises:
        ConfigError: as `server_credentials`.
    """

    def __init__(self, listen: Listen, certificate: Path, key: Path) -> None:
        self._certificate, self._key, self._authority = certificate, key, listen.tls_client_ca
        self._seen = self._stamp()
        self.first = self._read_all()
        """What the server starts with."""

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What counts from now on; None when nothing changed. gRPC calls it from its own threads, once a connection."""
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        # Remembered also when the files cannot be used (one of them may be written already): said once, tried again
        # when they change again.
        self._seen = stamp
        try:
            found = self._read_all()
        except ConfigError as error:
            log.error("certificate not renewed, the one before goes on: %s", error)
            return None
        log.info("certificate renewed from %s", self._certificate)
        return found

    def _stamp(self) -> FileStamp:
        found = []
        for path in filter(None, (self._certificate, self._key, self._authority)):
            try:
                status = os.stat(path)
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _read_all(self) -> grpc.ServerCertificateConfiguration:
        certificate = _read(self._certificate, "listen.tls_certificate")
        key = _read(self._key, "listen.tls_key")
        authority = None if self._authority is None else _read(self._authority, "listen.tls_client_ca")
        server_context(self._certificate, self._key, self._authority)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


def server_context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """The same files for Python's own TLS library; with `client_ca` clients must show a certificate.

    Raises:
        ConfigError: no PEM, or the key does not belong to the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal; gRPC takes no encrypted keys anyhow.
        context.load_cert_chain(certificate, key, password=lambda: b"encrypted keys do not work")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"listen.tls_certificate, listen.tls_key: {certificate} and {key} are no PEM certificate "
            f"with its unencrypted private key ({explain(error)})"
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"listen.tls_client_ca: no PEM certificate in {client_ca} ({explain(error)})") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def explain(error: OSError) -> str:
    """What TLS or the disk says, without where in its source."""
    told = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return str(told or error)


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error.strerror}") from None
