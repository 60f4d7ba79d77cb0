"""Opens channels: encryption, token, message sizes, reconnection, and gRPC's own retries."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from mal_client.transport.auth import BearerTokenInterceptor, aio_interceptors
from mal_train.core.addresses import check_address, is_local_address
from mal_train.core.errors import ConfigError
from mal_train.core.pem import PemBlock, read_pem
from mal_train.core.secrets import is_token

RETRY_BUFFER_BYTES = 128 * 1024 * 1024
"""At least the size of the largest message: gRPC silently disables retries of calls above it (default 256 KiB)."""

MAX_RECEIVE_BYTES = 256 * 1024 * 1024
"""All masks of one bulk item are in one message, which exceeds gRPC's default of 4 MiB for large images."""

SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            # Not the streams of LabelImages and Evaluate: they resend items themselves, and gRPC would buffer every
            # sent file until the first response.
            "name": [
                {"service": "mal.v1.LabelingService", "method": "LabelImage"},
                {"service": "mal.v1.ModelService"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def channel_options() -> list[tuple[str, Any]]:
    """Returns the options of a blocking or asyncio channel."""
    return [
        # Unlimited: the client checks sizes against the server's limits before it sends.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.enable_retries", 1),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        # gRPC's defaults (1 s, growing to 2 min) would delay the client long after a server restart.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 3000),
        # Despite its name, the timeout of one connection attempt (default 20 s).
        ("grpc.min_reconnect_backoff_ms", 10_000),
    ]


@dataclass(frozen=True)
class Connection:
    """Address and credentials of one server.

    Attributes:
        address: HOST:PORT, or a gRPC target such as `unix:/run/mal.sock`.
        tls: encrypt, and trust the public certificate authorities of gRPC.
        tls_ca: PEM file of the certificate authority to trust instead; implies `tls`.
        client_cert: PEM file of the client certificate with its chain, for mTLS.
        client_key: PEM file of the private key of `client_cert`; None: the key is in `client_cert`.
        token: sent with every call.
    """

    address: str
    tls: bool = False
    tls_ca: Path | str | None = None
    client_cert: Path | str | None = None
    client_key: Path | str | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises ConfigError for a malformed address or token, or options that contradict each other."""
        check_address(self.address, "server address")
        if self.client_key is not None and self.client_cert is None:
            raise ConfigError(f"client_key {self.client_key}: no client_cert; give the certificate of this key")
        if self.client_cert is not None and not self.is_encrypted:
            raise ConfigError(f"client_cert {self.client_cert}: requires TLS; give tls_ca, or set tls")
        if self.token is None:
            return
        if not is_token(self.token):
            raise ConfigError("token: it must be one word of printable ASCII characters")
        if not self.is_encrypted and not is_local_address(self.address):
            raise ConfigError(
                f"{self.address}: a token requires TLS, or it could be read on the network; give tls_ca, or set tls"
            )

    @property
    def is_encrypted(self) -> bool:
        """True if the channel uses TLS."""
        return self.tls or self.tls_ca is not None

    def open(self) -> grpc.Channel:
        """Opens a blocking channel. Raises ConfigError for files that cannot be read."""
        if self.is_encrypted:
            channel = grpc.secure_channel(self.address, self._credentials(), options=channel_options())
        else:
            channel = grpc.insecure_channel(self.address, options=channel_options())
        return channel if self.token is None else grpc.intercept_channel(channel, BearerTokenInterceptor(self.token))

    def open_aio(self) -> grpc.aio.Channel:
        """Opens a channel on the running event loop. Raises ConfigError for files that cannot be read."""
        interceptors = aio_interceptors(self.token) if self.token is not None else ()
        if self.is_encrypted:
            return grpc.aio.secure_channel(
                self.address, self._credentials(), options=channel_options(), interceptors=interceptors
            )
        return grpc.aio.insecure_channel(self.address, options=channel_options(), interceptors=interceptors)

    def _credentials(self) -> grpc.ChannelCredentials:
        key_file = self.client_cert if self.client_key is None else self.client_key
        authority = _read_pem(self.tls_ca, "tls_ca", "certificate")
        chain = _read_pem(self.client_cert, "client_cert", "certificate")
        key = _read_pem(key_file, "client_key", "private key")
        return grpc.ssl_channel_credentials(authority, key, chain)


def _read_pem(path: Path | str | None, name: str, block: PemBlock) -> bytes | None:
    return None if path is None else read_pem(path, name, block)
