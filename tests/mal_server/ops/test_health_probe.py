"""`mal-server health`: one word and an exit code about a running server."""

import asyncio
import datetime
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from mal_server import cli
from mal_server.config.listen import Listen
from mal_server.ops.health_probe import HealthProbe, probe_of
from mal_server.security.tls_check import verify_handshake
from mal_train.core.errors import ConfigError
from tests.mal_server.fakes import Running, config_of, serving
from tests.mal_server.security.test_auth import TOKENS, Papers, tokens  # noqa: F401  # a fixture


def asked(*line: str) -> int:
    return cli.main(["health", *line])


async def ask(running: Running, *line: str) -> int:
    return await asyncio.to_thread(asked, running.server.address, *line)


def test_a_serving_server_is_healthy_until_it_drains(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> list[int]:
        async with serving() as running:
            codes = [await ask(running), await ask(running, "--service", "mal.v1.LabelingService")]
            codes.append(await ask(running, "--service", "mal.v1.Nothing"))
            await running.server.drain()
            return [*codes, await ask(running)]

    assert asyncio.run(work()) == [0, 0, 1, 1]
    said = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert [words.partition(" ")[0] for words in said] == ["SERVING", "SERVING", "SERVICE_UNKNOWN", "NOT_SERVING"]
    assert "(--service mal.v1.Nothing: the server has none of that name; leave --service out" in said[2]


def test_where_nobody_listens_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("127.0.0.1:1", "--timeout", "5") == 1
    said = capsys.readouterr().out
    assert "UNREACHABLE (UNAVAILABLE" in said
    assert "TLS" not in said


def test_a_server_with_tls_that_is_asked_without_is_told_from_one_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> int:
        async with serving(listen=Papers(tmp_path).listen(mutual=False)) as running:
            return await ask(running)

    assert asyncio.run(work()) == 1
    assert "as a server with TLS does: give --tls-ca CA.pem, or -c FILE" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["127.0.0.1", ":50051", "localhost:", "localhost:65536", "http://localhost"])
def test_an_address_without_a_port_is_refused_and_not_asked_elsewhere(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(address) == 2
    assert f"health: {address!r}; HOST:PORT is needed" in capsys.readouterr().err


def test_health_is_asked_over_tls_by_the_name_in_the_certificate(tmp_path: Path) -> None:
    papers = Papers(tmp_path)
    trusted = ["--tls-ca", str(papers.authority), "--client-cert", str(papers.client), "--tls-name", "127.0.0.1"]

    async def work() -> list[int]:
        async with serving(listen=papers.listen(mutual=True)) as running:
            return [await ask(running, *trusted), await ask(running, *trusted[:2], "--timeout", "1")]

    assert asyncio.run(work()) == [0, 1]


@pytest.mark.parametrize(
    "line",
    [["--tls-ca", "/none.pem"], ["--client-cert", "/none.pem"], ["--tls-name", "x"], ["--client-key", "/none.pem"]],
)
def test_papers_that_cannot_be_used_are_a_usage_error(line: list[str]) -> None:
    assert asked("127.0.0.1:1", *line) == 2


def test_a_probe_by_settings_brings_no_torch(tmp_path: Path) -> None:
    """It runs every few seconds in a container: with torch each time took 2.7 s of CPU and 670 MB."""
    settings = tmp_path / "server.yaml"
    settings.write_text("checkpoint: builtin\nlisten: {port: 1}\n")
    code = (
        "import sys; from mal_server.cli import main\n"
        f"assert main(['health', '-c', {str(settings)!r}]) == 1\n"
        "print('torch' in sys.modules, 'grpc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False True"


def test_somebody_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked() == 2
    assert "HOST:PORT" in capsys.readouterr().err


class Listening:
    """TLS files for a server in a folder, with the settings that name them."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.issue(self.authority.issue_cert(*names or ("mal.example.org", "127.0.0.1")))
        self.settings: dict[str, Any] = {
            "tls_certificate": str(folder / "cert.pem"),
            "tls_key": str(folder / "key.pem"),
        }

    def issue(self, papers: trustme.LeafCert) -> None:
        (self.folder / "key.pem").write_bytes(papers.private_key_pem.bytes())
        (self.folder / "cert.pem").write_bytes(b"".join(part.bytes() for part in papers.cert_chain_pems))

    def asks_for_papers_of(self, authority: trustme.CA) -> "Listening":
        (self.folder / "clients.pem").write_bytes(authority.cert_pem.bytes())
        self.settings["tls_client_ca"] = str(self.folder / "clients.pem")
        return self

    def client(self, name: str, authority: trustme.CA) -> Path:
        path = self.folder / name
        path.write_bytes(authority.issue_cert("probe@x").private_key_and_cert_chain_pem.bytes())
        return path

    def health(self, *line: str, **more: Any) -> int:
        """What `mal-server health -c` says of a server with these settings and tokens."""

        async def work() -> int:
            async with serving(listen={"port": 0, **self.settings}, **more) as running:
                port = int(running.server.address.rpartition(":")[2])
                listen = {"port": port, **self.settings}
                file = self.folder / "server.yaml"
                file.write_text(yaml.safe_dump({"checkpoint": "gone.malckpt", "listen": listen, **more}))
                return await ask_by_settings(file, *line)

        return asyncio.run(work())


async def ask_by_settings(file: Path, *line: str) -> int:
    return await asyncio.to_thread(asked, "-c", str(file), "--timeout", "30", *line)


def test_a_plaintext_servers_own_settings_are_enough(tmp_path: Path) -> None:
    async def work() -> int:
        async with serving() as running:
            port = running.server.address.rpartition(":")[2]
            (tmp_path / "server.yaml").write_text(f"listen: {{host: 0.0.0.0, port: {port}, allow_plaintext: true}}")
            return await ask_by_settings(tmp_path / "server.yaml")

    assert asyncio.run(work()) == 0


@pytest.mark.parametrize("names", [("mal.example.org", "127.0.0.1"), ("127.0.0.1",), ("::1",), ("*.example.org",)])
def test_a_tls_servers_own_settings_are_enough_whatever_its_certificate_names(
    tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert Listening(tmp_path, *names).health() == 0
    assert "127.0.0.1:" in capsys.readouterr().out


def test_health_needs_no_token(tmp_path: Path, tokens: list[dict[str, Any]]) -> None:  # noqa: F811
    assert len(tokens) == len(TOKENS)
    assert Listening(tmp_path).health(tokens=tokens) == 0


def test_a_server_that_asks_for_certificates_takes_its_own_where_one_authority_issued_both(tmp_path: Path) -> None:
    listening = Listening(tmp_path)
    assert listening.asks_for_papers_of(listening.authority).health() == 0


def test_where_its_own_certificate_is_no_clients_the_remedy_is_named_and_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = trustme.CA()
    listening = Listening(tmp_path).asks_for_papers_of(clients)
    assert listening.health() == 2
    told = capsys.readouterr().err
    assert "the server's own certificate" in told
    assert "listen.tls_probe_certificate" in told
    probe = listening.client("probe.pem", clients)
    assert listening.health("--client-cert", str(probe)) == 0
    listening.settings["tls_probe_certificate"] = str(probe)
    assert listening.health() == 0


def test_a_key_in_a_file_of_its_own_is_shown_with_its_certificate(tmp_path: Path) -> None:
    clients = trustme.CA()
    listening = Listening(tmp_path).asks_for_papers_of(clients)
    papers = clients.issue_cert("probe@x")
    (tmp_path / "probe.key").write_bytes(papers.private_key_pem.bytes())
    (tmp_path / "probe.crt").write_bytes(papers.cert_chain_pems[0].bytes())
    line = ("--client-cert", str(tmp_path / "probe.crt"), "--client-key", str(tmp_path / "probe.key"))
    assert listening.health(*line) == 0


def servers_only(authority: trustme.CA, folder: Path) -> None:
    """A certificate whose extended key usage allows servers alone, as many authorities issue them."""
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    signer = load_pem_private_key(authority.private_key_pem.bytes(), None)
    private = authority.issue_cert("127.0.0.1").private_key_pem.bytes()
    key = load_pem_private_key(private, None)
    assert isinstance(signer, EllipticCurvePrivateKey)
    assert isinstance(key, EllipticCurvePrivateKey)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2999, 1, 1, tzinfo=datetime.UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("mal.example.org")]), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(private)


def test_a_certificate_for_servers_alone_serves_the_probe_and_is_not_shown_as_a_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listening = Listening(tmp_path)
    servers_only(listening.authority, tmp_path)
    assert listening.health() == 0
    assert listening.asks_for_papers_of(listening.authority).health() == 2
    assert "purpose" in capsys.readouterr().err
    listening.settings["tls_probe_certificate"] = str(listening.client("probe.pem", listening.authority))
    assert listening.health() == 0


def outdated(listening: Listening) -> None:
    past = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
    day = datetime.timedelta(days=1)
    listening.issue(listening.authority.issue_cert("127.0.0.1", not_before=past - day, not_after=past))


def nameless(listening: Listening) -> None:
    listening.issue(listening.authority.issue_cert("me@x"))


@pytest.mark.parametrize(("spoil", "said"), [(outdated, "expired"), (nameless, "names no host")])
def test_a_certificate_that_no_client_accepts_is_named(
    tmp_path: Path, spoil: Callable[[Listening], None], said: str
) -> None:
    listening = Listening(tmp_path)
    spoil(listening)
    with pytest.raises(ConfigError, match=said):
        verify_handshake(tmp_path / "cert.pem", tmp_path / "key.pem")


def test_a_probe_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    listening = Listening(tmp_path)
    listening.asks_for_papers_of(listening.authority)
    listening.settings["tls_probe_certificate"] = listening.settings["tls_certificate"]  # without its key
    with pytest.raises(ConfigError, match=r"cert\.pem: no PEM certificate with its unencrypted private key"):
        probe_of(config_of(listen=listening.settings).listen, HealthProbe(""))


def test_a_probe_certificate_without_anybody_who_asks_for_it_is_refused(tmp_path: Path) -> None:
    settings = {**Listening(tmp_path).settings, "tls_probe_certificate": "probe.pem"}
    with pytest.raises(ConfigError, match="nobody is asked for one"):
        config_of(listen=settings)


def test_the_address_is_the_one_that_this_machine_reaches() -> None:
    def address(host: str, **more: Any) -> str:
        return probe_of(Listen(host=host, allow_plaintext=True, **more), HealthProbe("")).address

    assert [address(host) for host in ("0.0.0.0", "::", "::1", "10.0.0.7", "mal.example.org")] == [
        *("127.0.0.1:50051", "[::1]:50051", "[::1]:50051", "10.0.0.7:50051", "mal.example.org:50051")
    ]
    with pytest.raises(ConfigError, match="0 takes a free port"):
        address("127.0.0.1", port=0)
    assert probe_of(Listen(port=0), HealthProbe("127.0.0.1:7")).address == "127.0.0.1:7"
