"""How a channel to the server is opened: message sizes, reconnecting, and the retries that gRPC makes by itself."""

import json
from typing import Any

from mal_train.errors import ConfigError

RETRY_BUFFER_BYTES = 128 * 1024 * 1024
"""At least the largest message. gRPC drops its retry policy in silence for calls above 256 KiB otherwise."""

MAX_RECEIVE_BYTES = 256 * 1024 * 1024
"""Masks of one bulk item come in one message; gRPC's default of 4 MiB would cut large images off."""

SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            # Not the bulk streams: they re-send unanswered items themselves, and gRPC would hold every file they
            # sent in its buffer until the first answer.
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
    """Options for a sync or asyncio channel."""
    return [
        # Sizes are checked against the server's published limits before sending.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.enable_retries", 1),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        # gRPC's own values (1 s growing to 2 min) leave a client waiting long after the server is back.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 3000),
        # Despite its name, how long one attempt to connect may take (20 s otherwise).
        ("grpc.min_reconnect_backoff_ms", 10_000),
    ]


def checked_address(address: str) -> str:
    """The address as gRPC takes it: HOST:PORT, or a gRPC target such as `unix:/run/mal.sock`.

    Raises:
        ConfigError: no port.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isdigit() or address.startswith(("unix:", "dns:", "ipv4:", "ipv6:"))):
        raise ConfigError(f"server address {address!r}: HOST:PORT is needed, for example localhost:50051")
    return address
