"""Implements `mal-server health`: one health check of a running server, for supervisors and containers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mal_server.config.listen import Listen
from mal_server.security.tls_check import verify_client_certificate, verify_handshake
from mal_train.core.addresses import check_address, format_address, host_of
from mal_train.core.errors import ConfigError
from mal_train.core.pem import read_pem
from mal_train.core.proxies import DIRECT, grpc_options, server_hint

SERVICE = "mal.v1.LabelingService"

HUNG_UP = ("Socket closed", "Connection reset", "Broken pipe")
"""Texts with which gRPC reports a connection that the other end accepted and closed."""

EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that a server can listen on but a client cannot call -> the loopback address of the same family."""


@dataclass(frozen=True)
class HealthProbe:
    """A health check of one server.

    Attributes:
        address: HOST:PORT.
        service: full name, for example mal.v1.LabelingService; empty: the server as a whole.
        timeout_s: deadline of the call.
        tls_ca: PEM file of the trusted authority; None: plaintext.
        tls_name: name that the server's certificate must be valid for; None: the host of `address`.
        client_cert: PEM file of the client certificate (mTLS).
        client_key: PEM file of its private key; None: `client_cert` holds it too.
        use_proxy: connect through the HTTP proxy of the environment, if one applies; none does to this machine.
    """

    address: str
    service: str = ""
    timeout_s: float = 5.0
    tls_ca: Path | None = None
    tls_name: str | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    use_proxy: bool = True

    def check(self) -> str:
        """Returns SERVING, NOT_SERVING, SERVICE_UNKNOWN or UNREACHABLE.

        The last two are followed by the reason in parentheses, and by a remedy if one is known.

        Raises:
            ConfigError: the address has no port, or a file cannot be read.
        """
        check_address(self.address, "health")
        with self._channel() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                response = stub.Check(health_pb2.HealthCheckRequest(service=self.service), timeout=self.timeout_s)
            except grpc.RpcError as error:
                call: Any = error
                if call.code() is grpc.StatusCode.NOT_FOUND:
                    return self._unknown_service()
                return f"UNREACHABLE ({call.code().name}: {call.details()}){self._tls_hint(call)}{self._proxy_hint()}"
        # The server reports this status for an unloaded model.
        if response.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            return self._unknown_service()
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def _unknown_service(self) -> str:
        return (
            f"SERVICE_UNKNOWN (--service {self.service}: the server has no such service; leave --service out to check "
            f"the server as a whole, or give {SERVICE}, or {SERVICE}/MODEL with a model of `mal-client models list`)"
        )

    def _tls_hint(self, call: Any) -> str:
        """Returns the remedy for a plaintext check of a TLS server, which accepts the connection and closes it."""
        is_hung_up = call.code() is grpc.StatusCode.UNAVAILABLE and any(text in call.details() for text in HUNG_UP)
        if self.tls_ca is not None or not is_hung_up:
            return ""
        return (
            "; the server closed the connection, as a TLS server does: give --tls-ca CA.pem, or -c FILE with the "
            "server's settings"
        )

    def _proxy_hint(self) -> str:
        return server_hint(self.address) if self.use_proxy else ""

    def _channel(self) -> grpc.Channel:
        options = list(grpc_options(self.address) if self.use_proxy else DIRECT)
        if self.client_key is not None and self.client_cert is None:
            raise ConfigError(f"--client-key: {self.client_key} without its certificate; give --client-cert too")
        if self.tls_ca is None:
            if self.client_cert is not None or self.tls_name is not None:
                raise ConfigError("--client-cert, --tls-name: used with TLS only; give --tls-ca too")
            return grpc.insecure_channel(self.address, options=options)
        chain = key = None
        if self.client_cert is not None:
            chain = read_pem(self.client_cert, "--client-cert", "certificate")
            key = read_pem(self.client_key or self.client_cert, "--client-key", "private key")
        credentials = grpc.ssl_channel_credentials(read_pem(self.tls_ca, "--tls-ca", "certificate"), key, chain)
        if self.tls_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls_name))
        return grpc.secure_channel(self.address, credentials, options=options)


def probe_of(listen: Listen, options: HealthProbe) -> HealthProbe:
    """Returns a health check of the server with these settings. An address, name or file in `options` takes precedence.

    The probe trusts the server's certificate file itself and verifies that the certificate is valid today for
    `listen.tls_probe_name`, by default for the host that it calls. If the server requires client certificates, the
    probe presents `listen.tls_probe_certificate`, by default the server's own.

    Raises:
        ConfigError: `listen.port` is 0 and `options` has no address, or a TLS file fails its check.
    """
    # Its own server is on this machine, also where `listen.host` is no loopback address.
    probe = options if options.address else replace(options, address=_own_address(listen), use_proxy=False)
    if listen.tls_certificate is None or listen.tls_key is None:
        return probe
    name = options.tls_name or listen.tls_probe_name or _default_name(listen, options.address)
    probe = replace(probe, tls_name=name)
    if probe.tls_ca is None:
        verify_handshake(listen.tls_certificate, listen.tls_key, name)
        probe = replace(probe, tls_ca=listen.tls_certificate)
    if listen.tls_client_ca is None or probe.client_cert is not None:
        return probe
    client_cert, client_key = listen.tls_certificate, listen.tls_key
    if listen.tls_probe_certificate is not None:
        client_cert = client_key = listen.tls_probe_certificate
    verify_client_certificate(listen.tls_certificate, listen.tls_key, listen.tls_client_ca, client_cert, client_key)
    return replace(probe, client_cert=client_cert, client_key=client_key)


def _own_address(listen: Listen) -> str:
    if listen.port == 0:
        raise ConfigError("listen.port: 0 takes a free port, which the settings do not contain; give HOST:PORT too")
    return format_address(EVERY_INTERFACE.get(listen.host, listen.host), listen.port)


def _default_name(listen: Listen, address: str) -> str:
    if address:
        return host_of(address) or "localhost"
    return "localhost" if listen.host in EVERY_INTERFACE else listen.host
