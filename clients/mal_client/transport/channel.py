"""Opens channels: encryption, token, message sizes, balancing, reconnection, and gRPC's own retries."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from mal_client.transport.auth import BearerTokenInterceptor, aio_interceptors
from mal_client.transport.resolver import ResolvedAddress
from mal_train.core.addresses import (
    check_address,
    grpc_target,
    has_several_servers,
    is_local_address,
    split_addresses,
)
from mal_train.core.errors import ConfigError
from mal_train.core.pem import PemBlock, read_pem
from mal_train.core.proxies import DIRECT, grpc_options
from mal_train.core.secrets import is_token

RETRY_BUFFER_BYTES = 128 * 1024 * 1024
"""At least the size of the largest message: gRPC silently disables retries of calls above it (default 256 KiB)."""

MAX_RECEIVE_BYTES = 256 * 1024 * 1024
"""All masks of one bulk item are in one message, which exceeds gRPC's default of 4 MiB for large images."""

IDLE_TIMEOUT_MS = 300_000
"""Time without a call after which a channel closes its connections; the next call opens them again.

gRPC's default is 30 minutes. Balanced channels reconnect at once when a server closes an idle connection."""

_GIVE_TLS = "give --tls-ca CA.pem (tls_ca=), or --tls (tls=True)"

DNS_PAUSE_MS = 10_000
"""Least time between two resolutions of a name, which a lost or aged connection causes; gRPC's default is 30 s."""

KEEPALIVE_MS = 60_000
"""Interval of pings during calls. A server that does not answer within KEEPALIVE_TIMEOUT_MS hangs or has vanished: its
calls end with UNAVAILABLE and go to others, long before their deadline."""

KEEPALIVE_TIMEOUT_MS = 20_000

SERVICE_CONFIG: dict[str, Any] = {
    # The default, pick_first, sends every call to one of the servers of a name.
    "loadBalancingConfig": [{"round_robin": {}}],
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
    ],
}

HEALTH_CHECK: dict[str, Any] = {"healthCheckConfig": {"serviceName": ""}}
"""Part of the service config with which calls avoid a server that loads, drains or has lost its device.

Only for addresses of several servers: with one, the call itself must get the status of the server, and its retry time.
"""


def channel_options(*, has_several: bool = False) -> list[tuple[str, Any]]:
    """Returns the options of a blocking or asyncio channel.

    Args:
        has_several: the address is written as one of several servers.
    """
    service_config = SERVICE_CONFIG | (HEALTH_CHECK if has_several else {})
    return [
        # Unlimited: the client checks sizes against the server's limits before it sends.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.enable_retries", 1),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.client_idle_timeout_ms", IDLE_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.dns_min_time_between_resolutions_ms", DNS_PAUSE_MS),
        # gRPC's defaults (1 s, growing to 2 min) would delay the client long after a server restart.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 3000),
        # Despite its name, the timeout of one connection attempt (default 20 s).
        ("grpc.min_reconnect_backoff_ms", 10_000),
    ]


@dataclass(frozen=True)
class Connection:
    """Address and credentials of one server, or of several alike that share the calls.

    Attributes:
        address: HOST:PORT; a comma-separated list of them, with IP addresses of one version; or a gRPC target such as
            `dns:///mal-server:50051` or `unix:/run/mal.sock`.
        tls: encrypt, and trust the public certificate authorities of gRPC.
        tls_ca: PEM file of the certificate authority to trust instead; implies `tls`.
        client_cert: PEM file of the client certificate with its chain, for mTLS.
        client_key: PEM file of the private key of `client_cert`; None: the key is in `client_cert`.
        token: sent with every call.
        authority: name or NAME:PORT of the servers, for which their certificates must be valid; None: the address.
        use_proxy: connect through the HTTP proxy of the environment, if one applies; none does to this machine.
    """

    address: str
    tls: bool = False
    tls_ca: Path | str | None = None
    client_cert: Path | str | None = None
    client_key: Path | str | None = None
    token: str | None = field(default=None, repr=False)
    authority: str | None = None
    use_proxy: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError for a malformed address or token, or options that contradict each other."""
        check_address(self.address, "server address")
        grpc_target(self.address, "server address")
        if self.is_encrypted and self.authority is None and len(split_addresses(self.address)) > 1:
            raise ConfigError(
                f"{self.address}: a list with TLS needs the name in the certificate that all servers have; give "
                "--authority NAME (authority=)"
            )
        if self.client_key is not None and self.client_cert is None:
            raise ConfigError(
                f"--client-key (client_key=): {self.client_key}: no certificate; give that of this key with "
                "--client-cert (client_cert=)"
            )
        if self.client_cert is not None and not self.is_encrypted:
            raise ConfigError(f"--client-cert (client_cert=): {self.client_cert}: requires TLS; {_GIVE_TLS}")
        if self.token is None:
            return
        if not is_token(self.token):
            raise ConfigError("--token-file (token=): it must be one word of printable ASCII characters")
        if not self.is_encrypted and not is_local_address(self.address):
            raise ConfigError(f"{self.address}: a token requires TLS, or it could be read on the network; {_GIVE_TLS}")

    @property
    def is_encrypted(self) -> bool:
        """True if the channel uses TLS."""
        return self.tls or self.tls_ca is not None

    def at(self, server: ResolvedAddress) -> Connection:
        """Returns the connection to one of the servers behind the address, with the same credentials."""
        return replace(
            self,
            address=server.address,
            authority=self.authority or server.authority,
            # A name that was resolved here is exempt from the proxy, but its IP addresses may not be.
            use_proxy=self.use_proxy and server.authority is None,
        )

    def open(self) -> grpc.Channel:
        """Opens a blocking channel. Raises ConfigError for files that cannot be read, and for a list behind a proxy."""
        target, options = self._target, self._options()
        if self.is_encrypted:
            channel = grpc.secure_channel(target, self._credentials(), options=options)
        else:
            channel = grpc.insecure_channel(target, options=options)
        return channel if self.token is None else grpc.intercept_channel(channel, BearerTokenInterceptor(self.token))

    def open_aio(self) -> grpc.aio.Channel:
        """Opens a channel on the running event loop. Raises ConfigError as `open`."""
        target, options = self._target, self._options()
        interceptors = aio_interceptors(self.token) if self.token is not None else ()
        if self.is_encrypted:
            return grpc.aio.secure_channel(target, self._credentials(), options=options, interceptors=interceptors)
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)

    @property
    def _target(self) -> str:
        return grpc_target(self.address, "server address")

    def _options(self) -> list[tuple[str, Any]]:
        options = channel_options(has_several=has_several_servers(self.address))
        if self.authority is not None:
            options.append(("grpc.default_authority", self.authority))
        return [*options, *(grpc_options(self.address) if self.use_proxy else DIRECT)]

    def _credentials(self) -> grpc.ChannelCredentials:
        key_file = self.client_cert if self.client_key is None else self.client_key
        authority = _read_pem(self.tls_ca, "--tls-ca (tls_ca=)", "certificate")
        chain = _read_pem(self.client_cert, "--client-cert (client_cert=)", "certificate")
        key = _read_pem(key_file, "--client-key (client_key=)", "private key")
        return grpc.ssl_channel_credentials(authority, key, chain)


def _read_pem(path: Path | str | None, name: str, block: PemBlock) -> bytes | None:
    return None if path is None else read_pem(path, name, block)
