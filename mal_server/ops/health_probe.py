"""`mal-server health`: asks a running server how it is, for supervisors and containers without another tool."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mal_server.config.listen import Listen
from mal_server.security.tls_check import check_shown, verify_handshake
from mal_train.core.errors import ConfigError

PORTS = range(1, 65536)

SERVICE = "mal.v1.LabelingService"

HUNG_UP = ("Socket closed", "Connection reset", "Broken pipe")
"""How gRPC says that the other end took the connection and closed it."""

EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses to listen on that nobody can call → the one of this machine."""


@dataclass(frozen=True)
class HealthProbe:
    """A question to a server.

    Attributes:
        address: HOST:PORT.
        service: full name, for example mal.v1.LabelingService; empty = the whole server.
        timeout_s: how long to wait for the answer.
        tls_ca: PEM file of the authority to trust; None = plaintext.
        tls_name: name in the server's certificate, where it is not the address's host.
        client_cert: PEM file with the certificate to show.
        client_key: PEM file of its private key; None = in the same file.
    """

    address: str
    service: str = ""
    timeout_s: float = 5.0
    tls_ca: Path | None = None
    tls_name: str | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    def ask(self) -> str:
        """SERVING or NOT_SERVING as the server says; SERVICE_UNKNOWN or UNREACHABLE with why, and the remedy.

        Raises:
            ConfigError: an address without a port, or a file that cannot be read.
        """
        _check_address(self.address)
        with self._channel() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=self.service), timeout=self.timeout_s)
            except grpc.RpcError as error:
                call: Any = error
                if call.code() is grpc.StatusCode.NOT_FOUND:
                    return self._unknown()
                return f"UNREACHABLE ({call.code().name}: {call.details()}){self._hint(call)}"
        if answer.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            return self._unknown()
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def _unknown(self) -> str:
        """A model that was unloaded is answered so, too."""
        return (
            f"SERVICE_UNKNOWN (--service {self.service}: the server has none of that name; leave --service out to ask "
            f"about all of it, or name {SERVICE}, or {SERVICE}/MODEL with a model of `mal-client models list`)"
        )

    def _hint(self, call: Any) -> str:
        """A server with TLS takes a plaintext connection and closes it: nothing else says that it is there."""
        is_hung_up = call.code() is grpc.StatusCode.UNAVAILABLE and any(words in call.details() for words in HUNG_UP)
        if self.tls_ca is not None or not is_hung_up:
            return ""
        return (
            "; somebody listens there and closes the connection, as a server with TLS does: give --tls-ca CA.pem, or "
            "-c FILE with the server's settings"
        )

    def _channel(self) -> grpc.Channel:
        if self.client_key is not None and self.client_cert is None:
            raise ConfigError("--client-key: give the certificate, too (--client-cert)")
        if self.tls_ca is None:
            if self.client_cert is not None or self.tls_name is not None:
                raise ConfigError("--client-cert, --tls-name: they need --tls-ca; without it nothing is encrypted")
            return grpc.insecure_channel(self.address)
        shown = None if self.client_cert is None else _read(self.client_cert)
        key = shown if self.client_key is None else _read(self.client_key)
        credentials = grpc.ssl_channel_credentials(_read(self.tls_ca), key, shown)
        options = [] if self.tls_name is None else [("grpc.ssl_target_name_override", self.tls_name)]
        return grpc.secure_channel(self.address, credentials, options=options)


def _check_address(address: str) -> None:
    """Where no port is given gRPC would take 443, and one that is too large modulo 65536."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or (host and port.isdecimal() and int(port) in PORTS):
        return
    raise ConfigError(f"health: {address!r}; HOST:PORT is needed, for example 127.0.0.1:50051")


def probe_of(listen: Listen, given: HealthProbe) -> HealthProbe:
    """A question to the server that listens so. What is given wins: its address, where it is not empty, and its papers.

    The server's own certificate is trusted as it lies there, under the name that it bears. Where the server asks for a
    client's, `listen.tls_probe_certificate` is shown, or the server's own.

    Raises:
        ConfigError: `listen.port` is 0 and no address is given, or a file cannot be used for what it is there for.
    """
    found = replace(given, address=given.address or _own_address(listen))
    if listen.tls_certificate is None or listen.tls_key is None:
        return found
    if found.tls_ca is None:
        name = verify_handshake(listen.tls_certificate, listen.tls_key)
        found = replace(found, tls_ca=listen.tls_certificate, tls_name=found.tls_name or name)
    if listen.tls_client_ca is None or found.client_cert is not None:
        return found
    shown, key = listen.tls_probe_certificate, listen.tls_probe_certificate
    if shown is None or key is None:
        shown, key = listen.tls_certificate, listen.tls_key
    check_shown(listen.tls_certificate, listen.tls_key, listen.tls_client_ca, shown, key)
    return replace(found, client_cert=shown, client_key=key)


def _own_address(listen: Listen) -> str:
    if listen.port == 0:
        raise ConfigError("listen.port: 0 takes a free port, which these settings do not tell; give HOST:PORT, too")
    host = EVERY_INTERFACE.get(listen.host, listen.host)
    return f"[{host}]:{listen.port}" if ":" in host else f"{host}:{listen.port}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
