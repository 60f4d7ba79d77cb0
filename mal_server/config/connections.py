"""Section `connections` of the server's settings: bounds of connections, calls and streams, and of what they hold."""

from pydantic import Field

from mal_server.config.limits import MIB, PIB
from mal_train.core.yaml_config import Strict


class Connections(Strict):
    """Bounds of connections, calls and streams."""

    max_connections: int = Field(
        default=2000,
        ge=1,
        le=1_000_000,
        description="Connections open at once; further ones are closed. Each takes a file descriptor: the server\n"
        "raises its own limit as far as the system allows.",
    )
    handshake_s: float = Field(
        default=10.0,
        ge=0.1,
        le=3600.0,
        description="Seconds for a new connection to finish the handshakes of TLS and HTTP/2 before it is closed.",
    )
    idle_s: float = Field(
        default=300.0,
        ge=0.1,
        le=86400.0,
        description="Seconds after which a connection without a call is closed; clients reconnect by themselves.",
    )
    max_age_s: float = Field(
        default=300.0,
        ge=0.1,
        le=31_536_000.0,
        description="Age in seconds, give or take a tenth, at which a connection takes no further calls; clients open\n"
        "another one. Only then do they resolve the name of several servers again, and find a new one.",
    )
    age_grace_s: float = Field(
        default=3600.0,
        ge=0.1,
        le=31_536_000.0,
        description="Seconds after that for the calls of the connection to finish before they end with UNAVAILABLE;\n"
        "longer than any call of one image. mal-client continues streams that it cuts.",
    )
    keepalive_s: float = Field(
        default=60.0,
        ge=1.0,
        le=86400.0,
        description="Interval in seconds at which the server pings a connection without traffic. A client that does\n"
        "not answer within 20 s has vanished, and its calls are cancelled.",
    )
    max_calls: int = Field(
        default=2000,
        ge=1,
        le=1_000_000,
        description="Calls that run at once; further ones are refused (UNAVAILABLE) with a retry delay. Health checks\n"
        "are not counted. One token may run half of them, and one connection 1000.",
    )
    max_streams: int = Field(
        default=64,
        ge=1,
        le=100_000,
        description="LabelImages and Evaluate streams open at once; further ones are refused likewise. Each may hold\n"
        "one message of limits.max_request_bytes that is being received.",
    )
    max_streams_per_token: int = Field(
        default=16, ge=1, le=100_000, description="Streams of the same token open at once, within max_streams."
    )
    stream_idle_s: float = Field(
        default=300.0,
        ge=0.1,
        le=86400.0,
        description="Seconds after which a stream ends (UNAVAILABLE, STREAM_IDLE) on which every item is answered and\n"
        "no further one arrives, or whose client does not read a response. It keeps replaced models in memory until "
        "then.",
    )
    receive_timeout_s: float = Field(
        default=60.0,
        ge=0.1,
        le=3600.0,
        description="Seconds for the request of a call to arrive; 10 while other calls wait for max_receiving_bytes.",
    )
    max_receiving_bytes: int = Field(
        default=1024 * MIB,
        ge=MIB,
        le=PIB,
        description="Memory for requests that are being received, limits.max_request_bytes for each; further calls\n"
        "wait. One token, or one connection without a token, may use half of it. max_streams bounds streams instead.",
    )
