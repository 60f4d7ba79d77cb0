"""Certificates and tokens that change while the server runs: valid ones take effect, invalid ones are ignored."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from mal.v1 import model_pb2, model_pb2_grpc

from mal_server.lifecycle import serve
from mal_server.security.tls import CertificateReloader
from mal_train.core.errors import ConfigError
from tests.mal_server.calls import reason_of, status_details
from tests.mal_server.fakes import BrightPredictor, config_of, loaded, serving
from tests.mal_server.security.test_auth import outcomes, reached

OLD, NEW = "old-0123456789abcdef", "new-0123456789abcdef"


class Authority:
    """A certificate authority that writes the server's certificate into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = trustme.CA()

    def trust(self, name: str) -> Path:
        path = self.folder / f"{name}.ca.pem"
        path.write_bytes(self._ca.cert_pem.bytes())
        return path

    def issue(self) -> None:
        certificate = self._ca.issue_cert("127.0.0.1")
        (self.folder / "key.pem").write_bytes(certificate.private_key_pem.bytes())
        (self.folder / "cert.pem").write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))


def listening(folder: Path) -> dict[str, Any]:
    return {"port": 0, "tls_certificate": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}


async def connect(address: str, authority: Path) -> str:
    """Returns the outcome of a call over a new connection."""
    async with reached(address, tls_ca=authority) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        results = await outcomes({"info": lambda: stub.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=20)})
        return results["info"]


def test_a_renewed_certificate_serves_new_connections_without_a_restart(tmp_path: Path) -> None:
    first, second = Authority(tmp_path), Authority(tmp_path)
    first.issue()

    async def work() -> list[str]:
        async with serving(listen=listening(tmp_path)) as running:
            address = running.server.address
            before = await connect(address, first.trust("first"))
            second.issue()
            return [
                before,
                await connect(address, second.trust("second")),
                await connect(address, first.trust("first")),
            ]

    assert asyncio.run(work()) == ["OK", "OK", "UNAVAILABLE"]


def test_a_connection_outlives_the_renewal(tmp_path: Path) -> None:
    first, second = Authority(tmp_path), Authority(tmp_path)
    first.issue()

    async def work() -> list[str]:
        async with serving(listen=listening(tmp_path)) as running:
            address = running.server.address
            async with reached(address, tls_ca=first.trust("first")) as channel:
                stub: Any = model_pb2_grpc.ModelServiceStub(channel)

                def call() -> Any:
                    return stub.GetServerInfo(model_pb2.GetServerInfoRequest())

                before = await outcomes({"info": call})
                second.issue()
                await connect(address, second.trust("second"))
                return [before["info"], (await outcomes({"info": call}))["info"]]

    assert asyncio.run(work()) == ["OK", "OK"]


def use_key_of_another_certificate(folder: Path) -> None:
    Authority(folder.parent / "other").issue()
    (folder.parent / "other" / "key.pem").rename(folder / "key.pem")


@pytest.mark.parametrize(
    "break_files",
    [
        lambda folder: (folder / "cert.pem").write_text("no certificate"),
        lambda folder: (folder / "cert.pem").unlink(),
        use_key_of_another_certificate,
    ],
)
def test_an_unusable_certificate_is_logged_once_and_the_previous_one_stays_in_force(
    tmp_path: Path, break_files: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    first = Authority(folder)
    first.issue()
    trusted = first.trust("first")

    async def work() -> list[str]:
        async with serving(listen=listening(folder)) as running:
            break_files(folder)
            return [await connect(running.server.address, trusted) for _ in range(3)]

    with caplog.at_level(logging.ERROR, "mal_server.security.tls"):
        assert asyncio.run(work()) == ["OK"] * 3
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    Authority(tmp_path).issue()
    listen = config_of(listen=listening(tmp_path)).listen
    reloader = CertificateReloader(listen, tmp_path / "cert.pem", tmp_path / "key.pem")
    assert reloader.reload_if_changed() is None
    Authority(tmp_path).issue()
    assert reloader.reload_if_changed() is not None
    assert reloader.reload_if_changed() is None


async def call_with(address: str, token: str) -> str:
    """Returns "OK", or the reason why a call with this token is refused."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        try:
            metadata = (("authorization", f"Bearer {token}"),)
            await stub.GetServerInfo(model_pb2.GetServerInfoRequest(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return reason_of(status_details(error))
        return "OK"


def tokens_at(path: Path) -> list[dict[str, Any]]:
    return [{"name": "a", "token": f"file:{path}", "scopes": ["label"]}]


def test_a_new_token_in_a_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(OLD)

    async def work() -> list[Any]:
        async with serving(tokens=tokens_at(path)) as running:
            address = running.server.address
            before = [await call_with(address, token) for token in (OLD, NEW)]
            path.write_text(NEW)
            changed = await running.server.reload_tokens()
            again = await running.server.reload_tokens()
            return [before, [await call_with(address, token) for token in (OLD, NEW)], changed, again]

    assert asyncio.run(work()) == [["OK", "NO_TOKEN"], ["NO_TOKEN", "OK"], True, False]


@pytest.mark.parametrize("text", ["", "short", None])
def test_an_unusable_token_file_leaves_the_previous_tokens_in_force(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "token"
    path.write_text(OLD)

    async def work() -> str:
        async with serving(tokens=tokens_at(path)) as running:
            path.unlink()
            if text is not None:
                path.write_text(text)
            with pytest.raises(ConfigError, match="tokens: 'a'"):
                await running.server.reload_tokens()
            return await call_with(running.server.address, OLD)

    assert asyncio.run(work()) == "OK"


def test_a_reload_that_removes_every_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(OLD)

    async def work() -> str:
        async with serving(tokens=tokens_at(path)) as running:
            with pytest.raises(ConfigError, match=r"^tokens: "):
                await running.server.reload_tokens(())
            return await call_with(running.server.address, NEW)

    assert asyncio.run(work()) == "NO_TOKEN"


def test_sighup_reloads_the_tokens_and_names_settings_that_need_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, port_file = tmp_path / "old", tmp_path / "new", tmp_path / "address"
    old.write_text(OLD)
    new.write_text(NEW)
    config = config_of(tokens=tokens_at(old))
    changed = config_of(tokens=tokens_at(new), max_batch_size=3)

    async def client() -> list[str]:
        while not port_file.exists():
            await asyncio.sleep(0.005)
        address = port_file.read_text().strip()
        results = [await call_with(address, OLD)]
        os.kill(os.getpid(), signal.SIGHUP)
        while await call_with(address, NEW) != "OK":
            await asyncio.sleep(0.01)
        results.append(await call_with(address, OLD))
        os.kill(os.getpid(), signal.SIGTERM)
        return results

    async def work() -> list[str]:
        task = asyncio.create_task(client())
        predictor = BrightPredictor()
        await serve(
            config, port_file=port_file, load=lambda plan: loaded(plan, predictor), reload_config=lambda: changed
        )
        return await task

    with caplog.at_level(logging.INFO, "mal_server.lifecycle"):
        assert asyncio.run(asyncio.wait_for(work(), 30)) == ["OK", "NO_TOKEN"]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "max_batch_size" in warning.getMessage()
    assert "tokens" not in warning.getMessage()


def test_a_sighup_during_loading_takes_effect_once_the_server_serves(tmp_path: Path) -> None:
    old, new, port_file = tmp_path / "old", tmp_path / "new", tmp_path / "address"
    old.write_text(OLD)
    new.write_text(NEW)

    def load(plan: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return loaded(plan, BrightPredictor())

    async def client() -> None:
        while not port_file.exists():
            await asyncio.sleep(0.005)
        while await call_with(port_file.read_text().strip(), NEW) != "OK":
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    async def work() -> None:
        task = asyncio.create_task(client())
        config = config_of(tokens=tokens_at(old))
        await serve(config, port_file=port_file, load=load, reload_config=lambda: config_of(tokens=tokens_at(new)))
        await task

    # If the server had no handler yet, this one would get the signal instead of ending the process.
    missed: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: missed.append(number))
    try:
        asyncio.run(asyncio.wait_for(work(), 30))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert missed == []


def test_a_sighup_during_imports_is_handled_once_the_server_serves(tmp_path: Path) -> None:
    """SIGHUP arrives with the first read of the settings. The second read, which it causes, ends the server."""
    (tmp_path / "server.yaml").write_text("gpu_ids: []\ndrain_delay_s: 0\nlisten: {port: 0}\n")
    code = (
        "import os, signal, sys\n"
        "from mal_server import cli\nfrom mal_server.config import server as config\n"
        "signals, inner = iter([signal.SIGHUP, signal.SIGTERM]), config.load_config\n"
        "def reading(*arguments):\n"
        "    os.kill(os.getpid(), next(signals))\n"
        "    return inner(*arguments)\n"
        "config.load_config = reading\n"
        "sys.exit(cli.main(['serve', '-c', sys.argv[1]]))\n"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "server.yaml")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, "draining" in done.stderr) == (0, True), done.stderr


def test_an_unexpected_error_in_a_reload_is_logged_and_the_next_reload_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, port_file = tmp_path / "old", tmp_path / "new", tmp_path / "address"
    old.write_text(OLD)
    new.write_text(NEW)
    reads: list[str] = []

    def reload_config() -> Any:
        reads.append("read")
        if len(reads) == 1:
            raise RuntimeError("unforeseen")
        return config_of(tokens=tokens_at(new))

    async def client() -> str:
        while not port_file.exists():
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGHUP)
        while "unforeseen" not in caplog.text:
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGHUP)
        while await call_with(port_file.read_text().strip(), NEW) != "OK":
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return "renewed"

    async def work() -> str:
        task = asyncio.create_task(client())
        predictor = BrightPredictor()
        config = config_of(tokens=tokens_at(old))
        await serve(config, port_file=port_file, load=lambda plan: loaded(plan, predictor), reload_config=reload_config)
        return await task

    with caplog.at_level(logging.ERROR, "mal_server.lifecycle"):
        assert asyncio.run(asyncio.wait_for(work(), 60)) == "renewed"
