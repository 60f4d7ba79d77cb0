"""`mal-server health`: asks a running server how it is, for supervisors and containers without another tool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mal_train.errors import ConfigError


@dataclass(frozen=True)
class Probe:
    """A question to a server.

    Attributes:
        address: HOST:PORT.
        service: full name, for example mal.v1.LabelingService; empty = the whole server.
        timeout_s: how long to wait for the answer.
        tls_ca: PEM file of the authority to trust; None = plaintext.
        tls_name: name in the server's certificate, where it is not the address's host.
        client_cert: PEM file with the certificate to show and its private key.
    """

    address: str
    service: str = ""
    timeout_s: float = 5.0
    tls_ca: Path | None = None
    tls_name: str | None = None
    client_cert: Path | None = None

    def ask(self) -> str:
        """SERVING, NOT_SERVING or SERVICE_UNKNOWN as the server says, or UNREACHABLE and why.

        Raises:
            ConfigError: a file that cannot be read.
        """
        with self._channel() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=self.service), timeout=self.timeout_s)
            except grpc.RpcError as error:
                call: Any = error
                if call.code() is grpc.StatusCode.NOT_FOUND:
                    return "SERVICE_UNKNOWN"
                return f"UNREACHABLE ({call.code().name}: {call.details()})"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def _channel(self) -> grpc.Channel:
        if self.tls_ca is None:
            if self.client_cert is not None or self.tls_name is not None:
                raise ConfigError("--client-cert, --tls-name: they need --tls-ca; without it nothing is encrypted")
            return grpc.insecure_channel(self.address)
        shown = None if self.client_cert is None else _read(self.client_cert)
        credentials = grpc.ssl_channel_credentials(_read(self.tls_ca), shown, shown)
        options = [] if self.tls_name is None else [("grpc.ssl_target_name_override", self.tls_name)]
        return grpc.secure_channel(self.address, credentials, options=options)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
