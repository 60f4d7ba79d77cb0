"""`mal-server health`: one word and an exit code about a running server."""

import asyncio
from pathlib import Path

import pytest

from mal_server import cli
from tests.server.fakes import Running, serving
from tests.server.test_access import Papers


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
    words = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert words == ["SERVING", "SERVING", "SERVICE_UNKNOWN", "NOT_SERVING"]


def test_where_nobody_listens_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("127.0.0.1:1", "--timeout", "5") == 1
    assert "UNREACHABLE (UNAVAILABLE" in capsys.readouterr().out


def test_health_is_asked_over_tls_by_the_name_in_the_certificate(tmp_path: Path) -> None:
    papers = Papers(tmp_path)
    trusted = ["--tls-ca", str(papers.authority), "--client-cert", str(papers.client), "--tls-name", "127.0.0.1"]

    async def work() -> list[int]:
        async with serving(listen=papers.listen(mutual=True)) as running:
            return [await ask(running, *trusted), await ask(running, *trusted[:2], "--timeout", "1")]

    assert asyncio.run(work()) == [0, 1]


@pytest.mark.parametrize("line", [["--tls-ca", "/none.pem"], ["--client-cert", "/none.pem"], ["--tls-name", "x"]])
def test_papers_that_cannot_be_used_are_a_usage_error(line: list[str]) -> None:
    assert asked("127.0.0.1:1", *line) == 2
