"""Where the server listens: two sections of its settings. Opens no port."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from mal_train.core.net import is_loopback
from mal_train.core.yaml_config import Strict


class Listen(Strict):
    """Where the server listens."""

    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on: 127.0.0.1 or ::1 for this machine alone, 0.0.0.0 or :: for every interface.",
    )
    port: int = Field(default=50051, ge=0, le=65535, description="TCP port; 0 takes a free one and prints it.")
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file of the server's certificate and the chain above it, read at the start. null: traffic is "
        "not encrypted.",
    )
    tls_key: Path | None = Field(default=None, description="PEM file of the certificate's private key, unencrypted.")
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file of the authorities whose certificates clients must show (mTLS), also for health checks.\n"
        "null: clients need none.",
    )
    tls_probe_certificate: Path | None = Field(
        default=None,
        description="PEM file of the certificate, and its unencrypted private key, that `mal-server health -c` shows "
        "where\ntls_client_ca asks for one. null: the server's own, where that counts as a client's.",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="Without a certificate a host other than loopback is refused unless this is true. Set it only on a "
        "network\nthat is private to the server and its clients, or behind a proxy that ends TLS.",
    )

    @model_validator(mode="after")
    def _plaintext_stays_here(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("listen.tls_certificate, listen.tls_key: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("listen.tls_client_ca: without listen.tls_certificate nobody is asked for a certificate")
        if self.tls_probe_certificate is not None and self.tls_client_ca is None:
            raise ValueError("listen.tls_probe_certificate: without listen.tls_client_ca nobody is asked for one")
        if self.tls_certificate is None and not self.allow_plaintext and not is_loopback(self.host):
            raise ValueError(
                f"listen.host: {self.host!r} is reachable from other machines and the traffic is not encrypted; use "
                "127.0.0.1 or ::1, give listen.tls_certificate and listen.tls_key, or set listen.allow_plaintext: true"
            )
        return self


class MetricsListen(Strict):
    """Where the figures are shown."""

    port: int | None = Field(
        default=None, ge=0, le=65535, description="TCP port of http://host:port/metrics (Prometheus); null: not shown."
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address to show them on. They tell of load and of the model's name and checksum, to everybody who "
        "reaches it.",
    )
