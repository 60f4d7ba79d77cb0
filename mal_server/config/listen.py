"""Sections `listen` and `metrics` of the server's settings. Opens no port."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from mal_train.core.addresses import is_loopback
from mal_train.core.yaml_config import Strict


class Listen(Strict):
    """Address and encryption of the gRPC port."""

    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on: 127.0.0.1 or ::1 for this machine only, 0.0.0.0 or :: for every interface.",
    )
    port: int = Field(default=50051, ge=0, le=65535, description="TCP port; 0 takes a free one and prints it.")
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file with the server's certificate and its chain. null: traffic is not encrypted.\n"
        "A renewed file is used from the next connection on.",
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file with the certificate's private key, not encrypted."
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file with the authorities of client certificates (mTLS). Clients, health checks included,\n"
        "must present a certificate of one of them. null: clients need no certificate.",
    )
    tls_probe_name: str | None = Field(
        default=None,
        min_length=1,
        description="Host name or IP address for which `mal-server health -c` verifies the server's certificate; set "
        "it to a name in\nthe certificate. The probe also verifies that the certificate is valid today, and that the "
        "server holds its key.\nnull: the value of host, or localhost where host is 0.0.0.0 or ::.",
    )
    tls_probe_certificate: Path | None = Field(
        default=None,
        description="PEM file with the client certificate, and its unencrypted private key, that\n"
        "`mal-server health -c` presents if tls_client_ca is set. null: the server's own, if that authority issued it.",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="Permits a host other than loopback without a certificate. Use it only on a network that is "
        "private to the\nserver and its clients, or behind a proxy that terminates TLS.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("listen.tls_certificate, listen.tls_key: one without the other; give both or neither")
        for name in ("tls_client_ca", "tls_probe_name"):
            if getattr(self, name) is not None and self.tls_certificate is None:
                raise ValueError(f"listen.{name}: has no effect without listen.tls_certificate; give that too")
        if self.tls_probe_certificate is not None and self.tls_client_ca is None:
            raise ValueError("listen.tls_probe_certificate: has no effect without listen.tls_client_ca; give that too")
        if self.tls_certificate is None and not self.allow_plaintext and not is_loopback(self.host):
            raise ValueError(
                f"listen.host: {self.host!r} is reachable from other machines, and traffic is not encrypted; use "
                "127.0.0.1 or ::1, give listen.tls_certificate and listen.tls_key, or set listen.allow_plaintext: true"
            )
        return self


class MetricsListen(Strict):
    """Address of the metrics port."""

    port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port of http://host:port/metrics (Prometheus); null: metrics are not served.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address to serve metrics on. They show load, model names and checksums to every client that "
        "reaches it.",
    )
