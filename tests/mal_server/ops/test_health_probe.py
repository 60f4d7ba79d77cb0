"""`mal-server health`: the state and exit code that it prints for a running server."""

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
from tests.mal_server.security.test_auth import TOKENS, Certificates, tokens  # noqa: F401  # a fixture
from tests.proxy import RecordingProxy, recording_proxy


def health(*arguments: str) -> int:
    return cli.main(["health", *arguments])


async def health_of(running: Running, *arguments: str) -> int:
    return await asyncio.to_thread(health, running.server.address, *arguments)


def test_a_serving_server_is_healthy_until_it_drains(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> list[int]:
        async with serving() as running:
            codes = [await health_of(running), await health_of(running, "--service", "mal.v1.LabelingService")]
            codes.append(await health_of(running, "--service", "mal.v1.Nothing"))
            await running.server.drain()
            return [*codes, await health_of(running)]

    assert asyncio.run(work()) == [0, 0, 1, 1]
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert [line.partition(" ")[0] for line in lines] == ["SERVING", "SERVING", "SERVICE_UNKNOWN", "NOT_SERVING"]
    assert "--service mal.v1.Nothing" in lines[2]


def test_an_address_without_a_server_is_unreachable(capsys: pytest.CaptureFixture[str]) -> None:
    assert health("127.0.0.1:1", "--timeout", "5") == 1
    output = capsys.readouterr().out
    assert "UNREACHABLE (UNAVAILABLE" in output
    assert "--tls-ca" not in output


def test_a_plaintext_check_of_a_tls_server_names_the_tls_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> int:
        async with serving(listen=Certificates(tmp_path).listen(mutual=False)) as running:
            return await health_of(running)

    assert asyncio.run(work()) == 1
    output = capsys.readouterr().out
    assert "--tls-ca" in output
    assert "-c FILE" in output


@pytest.mark.parametrize("address", ["127.0.0.1", ":50051", "localhost:", "localhost:65536", "http://localhost"])
def test_an_address_without_a_valid_port_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert health(address) == 2
    error = capsys.readouterr().err
    assert "health: " in error
    assert repr(address) in error


def test_options_give_the_authority_the_client_certificate_and_the_name(tmp_path: Path) -> None:
    files = Certificates(tmp_path)
    trusted = ["--tls-ca", str(files.authority), "--client-cert", str(files.client), "--tls-name", "127.0.0.1"]

    async def work() -> list[int]:
        async with serving(listen=files.listen(mutual=True)) as running:
            return [await health_of(running, *trusted), await health_of(running, *trusted[:2], "--timeout", "1")]

    assert asyncio.run(work()) == [0, 1]


@pytest.mark.parametrize(
    "line",
    [["--tls-ca", "/none.pem"], ["--client-cert", "/none.pem"], ["--tls-name", "x"], ["--client-key", "/none.pem"]],
)
def test_an_unusable_tls_option_is_a_usage_error(line: list[str]) -> None:
    assert health("127.0.0.1:1", *line) == 2


def test_a_probe_with_the_settings_does_not_import_torch(tmp_path: Path) -> None:
    """A container runs it every few seconds; with torch each run took 2.7 s of CPU and 670 MB."""
    settings = tmp_path / "server.yaml"
    settings.write_text("checkpoint: builtin\nlisten: {port: 1}\n")
    code = (
        "import sys; from mal_server.cli import main\n"
        f"assert main(['health', '-c', {str(settings)!r}]) == 1\n"
        "print('torch' in sys.modules, 'grpc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False True"


def test_a_probe_without_address_and_settings_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert health() == 2
    error = capsys.readouterr().err
    assert "HOST:PORT" in error
    assert "-c FILE" in error


class TlsServer:
    """TLS files of a server in a folder, and the settings that name them."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.issue(self.authority.issue_cert(*names or ("mal.example.org", "127.0.0.1")))
        self.settings: dict[str, Any] = {
            "tls_certificate": str(folder / "cert.pem"),
            "tls_key": str(folder / "key.pem"),
        }

    def issue(self, certificate: trustme.LeafCert) -> None:
        (self.folder / "key.pem").write_bytes(certificate.private_key_pem.bytes())
        (self.folder / "cert.pem").write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))

    def require_client_certificate(self, authority: trustme.CA) -> "TlsServer":
        (self.folder / "clients.pem").write_bytes(authority.cert_pem.bytes())
        self.settings["tls_client_ca"] = str(self.folder / "clients.pem")
        return self

    def client(self, name: str, authority: trustme.CA) -> Path:
        path = self.folder / name
        path.write_bytes(authority.issue_cert("probe@x").private_key_and_cert_chain_pem.bytes())
        return path

    def health(self, *arguments: str, **more: Any) -> int:
        """Starts a server with these settings and returns the exit code of `mal-server health -c` for it."""

        async def work() -> int:
            async with serving(listen={"port": 0, **self.settings}, **more) as running:
                port = int(running.server.address.rpartition(":")[2])
                listen = {"port": port, **self.settings}
                file = self.folder / "server.yaml"
                file.write_text(yaml.safe_dump({"checkpoint": "gone.malckpt", "listen": listen, **more}))
                return await health_with(file, *arguments)

        return asyncio.run(work())


async def health_with(settings: Path, *arguments: str) -> int:
    return await asyncio.to_thread(health, "-c", str(settings), "--timeout", "30", *arguments)


def test_the_settings_of_a_plaintext_server_suffice(tmp_path: Path) -> None:
    async def work() -> int:
        async with serving() as running:
            port = running.server.address.rpartition(":")[2]
            (tmp_path / "server.yaml").write_text(f"listen: {{host: 0.0.0.0, port: {port}, allow_plaintext: true}}")
            return await health_with(tmp_path / "server.yaml")

    assert asyncio.run(work()) == 0


@pytest.mark.parametrize("names", [("mal.example.org", "127.0.0.1"), ("127.0.0.1",)])
def test_the_settings_of_a_tls_server_suffice_if_its_certificate_names_the_listen_host(
    tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert TlsServer(tmp_path, *names).health() == 0
    assert "127.0.0.1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("certificate_name", "probe_name"),
    [
        ("mal.example.org", "mal.example.org"),
        ("*.example.org", "mal.example.org"),
        ("::1", "::1"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_the_probe_name_is_the_name_that_is_verified(
    tmp_path: Path, certificate_name: str, probe_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = TlsServer(tmp_path, certificate_name)
    assert server.health() == 2
    error = capsys.readouterr().err
    assert "listen.tls_probe_name" in error
    assert "'127.0.0.1'" in error
    assert server.health("--tls-name", probe_name) == 0
    server.settings["tls_probe_name"] = probe_name
    assert server.health() == 0
    server.settings["tls_probe_name"] = "other.org"
    assert server.health() == 2
    assert "'other.org'" in capsys.readouterr().err


def test_a_server_with_another_certificate_for_the_same_name_is_unreachable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    mine, other = TlsServer(tmp_path / "mine"), TlsServer(tmp_path / "other")

    async def work() -> int:
        async with serving(listen={"port": 0, **other.settings}) as running:
            port = int(running.server.address.rpartition(":")[2])
            file = tmp_path / "server.yaml"
            file.write_text(yaml.safe_dump({"listen": {"port": port, **mine.settings}}))
            return await health_with(file)

    assert asyncio.run(work()) == 1
    assert "UNREACHABLE" in capsys.readouterr().out


def test_health_needs_no_token(tmp_path: Path, tokens: list[dict[str, Any]]) -> None:  # noqa: F811
    assert len(tokens) == len(TOKENS)
    assert TlsServer(tmp_path).health(tokens=tokens) == 0


def test_the_probe_presents_the_servers_own_certificate_if_the_client_authority_issued_it(tmp_path: Path) -> None:
    server = TlsServer(tmp_path)
    assert server.require_client_certificate(server.authority).health() == 0


def test_a_server_certificate_of_another_authority_is_refused_with_a_remedy_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = trustme.CA()
    server = TlsServer(tmp_path).require_client_certificate(clients)
    assert server.health() == 2
    error = capsys.readouterr().err
    assert f"listen.tls_certificate: {tmp_path / 'cert.pem'}: " in error
    assert "listen.tls_probe_certificate" in error
    probe = server.client("probe.pem", clients)
    assert server.health("--client-cert", str(probe)) == 0
    server.settings["tls_probe_certificate"] = str(probe)
    assert server.health() == 0


def test_the_client_key_may_be_in_its_own_file(tmp_path: Path) -> None:
    clients = trustme.CA()
    server = TlsServer(tmp_path).require_client_certificate(clients)
    certificate = clients.issue_cert("probe@x")
    (tmp_path / "probe.key").write_bytes(certificate.private_key_pem.bytes())
    (tmp_path / "probe.crt").write_bytes(certificate.cert_chain_pems[0].bytes())
    arguments = ("--client-cert", str(tmp_path / "probe.crt"), "--client-key", str(tmp_path / "probe.key"))
    assert server.health(*arguments) == 0


def issue_for_servers_only(authority: trustme.CA, folder: Path) -> None:
    """Writes a certificate whose extended key usage allows servers only, as many authorities issue them."""
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
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(private)


def test_a_certificate_for_servers_only_is_verified_but_not_accepted_as_a_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = TlsServer(tmp_path)
    issue_for_servers_only(server.authority, tmp_path)
    server.settings["tls_probe_name"] = "localhost"
    assert server.health() == 0
    assert server.require_client_certificate(server.authority).health() == 2
    error = capsys.readouterr().err
    assert f"listen.tls_certificate: {tmp_path / 'cert.pem'}: " in error
    # OpenSSL's reason: unsuitable certificate purpose.
    assert "purpose" in error
    assert "listen.tls_probe_certificate" in error
    server.settings["tls_probe_certificate"] = str(server.client("probe.pem", server.authority))
    assert server.health() == 0


def issue_expired(server: TlsServer) -> None:
    past = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
    day = datetime.timedelta(days=1)
    server.issue(server.authority.issue_cert("127.0.0.1", not_before=past - day, not_after=past))


def issue_without_host(server: TlsServer) -> None:
    server.issue(server.authority.issue_cert("me@x"))


@pytest.mark.parametrize("issue", [issue_expired, issue_without_host])
def test_a_certificate_that_no_client_accepts_is_named(tmp_path: Path, issue: Callable[[TlsServer], None]) -> None:
    issue(TlsServer(tmp_path))
    with pytest.raises(ConfigError, match=r"^listen\.tls_certificate: .*cert\.pem: .*'127\.0\.0\.1'"):
        verify_handshake(tmp_path / "cert.pem", tmp_path / "key.pem", "127.0.0.1")


def test_a_probe_certificate_without_its_key_is_named(tmp_path: Path) -> None:
    server = TlsServer(tmp_path)
    server.require_client_certificate(server.authority)
    server.settings["tls_probe_certificate"] = server.settings["tls_certificate"]
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        probe_of(config_of(listen=server.settings).listen, HealthProbe(""))


def test_a_probe_certificate_without_a_client_authority_is_refused(tmp_path: Path) -> None:
    settings = {**TlsServer(tmp_path).settings, "tls_probe_certificate": "probe.pem"}
    with pytest.raises(ConfigError, match=r"^listen\.tls_probe_certificate: .*listen\.tls_client_ca"):
        config_of(listen=settings)


def test_the_default_address_is_reachable_from_this_machine() -> None:
    def address(host: str, **more: Any) -> str:
        return probe_of(Listen(host=host, allow_plaintext=True, **more), HealthProbe("")).address

    assert [address(host) for host in ("0.0.0.0", "::", "::1", "10.0.0.7", "mal.example.org")] == [
        *("127.0.0.1:50051", "[::1]:50051", "[::1]:50051", "10.0.0.7:50051", "mal.example.org:50051")
    ]
    with pytest.raises(ConfigError, match=r"^listen\.port: 0"):
        address("127.0.0.1", port=0)
    assert probe_of(Listen(port=0), HealthProbe("127.0.0.1:7")).address == "127.0.0.1:7"


def test_a_server_on_this_machine_is_checked_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(proxy: RecordingProxy) -> int:
        monkeypatch.setenv("no_proxy", "")  # as before the command changes it
        for variable in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.url)
        async with serving() as running:
            return await health_of(running)

    with recording_proxy() as proxy:
        assert asyncio.run(work(proxy)) == 0
        assert proxy.requests == []
    # Its own address is this machine, also where it is none of loopback.
    assert probe_of(Listen(host="10.1.2.3", allow_plaintext=True), HealthProbe("")).use_proxy is False
    assert health("mal.example.test:1", "--timeout", "3") == 1
    assert f"HTTPS_PROXY={proxy.url}" in capsys.readouterr().out
