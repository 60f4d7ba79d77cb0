"""Certificates, tokens and scopes over real channels. Refused calls reach no handler."""

import asyncio
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc, labeling_pb2_grpc, model_pb2, model_pb2_grpc
from mal_client.cli import main
from mal_client.client import AsyncClient, Client
from mal_client.errors import InvalidRequest
from mal_client.transport.channel import Connection

from mal_server.config.tokens import TokenSetting
from mal_server.security.auth import read_tokens
from mal_server.server import MalServer
from mal_train.core.errors import ConfigError
from tests.mal_server.calls import reason_of, status_details, until_sent
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, BrightPredictor, config_of, label_request, serving

TOKENS = {name: f"{name}-0123456789abcdef" for name in ("label", "evaluate", "admin")}


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One token for each scope, named after it."""
    for name, token in TOKENS.items():
        monkeypatch.setenv(f"MAL_TEST_{name}", token)
    return [{"name": name, "token": f"env:MAL_TEST_{name}", "scopes": [name]} for name in TOKENS]


Calls = dict[str, Callable[[], Awaitable[Any]]]


def calls_of(channel: grpc.aio.Channel, token: str | None, scheme: str = "Bearer") -> Calls:
    """Returns a call of each service, with a token or none."""
    metadata = () if token is None else (("authorization", f"{scheme} {token}"),)
    labeling: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
    evaluation: Any = evaluation_pb2_grpc.EvaluationServiceStub(channel)
    model: Any = model_pb2_grpc.ModelServiceStub(channel)
    health: Any = health_pb2_grpc.HealthStub(channel)

    async def label() -> list[Any]:
        return [response async for response in labeling.LabelImage(label_request(DISC_BOX), metadata=metadata)]

    async def bulk() -> list[Any]:
        return [response async for response in labeling.LabelImages(iter(()), metadata=metadata)]

    async def evaluate() -> list[Any]:
        first = evaluation_pb2.EvaluateRequest(options=evaluation_pb2.EvaluateOptions())
        return [response async for response in evaluation.Evaluate(iter([first]), metadata=metadata)]

    return {
        "label": label,
        "bulk": bulk,
        "evaluate": evaluate,
        "info": lambda: model.GetServerInfo(model_pb2.GetServerInfoRequest(), metadata=metadata),
        "health": lambda: health.Check(health_pb2.HealthCheckRequest()),
    }


async def outcomes(calls: Calls) -> dict[str, str]:
    """Returns "OK", the reason of the error or, without one, its code, for each call."""
    return {name: await _outcome(call) for name, call in calls.items()}


async def _outcome(call: Callable[[], Awaitable[Any]]) -> str:
    try:
        await until_sent(call)
    except grpc.aio.AioRpcError as error:
        return reason_of(status_details(error)) or error.code().name
    return "OK"


EVERYTHING = dict.fromkeys(("label", "bulk", "evaluate", "info", "health"), "OK")
NOTHING = {**dict.fromkeys(("label", "bulk", "evaluate", "info"), "NO_TOKEN"), "health": "OK"}


@pytest.mark.parametrize(
    ("token", "scheme", "expected"),
    [
        (None, "Bearer", NOTHING),
        ("wrong-0123456789abcdef", "Bearer", NOTHING),
        ("", "Bearer", NOTHING),
        (TOKENS["admin"][:-1], "Bearer", NOTHING),
        (TOKENS["admin"], "Basic", NOTHING),
        (TOKENS["admin"], "bearer", EVERYTHING),
        (TOKENS["admin"], "Bearer", EVERYTHING),
        (TOKENS["label"], "Bearer", {**EVERYTHING, "evaluate": "MISSING_SCOPE"}),
        (TOKENS["evaluate"], "Bearer", {**EVERYTHING, "label": "MISSING_SCOPE", "bulk": "MISSING_SCOPE"}),
    ],
)
def test_a_token_allows_the_methods_of_its_scopes(
    tokens: list[dict[str, Any]], token: str | None, scheme: str, expected: dict[str, str]
) -> None:
    async def work() -> dict[str, str]:
        async with serving(tokens=tokens) as running:
            results = await outcomes(calls_of(running.channel, token, scheme))
            assert len(running.predictor.batches) == (expected["label"] == "OK")
            return results

    assert asyncio.run(work()) == expected


def test_without_tokens_every_client_is_served() -> None:
    async def work() -> dict[str, str]:
        async with serving() as running:
            return await outcomes(calls_of(running.channel, None))

    assert asyncio.run(work()) == EVERYTHING


def test_a_missing_token_and_a_missing_scope_have_different_codes(tokens: list[dict[str, Any]]) -> None:
    async def work() -> list[grpc.StatusCode]:
        codes = []
        async with serving(tokens=tokens) as running:
            for token in (None, TOKENS["evaluate"]):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await calls_of(running.channel, token)["label"]()
                codes.append(raised.value.code())
        return codes

    assert asyncio.run(work()) == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED]


def test_a_token_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    authenticator = read_tokens([TokenSetting(name="a", token=f"file:{path}", scopes=("label",))])
    header = [("authorization", "Bearer 0123456789abcdef")]
    token = authenticator.authenticate("/mal.v1.LabelingService/LabelImage", header)
    assert token is not None
    assert token.name == "a"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("short", "16 to 4096"),
        ("", "16 to 4096"),
        ("x" * 5000, "16 to 4096"),
        ("two words of 16 chars", "ASCII"),
        ("0123456789abcdef\x07", "ASCII"),
        ("0123456789äbcdef", "ASCII"),
    ],
)
def test_an_invalid_token_is_refused_and_not_shown(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_tokens([TokenSetting(name="a", token=f"file:{path}", scopes=("label",))])
    message = str(raised.value)
    assert message.startswith(f"tokens: 'a': file:{path}: ")
    assert rule in message
    assert not text or text not in message


@pytest.mark.parametrize("token", ["file:/none", "env:MAL_NONE"])
def test_a_missing_token_source_is_named(token: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_tokens([TokenSetting(name="a", token=token, scopes=("label",))])
    assert str(raised.value).startswith("tokens: 'a': ")
    assert token.partition(":")[2] in str(raised.value)


def test_one_token_under_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")
    with pytest.raises(ConfigError, match="tokens: 'a' and 'b'"):
        read_tokens([TokenSetting(name=name, token=f"file:{path}", scopes=("label",)) for name in "ab"])


@pytest.mark.parametrize(
    ("settings", "field", "remedy"),
    [
        ({"tokens": [{"name": "a", "token": "hunter2hunter2hunter2", "scopes": ["label"]}]}, "tokens[0]", "env:NAME"),
        ({"tokens": [{"name": "a", "token": "env:A", "scopes": ["root"]}]}, "tokens[0].scopes[0]", "'admin'"),
        ({"tokens": [{"name": "a", "token": "env:A", "scopes": []}]}, "tokens[0].scopes", "1"),
        ({"tokens": [{"name": "a", "token": "env:A"}]}, "tokens[0].scopes", "label, evaluate, admin"),
        ({"tokens": [{"token": "env:A", "scopes": ["label"]}]}, "tokens[0].name", ""),
        ({"listen": {"host": "0.0.0.0"}}, "listen.host", "allow_plaintext"),
        ({"tokens": [{"name": "a", "token": "env:A", "scopes": ["label"]}] * 2}, "tokens", "'a'"),
        ({"listen": {"tls_certificate": "a.pem"}}, "listen.tls_certificate", "listen.tls_key"),
        ({"listen": {"tls_client_ca": "a.pem"}}, "listen.tls_client_ca", "listen.tls_certificate"),
        ({"listen": {"tls_probe_name": "a.org"}}, "listen.tls_probe_name", "listen.tls_certificate"),
    ],
)
def test_a_setting_that_contradicts_another_is_refused(settings: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(**settings)
    message = str(raised.value)
    assert message.startswith((f"{field}: ", f"{field}, "))
    assert remedy in message
    assert "hunter2" not in message


def test_with_a_certificate_every_host_is_allowed() -> None:
    listen = {"host": "0.0.0.0", "tls_certificate": "a.pem", "tls_key": "b.pem"}
    assert config_of(listen=listen).listen.host == "0.0.0.0"


class Certificates:
    """Certificates in a folder: of the authority, the server (127.0.0.1), a client, and clients to refuse."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority = self._write(folder / "ca.pem", authority.cert_pem)
        self.other_authority = self._write(folder / "other.pem", trustme.CA().cert_pem)
        server = authority.issue_cert("127.0.0.1")
        self.certificate = self._write(folder / "server.pem", *server.cert_chain_pems)
        self.key = self._write(folder / "server.key", server.private_key_pem)
        self.client = self._write(folder / "client.pem", authority.issue_cert("me@x").private_key_and_cert_chain_pem)
        past = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
        expired = authority.issue_cert("me@x", not_before=past - datetime.timedelta(days=1), not_after=past)
        self.expired = self._write(folder / "expired.pem", expired.private_key_and_cert_chain_pem)
        foreign = trustme.CA().issue_cert("me@x")
        self.foreign = self._write(folder / "foreign.pem", foreign.private_key_and_cert_chain_pem)

    @staticmethod
    def _write(path: Path, *parts: trustme.Blob) -> Path:
        path.write_bytes(b"".join(part.bytes() for part in parts))
        return path

    def listen(self, *, mutual: bool) -> dict[str, Any]:
        """Returns the section `listen` of the server's settings."""
        client_ca = {"tls_client_ca": str(self.authority)} if mutual else {}
        return {"port": 0, "tls_certificate": str(self.certificate), "tls_key": str(self.key), **client_ca}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@asynccontextmanager
async def reached(address: str, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    channel = Connection(address, **options).open_aio()
    try:
        yield channel
    finally:
        await channel.close(None)


def outcomes_of(listen: dict[str, Any], connections: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns the outcomes of the calls over each connection to one server."""

    async def work() -> list[dict[str, str]]:
        results = []
        async with serving(listen=listen) as running:
            for options in connections:
                async with reached(running.server.address, **options) as channel:
                    calls = calls_of(channel, None)
                    # Health calls are not retried, so a refused handshake ends at once.
                    results.append(await asyncio.wait_for(outcomes({"health": calls["health"]}), 30))
                    if results[-1]["health"] == "OK":
                        results[-1] |= await asyncio.wait_for(outcomes({"label": calls["label"]}), 30)
        return results

    return asyncio.run(work())


def test_tls_serves_only_clients_that_trust_the_authority(certificates: Certificates) -> None:
    connections: list[dict[str, Any]] = [
        *({"tls_ca": certificates.authority}, {"tls_ca": certificates.other_authority}),
        *({"tls": True}, {}),
    ]
    trusting, *others = outcomes_of(certificates.listen(mutual=False), connections)
    assert set(trusting.values()) == {"OK"}
    assert [set(other.values()) for other in others] == [{"UNAVAILABLE"}] * 3


def test_mutual_tls_serves_only_clients_with_a_valid_certificate_of_the_authority(certificates: Certificates) -> None:
    known = {"tls_ca": certificates.authority}
    files = (certificates.client, certificates.expired, certificates.foreign)
    connections = [*({**known, "client_cert": path} for path in files), known]
    valid, *others = outcomes_of(certificates.listen(mutual=True), connections)
    assert set(valid.values()) == {"OK"}
    assert [set(other.values()) for other in others] == [{"UNAVAILABLE"}] * 3


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tls_certificate", "none.pem"),
        ("tls_certificate", "server.key"),
        ("tls_key", "expired.pem"),
        ("tls_client_ca", "server.key"),
    ],
)
def test_an_unusable_tls_file_is_named_with_its_setting(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    monkeypatch.chdir(certificates.key.parent)
    with pytest.raises(ConfigError) as raised:
        MalServer(config_of(listen={**certificates.listen(mutual=True), name: file}))
    assert f"listen.{name}: " in str(raised.value)
    assert file in str(raised.value)


def test_both_clients_present_certificate_and_token(certificates: Certificates, tokens: list[dict[str, Any]]) -> None:
    known: dict[str, Any] = {"tls_ca": certificates.authority, "client_cert": certificates.client}

    def blocking(address: str) -> None:
        with Client(address, **known, token=TOKENS["label"]) as client:
            assert len(client.label_image(DISC_PNG, [DISC_BOX])) == 1
        with Client(address, **known) as client, pytest.raises(InvalidRequest) as raised:
            client.label_image(DISC_PNG, [DISC_BOX])
        assert raised.value.reason == "NO_TOKEN"

    async def work() -> None:
        async with serving(listen=certificates.listen(mutual=True), tokens=tokens) as running:
            await asyncio.to_thread(blocking, running.server.address)
            async with AsyncClient(running.server.address, **known, token=TOKENS["label"]) as client:
                assert len(await client.label_image(DISC_PNG, [DISC_BOX])) == 1

    asyncio.run(work())


def test_a_token_works_without_tls_on_loopback(tokens: list[dict[str, Any]]) -> None:
    async def work() -> None:
        async with serving(BrightPredictor(), tokens=tokens) as running:
            async with AsyncClient(running.server.address, token=TOKENS["label"]) as client:
                assert len(await client.label_image(DISC_PNG, [DISC_BOX])) == 1
            with Client(running.server.address, token=TOKENS["label"]) as blocking:
                assert len(await asyncio.to_thread(blocking.label_image, DISC_PNG, [DISC_BOX])) == 1

    asyncio.run(work())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"token": "abc"}, ("token", "tls_ca")),
        ({"token": "a b", "tls": True}, ("token",)),
        ({"token": "", "tls": True}, ("token",)),
        ({"client_cert": "a.pem"}, ("client_cert", "a.pem", "tls_ca")),
        ({"client_key": "a.pem", "tls": True}, ("client_key", "a.pem", "client_cert")),
        ({"tls_ca": "none.pem"}, ("tls_ca", "none.pem")),
        ({"tls_ca": __file__}, ("tls_ca", __file__)),
    ],
)
def test_a_client_names_the_option_that_is_wrong(options: dict[str, Any], named: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        Client("example.org:50051", **options)
    assert [name for name in named if name not in str(raised.value)] == []


def test_a_pem_file_without_the_needed_block_is_named_before_any_call(certificates: Certificates) -> None:
    with pytest.raises(ConfigError, match=r"^--tls-ca .*: .*server\.key"):
        Client("localhost:1", tls_ca=certificates.key)
    with pytest.raises(ConfigError, match=r"^--client-key .*: .*ca\.pem"):
        Client("localhost:1", tls_ca=certificates.authority, client_cert=certificates.authority)


def test_the_command_line_passes_certificate_and_token(
    certificates: Certificates, tokens: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKENS["label"] + "\n")

    async def work() -> tuple[int, int]:
        async with serving(listen=certificates.listen(mutual=True), tokens=tokens) as running:
            known = ["--tls-ca", str(certificates.authority), "--client-cert", str(certificates.client)]
            line = ["info", "--server", running.server.address, *known]
            return (
                await asyncio.to_thread(main.main, [*line, "--token-file", str(path)]),
                await asyncio.to_thread(main.main, [*line, "--token-file", str(path) + "x"]),
            )

    assert asyncio.run(work()) == (0, 2)
    captured = capsys.readouterr()
    assert '"model": "disc"' in captured.out
    assert "--token-file" in captured.err


def test_a_missing_token_and_an_untrusted_authority_name_their_option(
    certificates: Certificates, tokens: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> list[int]:
        async with serving(listen=certificates.listen(mutual=False), tokens=tokens) as running:
            line = ["info", "--server", running.server.address, "--tls-ca"]
            return [
                await asyncio.to_thread(main.main, [*line, str(certificates.authority)]),
                await asyncio.to_thread(main.main, [*line, str(certificates.other_authority)]),
            ]

    assert asyncio.run(work()) == [2, 1]
    without_token, untrusted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mal-client:")]
    assert "--token-file" in without_token
    assert "--tls-ca" in untrusted
