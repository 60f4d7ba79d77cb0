"""Builds gRPC server credentials from PEM files and reloads renewed ones. Opens no port.

gRPC reports a bad certificate only as a port that it cannot bind, so Python's TLS library checks the files first. The
files are checked for changes at every new connection, so a renewed certificate needs no restart. An unusable one is
logged, and the previous certificate stays in force.
"""

import logging
import os
import ssl
from pathlib import Path

import grpc

from mal_server.config.listen import Listen
from mal_train.core.errors import ConfigError
from mal_train.core.pem import read_pem

log = logging.getLogger(__name__)

FileStamp = tuple[tuple[int, int, int], ...]
"""Inode, size and modification time in ns of each file; differs after a file was replaced or written."""


def server_credentials(listen: Listen) -> grpc.ServerCredentials | None:
    """Returns the credentials of the configured certificate, or None for plaintext.

    With `listen.tls_client_ca`, clients must present a certificate.

    Raises:
        ConfigError: a file is missing or not PEM, or the key does not belong to the certificate.
    """
    if listen.tls_certificate is None or listen.tls_key is None:
        return None
    reloader = CertificateReloader(listen, listen.tls_certificate, listen.tls_key)
    return grpc.dynamic_ssl_server_credentials(
        reloader.initial,
        reloader.reload_if_changed,  # type: ignore[arg-type]  # may return None, says gRPC's documentation
        require_client_authentication=listen.tls_client_ca is not None,
    )


class CertificateReloader:
    """Certificate, key and client authorities of a server, read again when their files change.

    Args:
        listen: names the files.
        certificate: certificate file of `listen`.
        key: private key file of `listen`.

    Attributes:
        initial: the configuration that the server starts with.

    Raises:
        ConfigError: see `server_credentials`.
    """

    def __init__(self, listen: Listen, certificate: Path, key: Path) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, listen.tls_client_ca
        self._stamp = self._current_stamp()
        self.initial = self._read()

    def reload_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns the new configuration, or None to keep the previous one.

        gRPC calls it from its own threads, once for each connection.
        """
        stamp = self._current_stamp()
        if stamp == self._stamp:
            return None
        # Stored even if the files are unusable, for example half written: each change is logged once.
        self._stamp = stamp
        try:
            configuration = self._read()
        except ConfigError as error:
            log.error("certificate not renewed, the previous one stays in force: %s", error)
            return None
        log.info("certificate renewed from %s", self._certificate)
        return configuration

    def _current_stamp(self) -> FileStamp:
        stamps = []
        for path in filter(None, (self._certificate, self._key, self._client_ca)):
            try:
                status = os.stat(path)
            except OSError:
                stamps.append((0, 0, 0))
            else:
                stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(stamps)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate = read_pem(self._certificate, "listen.tls_certificate", "certificate")
        key = read_pem(self._key, "listen.tls_key", "private key")
        client_ca = None
        if self._client_ca is not None:
            client_ca = read_pem(self._client_ca, "listen.tls_client_ca", "certificate")
        server_context(self._certificate, self._key, self._client_ca)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)


def server_context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """Returns a context of Python's TLS library for the same files; with `client_ca` it requires client certificates.

    Raises:
        ConfigError: a file is not PEM, or the key is encrypted or does not belong to the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_key_pair(context, certificate, key, "listen.tls_certificate, listen.tls_key")
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"listen.tls_client_ca: {client_ca}: no PEM certificate ({explain(error)})") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def load_key_pair(context: ssl.SSLContext, certificate: Path, key: Path, name: str) -> None:
    """Loads a certificate and its key into a context. ConfigError, which begins with `name`, if they do not match."""
    try:
        # Without a password callback, OpenSSL would prompt on the terminal. gRPC accepts no encrypted keys.
        context.load_cert_chain(certificate, key, password=lambda: b"encrypted keys are refused")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{name}: {certificate} and {key} are not a PEM certificate and its unencrypted private key "
            f"({explain(error)})"
        ) from None


def explain(error: OSError) -> str:
    """Returns the reason of a TLS or file error, without its position in OpenSSL's source.

    >>> explain(FileNotFoundError(2, "No such file or directory"))
    'No such file or directory'
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return str(reason or error)
