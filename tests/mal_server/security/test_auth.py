"""Who gets in: certificates, tokens and their scopes, seen through real channels. Refused calls reach no handler."""

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
from tests.mal_server.calls import reason_of, status_details
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, BrightPredictor, config_of, label_request, serving

TOKENS = {name: f"{name}-0123456789abcdef" for name in ("label", "evaluate", "admin")}


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One token for each scope, named after it."""
    for name, token in TOKENS.items():
        monkeypatch.setenv(f"MAL_TEST_{name}", token)
    return [{"name": name, "token": f"env:MAL_TEST_{name}", "scopes": [name]} for name in TOKENS]


Calls = dict[str, Callable[[], Awaitable[Any]]]


def calls_of(channel: grpc.aio.Channel, token: str | None, kind: str = "Bearer") -> Calls:
    """A call of each service, with a token or none."""
    metadata = () if token is None else (("authorization", f"{kind} {token}"),)
    labeling: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
    evaluation: Any = evaluation_pb2_grpc.EvaluationServiceStub(channel)
    model: Any = model_pb2_grpc.ModelServiceStub(channel)
    health: Any = health_pb2_grpc.HealthStub(channel)

    async def label() -> list[Any]:
        return [answer async for answer in labeling.LabelImage(label_request(DISC_BOX), metadata=metadata)]

    async def bulk() -> list[Any]:
        return [answer async for answer in labeling.LabelImages(iter(()), metadata=metadata)]

    async def evaluate() -> list[Any]:
        first = evaluation_pb2.EvaluateRequest(options=evaluation_pb2.EvaluateOptions())
        return [answer async for answer in evaluation.Evaluate(iter([first]), metadata=metadata)]

    return {
        "label": label,
        "bulk": bulk,
        "evaluate": evaluate,
        "info": lambda: model.GetServerInfo(model_pb2.GetServerInfoRequest(), metadata=metadata),
        "health": lambda: health.Check(health_pb2.HealthCheckRequest()),
    }


async def outcomes(calls: Calls) -> dict[str, str]:
    """ "OK", or the reason of the refusal (its code where it has none), of each call."""
    found = {}
    for name, call in calls.items():
        try:
            await call()
            found[name] = "OK"
        except grpc.aio.AioRpcError as error:
            found[name] = reason_of(status_details(error)) or error.code().name
    return found


EVERYTHING = dict.fromkeys(("label", "bulk", "evaluate", "info", "health"), "OK")
NOTHING = {**dict.fromkeys(("label", "bulk", "evaluate", "info"), "NO_TOKEN"), "health": "OK"}


@pytest.mark.parametrize(
    ("token", "kind", "expected"),
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
def test_a_token_opens_what_its_scopes_say(
    tokens: list[dict[str, Any]], token: str | None, kind: str, expected: dict[str, str]
) -> None:
    async def work() -> dict[str, str]:
        async with serving(tokens=tokens) as running:
            found = await outcomes(calls_of(running.channel, token, kind))
            assert len(running.predictor.batches) == (expected["label"] == "OK")
            return found

    assert asyncio.run(work()) == expected


def test_without_tokens_everybody_is_served() -> None:
    async def work() -> dict[str, str]:
        async with serving() as running:
            return await outcomes(calls_of(running.channel, None))

    assert asyncio.run(work()) == EVERYTHING


def test_the_codes_tell_a_missing_token_from_a_missing_scope(tokens: list[dict[str, Any]]) -> None:
    async def work() -> list[grpc.StatusCode]:
        codes = []
        async with serving(tokens=tokens) as running:
            for token in (None, TOKENS["label"]):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await calls_of(running.channel, token)["evaluate"]()
                codes.append(raised.value.code())
        return codes

    assert asyncio.run(work()) == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED]


def test_tokens_come_from_files_too(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    access = read_tokens([TokenSetting(name="a", token=f"file:{path}", scopes=("label",))])
    assert access.caller("/mal.v1.LabelingService/LabelImage", [("authorization", "Bearer 0123456789abcdef")]) == "a"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("short", "16 to 4096 characters"),
        ("", "16 to 4096 characters"),
        ("two words of 16 chars", "one word of printable ASCII"),
        ("0123456789abcdef\x07", "one word of printable ASCII"),
        ("0123456789äbcdef", "one word of printable ASCII"),
        ("x" * 5000, "16 to 4096 characters"),
    ],
)
def test_a_token_that_cannot_be_used_is_refused_and_not_shown(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        read_tokens([TokenSetting(name="a", token=f"file:{path}", scopes=("label",))])
    assert not text or text not in str(raised.value)


@pytest.mark.parametrize(("token", "said"), [("file:/none", "No such file"), ("env:MAL_NONE", "no such variable")])
def test_a_token_that_is_not_there_is_named(token: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_tokens([TokenSetting(name="a", token=token, scopes=("label",))])


def test_one_token_under_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")
    with pytest.raises(ConfigError, match="'a' and 'b' are the same"):
        read_tokens([TokenSetting(name=name, token=f"file:{path}", scopes=("label",)) for name in "ab"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": [{"name": "a", "token": "hunter2hunter2hunter2", "scopes": ["label"]}]}, "file:PATH or env:NAME"),
        ({"tokens": [{"name": "a", "token": "env:A", "scopes": ["root"]}]}, "scopes"),
        ({"tokens": [{"name": "a", "token": "env:A", "scopes": []}]}, "scopes"),
        (
            {"tokens": [{"name": "a", "token": "env:A"}]},
            r"tokens\[0\].scopes: required, .*; it takes label, evaluate, admin$",
        ),
        ({"tokens": [{"token": "env:A", "scopes": ["label"]}]}, r"tokens\[0\].name: required, but not given$"),
        ({"listen": {"host": "0.0.0.0"}}, "^listen.host: '0.0.0.0' is"),
        ({"tokens": [{"name": "a", "token": "env:A", "scopes": ["label"]}] * 2}, "a name stands twice"),
        ({"listen": {"tls_certificate": "a.pem"}}, "give both or neither"),
        ({"listen": {"tls_client_ca": "a.pem"}}, "without listen.tls_certificate"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        config_of(**settings)
    assert "hunter2" not in str(raised.value)


def test_with_a_certificate_other_hosts_are_allowed() -> None:
    listen = {"host": "0.0.0.0", "tls_certificate": "a.pem", "tls_key": "b.pem"}
    assert config_of(listen=listen).listen.host == "0.0.0.0"


class Papers:
    """Certificates in a folder: the authority's, the server's (127.0.0.1), a client's, and an expired client's."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority = self._write(folder / "ca.pem", authority.cert_pem)
        self.stranger = self._write(folder / "other.pem", trustme.CA().cert_pem)
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
        """The server's settings."""
        client_ca = {"tls_client_ca": str(self.authority)} if mutual else {}
        return {"port": 0, "tls_certificate": str(self.certificate), "tls_key": str(self.key), **client_ca}


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


@asynccontextmanager
async def reached(address: str, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    channel = Connection(address, **options).open_aio()
    try:
        yield channel
    finally:
        await channel.close(None)


def codes_of(listen: dict[str, Any], ways: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Outcomes of the calls by each way to connect, of one server."""

    async def work() -> list[dict[str, str]]:
        found = []
        async with serving(listen=listen) as running:
            for way in ways:
                async with reached(running.server.address, **way) as channel:
                    calls = calls_of(channel, None)
                    # Health has no retries to wait for; whoever gets through the handshake may label as well.
                    found.append(await asyncio.wait_for(outcomes({"health": calls["health"]}), 30))
                    if found[-1]["health"] == "OK":
                        found[-1] |= await asyncio.wait_for(outcomes({"label": calls["label"]}), 30)
        return found

    return asyncio.run(work())


def test_tls_serves_those_who_trust_the_certificate_and_nobody_else(papers: Papers) -> None:
    ways: list[dict[str, Any]] = [{"tls_ca": papers.authority}, {"tls_ca": papers.stranger}, {"tls": True}, {}]
    trusting, *others = codes_of(papers.listen(mutual=False), ways)
    assert set(trusting.values()) == {"OK"}
    assert [set(other.values()) for other in others] == [{"UNAVAILABLE"}] * 3


def test_mutual_tls_serves_only_clients_with_a_valid_certificate_of_the_authority(papers: Papers) -> None:
    known = {"tls_ca": papers.authority}
    shown = [{**known, "client_cert": path} for path in (papers.client, papers.expired, papers.foreign)]
    valid, *others = codes_of(papers.listen(mutual=True), [*shown, known])
    assert set(valid.values()) == {"OK"}
    assert [set(other.values()) for other in others] == [{"UNAVAILABLE"}] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tls_certificate": "none.pem"}, "listen.tls_certificate: none.pem cannot be read"),
        ({"tls_key": "expired.pem"}, "no PEM certificate with its unencrypted private key"),
        ({"tls_certificate": "server.key"}, "no PEM certificate with its unencrypted private key"),
        ({"tls_client_ca": "server.key"}, "holds no PEM certificate"),
    ],
)
def test_papers_that_cannot_be_used_are_named(
    papers: Papers, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(papers.key.parent)
    with pytest.raises(ConfigError, match=said):
        MalServer(config_of(listen={**papers.listen(mutual=True), **change}))


def test_the_clients_bring_certificate_and_token(papers: Papers, tokens: list[dict[str, Any]]) -> None:
    known: dict[str, Any] = {"tls_ca": papers.authority, "client_cert": papers.client}

    def blocking(address: str) -> None:
        with Client(address, **known, token=TOKENS["label"]) as client:
            assert len(client.label_image(DISC_PNG, [DISC_BOX])) == 1
        with Client(address, **known) as client, pytest.raises(InvalidRequest, match="no token"):
            client.label_image(DISC_PNG, [DISC_BOX])

    async def work() -> None:
        async with serving(listen=papers.listen(mutual=True), tokens=tokens) as running:
            await asyncio.to_thread(blocking, running.server.address)
            async with AsyncClient(running.server.address, **known, token=TOKENS["label"]) as client:
                assert len(await client.label_image(DISC_PNG, [DISC_BOX])) == 1

    asyncio.run(work())


def test_a_token_also_works_at_the_near_end_of_a_tunnel(tokens: list[dict[str, Any]]) -> None:
    async def work() -> None:
        async with serving(BrightPredictor(), tokens=tokens) as running:
            async with AsyncClient(running.server.address, token=TOKENS["label"]) as client:
                assert len(await client.label_image(DISC_PNG, [DISC_BOX])) == 1
            with Client(running.server.address, token=TOKENS["label"]) as blocking:
                assert len(await asyncio.to_thread(blocking.label_image, DISC_PNG, [DISC_BOX])) == 1

    asyncio.run(work())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token": "abc"}, "could read the token"),
        ({"token": "a b", "tls": True}, "one word"),
        ({"token": "", "tls": True}, "one word"),
        ({"client_cert": "a.pem"}, "only shown with TLS"),
        ({"client_key": "a.pem", "tls": True}, "give the certificate"),
        ({"tls_ca": "none.pem"}, "tls_ca: none.pem cannot be read"),
        ({"tls_ca": __file__}, "is no PEM file"),
    ],
)
def test_a_client_says_what_is_wrong_with_its_papers(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Client("example.org:50051", **options)


def test_a_pem_file_of_another_kind_is_named_before_anybody_is_called(papers: Papers) -> None:
    with pytest.raises(ConfigError, match=r"tls_ca: .*server\.key holds no certificate"):
        Client("localhost:1", tls_ca=papers.key)
    with pytest.raises(ConfigError, match=r"client_key: .* holds no private key"):
        Client("localhost:1", tls_ca=papers.authority, client_cert=papers.authority)


def test_the_command_line_brings_them_too(
    papers: Papers, tokens: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKENS["label"] + "\n")

    async def work() -> tuple[int, int]:
        async with serving(listen=papers.listen(mutual=True), tokens=tokens) as running:
            known = ["--tls-ca", str(papers.authority), "--client-cert", str(papers.client)]
            line = ["info", "--server", running.server.address, *known]
            return (
                await asyncio.to_thread(main.main, [*line, "--token-file", str(path)]),
                await asyncio.to_thread(main.main, [*line, "--token-file", str(path) + "x"]),
            )

    assert asyncio.run(work()) == (0, 2)
    captured = capsys.readouterr()
    assert '"model": "disc"' in captured.out
    assert "--token-file" in captured.err


def test_the_remedy_for_a_missing_token_and_for_a_foreign_authority_is_the_option_to_give(
    papers: Papers, tokens: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> list[int]:
        async with serving(listen=papers.listen(mutual=False), tokens=tokens) as running:
            line = ["info", "--server", running.server.address, "--tls-ca"]
            return [
                await asyncio.to_thread(main.main, [*line, str(papers.authority)]),
                await asyncio.to_thread(main.main, [*line, str(papers.stranger)]),
            ]

    assert asyncio.run(work()) == [2, 1]
    without_token, untrusted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mal-client:")]
    assert without_token.endswith("the client shows the one of --token-file (token)")
    assert untrusted.endswith("give that one with --tls-ca (tls_ca)")
