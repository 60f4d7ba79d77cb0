"""Keys, passphrase, tokens and passwords of a complete session are found nowhere but in the files that hold them.

The commands run as processes under umask 000: keygen, train, serve, label, check and inference in a store and at signed
addresses, playground, Label Studio backend. Searched are what they print, all files that they leave, temporary ones
included, metrics, traces, and the arguments of every process while they run. The environment of a process is not: only
its owner and root can read it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from urllib.request import url2pathname

import grpc
import pytest
import yaml
from mal_client.cli.main import main as client_main

from mal_train.core.settings import LabelerConfig
from mal_train.distributed.launch import free_port
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key
from tests.mal_server.security.test_auth import Certificates
from tests.mal_train.core.storage.test_web import serving as serving_web
from tests.mal_train.training.runs import SMALL
from tests.networks import spread_network
from tests.object_store import S3, SECRET_KEY
from tests.scenes import write_scenes

pytestmark = pytest.mark.timeout(600)
READY_S = 300.0

PASSPHRASE = "correct horse battery staple"
TOKEN = "token-7Xq9Lw2Rt5"
PASSWORD = "password-4Kd8Zn1Vb6"
API_KEY = "apikey-3Hf6Ym0Qs2"
SIGNATURE = "signature-9Tb5Jc2Wd7"
COMMANDS = {
    "mal-train": "from mal_train.cli import main",
    "mal-server": "from mal_server.cli import main",
    "mal-client": "from mal_client.cli.main import main",
}


def words(command: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", f"import sys; {COMMANDS[command]}; sys.exit(main())", *map(str, arguments)]


class Session:
    """The folder of a session, the secrets in it, and all that its processes print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets = {"passphrase": PASSPHRASE, "token": TOKEN, "password": PASSWORD, "API key": API_KEY}
        self.secrets |= {"AWS secret key": SECRET_KEY, "signature": SIGNATURE}
        self.printed: dict[str, bytes] = {}
        (folder / "secret").mkdir(mode=0o700)
        (folder / "tmp").mkdir()
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "TMPDIR": str(folder / "tmp"),
            "no_proxy": "127.0.0.1,localhost",
        }

    def secret_file(self, name: str, content: str) -> Path:
        """Writes a file with a secret."""
        path = self.folder / "secret" / name
        path.write_text(f"{content}\n")
        path.chmod(0o600)
        return path

    def found(self, content: bytes) -> list[str]:
        """Returns the names of the secrets in a text, as they are or in base64."""
        pairs = {**self.secrets, "credentials": base64.b64encode(f"studio:{PASSWORD}".encode()).decode()}
        return [name for name, secret in pairs.items() if secret.encode() in content]

    def run(self, command: str, *arguments: object) -> bytes:
        """Runs a command to its end; returns what it printed."""
        line = words(command, *arguments)
        done = subprocess.run(line, env=self.environment, capture_output=True, check=False, umask=0, timeout=READY_S)
        output = self.printed[f"{command} {arguments[0]}"] = done.stdout + done.stderr
        assert done.returncode in (0, 3), output.decode()
        return output

    @contextmanager
    def running(
        self, command: str, *arguments: object, until: str, **environment: str
    ) -> Iterator[tuple[subprocess.Popen[bytes], re.Match[str]]]:
        """Runs a command during the block, from the line of its output that matches `until`."""
        name = f"{command} {arguments[0]}"
        log = self.folder / "logs" / name.replace(" ", "-")
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(
                words(command, *arguments),
                env={**self.environment, "PYTHONUNBUFFERED": "1", **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                umask=0,
            )
        try:
            wait_for(lambda: re.search(until, log.read_text()) is not None or process.poll() is not None)
            match = re.search(until, log.read_text())
            assert match is not None, log.read_text()
            yield process, match
            process.send_signal(signal.SIGTERM)
            process.wait(READY_S)
        finally:
            process.kill()
            process.wait()
            self.printed[name] = log.read_bytes()
            log.unlink()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + READY_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


class ProcessList(threading.Thread):
    """Collects the arguments of all processes, as every account can list them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.arguments: set[bytes] = set()
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Lists the processes until `stop`."""
        while not self._stop_event.wait(0.05):
            for process in Path("/proc").iterdir():
                if process.name.isdecimal():
                    try:
                        self.arguments.add((process / "cmdline").read_bytes())
                    except OSError:  # it has ended
                        continue

    def stop(self) -> None:
        """Ends the thread."""
        self._stop_event.set()
        self.join()


class TraceSink(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Receives what the server exports, whatever the method."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Returns a handler that keeps the bytes."""

        def keep(request: bytes, _: Any) -> bytes:
            self.received.append(request)
            return b""

        return grpc.unary_unary_rpc_method_handler(keep)


@contextmanager
def trace_sink() -> Iterator[tuple[TraceSink, str]]:
    sink, server = TraceSink(), grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((sink,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield sink, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def fetch(url: str, data: bytes | None = None, **headers: str) -> tuple[bytes, dict[str, str]]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, names), timeout=READY_S) as response:
        return response.read(), dict(response.headers)


def trained(session: Session, images: Path, annotations: Path) -> Path:
    """Trains a tiny network; returns its checkpoint, which the passphrase opens."""
    sections: dict[str, Any] = {
        "results_dir": str(session.folder / "results"),
        "encryption_key": f"file:{session.secret_file('passphrase', PASSPHRASE)}",
    }
    more = ["train.num_epochs=1", "train.gpu_ids=[]", "dataset.num_workers_per_gpu=0"]
    for override in [*SMALL, *more]:
        section, name, value = re.split(r"[.=]", override, maxsplit=2)
        sections.setdefault(section, {})[name] = yaml.safe_load(value)
    sections["dataset"] |= {"train_ann_path": str(annotations), "train_img_dir": str(images)}
    (session.folder / "spec.yaml").write_text(yaml.safe_dump(sections))
    session.run("mal-train", "train", "-e", session.folder / "spec.yaml")
    (checkpoint,) = (session.folder / "results").rglob("model_epoch_*.malckpt")
    return checkpoint


def sealed(session: Session) -> Path:
    """Creates an identity by keygen; returns a checkpoint that it opens."""
    identity = session.folder / "secret" / "identity.txt"
    output = session.run("mal-train", "keygen", "-o", identity)
    assert stat.S_IMODE(identity.stat().st_mode) == 0o600
    session.secrets["identity"] = re.findall(r"AGE-SECRET-KEY-1\w+", identity.read_text())[0]
    recipient = re.findall(r"age1\w+", output.decode())[0]
    network = spread_network(1)
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    path = session.folder / "sealed.malckpt"
    key = parse_key(recipient, purpose="encryption", source="command line")
    save_checkpoint(path, Checkpoint(network.config, LabelerConfig(crop_size=64), weights, []), key)
    return path


def label(session: Session, connection: list[object], images: Path, annotations: Path) -> None:
    """Labels the data set into a journal, and from it into a file with a review page."""
    output = session.folder / "out.json"
    files: list[object] = ["--annotations", annotations, "--images", images]
    session.run("mal-client", "label", *connection, *files, "--output", output, "--shard", "0/1")
    ledger = session.folder / "out.json.ledger.0-of-1"
    (session.folder / "kept.ledger").write_bytes(ledger.read_bytes())
    assert client_main(["merge", "--annotations", str(annotations), "--output", str(output), "--shards", "1"]) in (0, 3)
    pages = ["--report", str(session.folder / "review.html"), "--cvat", str(session.folder / "cvat")]
    assert client_main(["review", "--annotations", str(output), "--images", str(images), *pages]) == 0


def use_store(session: Session, connection: list[object], s3: S3, images: Path, annotations: Path) -> None:
    """Labels a data set in a store into a journal that stays, and again where the store refuses."""
    s3.put("in.json", annotations.read_bytes())
    (session.folder / "work").mkdir()
    places = ["--annotations", s3.address("in.json"), "--images", s3.put_folder(images, "images")]
    command: list[object] = ["label", *connection, *places, "--work-dir", session.folder / "work"]
    session.run("mal-client", *command, "--output", s3.address("out.json"), "--shard", "0/1")
    s3.fail(f"images/{next(images.iterdir()).name}", status=403, code="AccessDenied")
    session.run("mal-client", *command, "--output", s3.address("again.json"))
    for key in s3.names():
        assert session.found(s3.get(key) or b"") == []


def use_signed_addresses(session: Session, images: Path, annotations: Path) -> None:
    """Checks images at signed URLs, one of which is missing, and labels by a spec with a signed address."""
    with serving_web() as web:
        coco = json.loads(annotations.read_bytes())
        web.files["/in.json"] = annotations.read_bytes()
        for row in coco["images"]:
            web.files[f"/{row['file_name']}"] = (images / row["file_name"]).read_bytes()
            row["coco_url"] = web.url(f"/{row['file_name']}?X-Amz-Signature={SIGNATURE}")
        del web.files[f"/{coco['images'][0]['file_name']}"]
        urls = session.secret_file("urls.json", json.dumps(coco))
        report = ["--report", session.folder / "urls.html", "--output", session.folder / "urls-issues.json"]
        session.run("mal-client", "check", "--annotations", urls, "--coco-url-hosts", "127.0.0.1", *report)
        section = {
            "checkpoint": "builtin",
            "ann_path": web.url(f"/in.json?X-Amz-Signature={SIGNATURE}"),
            "img_dir": web.url(f"/?X-Amz-Signature={SIGNATURE}"),
            "gpu_ids": [],
        }
        sections = {"results_dir": str(session.folder / "signed"), "inference": section}
        spec = session.secret_file("signed.yaml", yaml.safe_dump(sections))
        session.run("mal-train", "inference", "-e", spec)


def use_playground(session: Session, connection: list[object], image: Path) -> None:
    """Opens the page as a browser does: by its arguments, the file that they name, and the cookie."""
    seen, browser = session.folder / "browser-arguments", session.folder / "browser"
    browser.write_text(f'#!/bin/sh\nprintf "%s" "$*" > {seen}.new && mv {seen}.new {seen}\n')
    browser.chmod(0o755)
    arguments = ["playground", *connection, "--port", "0", "--open"]
    with session.running("mal-client", *arguments, until=r"playground: (\S+)", BROWSER=f"{browser} %s") as (_, match):
        url = match[1]
        key = parse_qs(urlsplit(url).query)["key"][0]
        wait_for(seen.exists)
        path = Path(url2pathname(urlsplit(seen.read_text()).path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert key in path.read_text()
        _, headers = fetch(url)
        wait_for(lambda: not path.exists())
        assert headers["Referrer-Policy"] == "no-referrer"
        cookie, address = headers["Set-Cookie"].partition(";")[0], url.partition("/?")[0]
        opened = json.loads(fetch(f"{address}/api/images", image.read_bytes(), Cookie=cookie)[0])
        body = json.dumps({"boxes": [{"id": "a", "box": [5, 5, 40, 40]}], "options": {}}).encode()
        lines, _ = fetch(f"{address}/api/images/{opened['sha256']}/labels", body, Cookie=cookie)
        assert b'"rle"' in lines
        assert session.found(lines + fetch(f"{address}/api/server", Cookie=cookie)[0]) == []
    # The printed URL is for the user's terminal alone.
    name = "mal-client playground"
    assert session.printed[name].count(key.encode()) == 1
    session.printed[name] = session.printed[name].replace(url.encode(), b"")
    session.secrets["playground key"] = key


def use_label_studio(session: Session, connection: list[object], image: Path) -> None:
    """Sends a prediction request with one image that exists and one whose server refuses the connection."""
    arguments: list[object] = ["label-studio", *connection, "--port", "0", "--local-files", image.parent]
    arguments += ["--credentials-file", session.secret_file("credentials", f"studio:{PASSWORD}")]
    arguments += ["--api-key-file", session.secret_file("api-key", API_KEY)]
    arguments += ["--label-studio", f"http://127.0.0.1:{free_port()}"]
    config = (
        '<View><Image name="i" value="$i"/><RectangleLabels name="b" toName="i"><Label value="c"/></RectangleLabels>'
        '<BrushLabels name="m" toName="i"><Label value="c"/></BrushLabels></View>'
    )
    value = {"x": 10, "y": 10, "width": 40, "height": 40, "rotation": 0, "rectanglelabels": ["c"]}
    size = {"original_width": 96, "original_height": 80}
    region = {"id": "r", "from_name": "b", "to_name": "i", "type": "rectanglelabels", "value": value, **size}
    names = (f"/data/local-files/?d={image.name}", "/data/upload/1.png")
    tasks = [{"id": 1, "data": {"i": name}, "predictions": [{"result": [region]}]} for name in names]
    body = json.dumps({"tasks": tasks, "label_config": config}).encode()
    credentials = "Basic " + base64.b64encode(f"studio:{PASSWORD}".encode()).decode()
    with session.running("mal-client", *arguments, until=r"serving \S+ on (\S+)") as (_, match):
        answer, _ = fetch(f"{match[1]}/predict", body, Content_Type="application/json", Authorization=credentials)
    results = json.loads(answer)["results"]
    assert "error" in results[1]
    assert session.found(answer) == []


@pytest.mark.promise(
    "access", "No key, passphrase, token or password is printed, logged, traced, written or an argument"
)
def test_no_secret_is_printed_logged_traced_or_written_and_none_is_an_argument(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], s3: S3
) -> None:
    session, processes = Session(tmp_path), ProcessList()
    annotations, images = write_scenes(tmp_path / "scenes", images=2)
    image = next(images.iterdir())
    certificates = Certificates(tmp_path / "secret")
    for block in re.findall(rb"-----BEGIN[^-]+PRIVATE KEY-----\s+(\S+)", Path(certificates.key).read_bytes()):
        session.secrets["TLS key"] = block.decode()
    processes.start()
    try:
        models = [
            {"name": "trained", "checkpoint": str(trained(session, images, annotations))},
            {"name": "sealed", "checkpoint": str(sealed(session))},
        ]
        for model, name in zip(models, ("passphrase", "identity.txt"), strict=True):
            model["decryption_key"] = f"file:{tmp_path / 'secret' / name}"
        metrics_port = free_port()
        token_file = session.secret_file("token", TOKEN)
        settings = {
            "models": models,
            "gpu_ids": [],
            "drain_delay_s": 0.0,
            "tracing": True,
            "listen": certificates.listen(mutual=False),
            "metrics": {"port": metrics_port},
            "tokens": [{"name": "me", "token": f"file:{token_file}", "scopes": ["label", "evaluate", "admin"]}],
        }
        (tmp_path / "server.yaml").write_text(yaml.safe_dump(settings))
        with (
            trace_sink() as (sink, endpoint),
            session.running(
                *("mal-server", "serve", "-c", tmp_path / "server.yaml"),
                until=r"serving .* on (127\.0\.0\.1:\d+)",
                OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
            ) as (_, match),
        ):
            connection: list[object] = ["--server", match[1], "--tls-ca", certificates.authority]
            refused = [*connection, "--token-file", session.secret_file("wrong", "wrong-token")]
            connection += ["--token-file", token_file]
            label(session, connection, images, annotations)
            use_store(session, connection, s3, images, annotations)
            use_signed_addresses(session, images, annotations)
            use_playground(session, connection, image)
            use_label_studio(session, connection, image)
            assert client_main(["info", *map(str, refused)]) == 2
            metrics, _ = fetch(f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        processes.stop()
    assert sink.received, "the server exported traces"
    captured = capfd.readouterr()
    texts = {
        **session.printed,
        "this process": (captured.out + captured.err).encode(),
        "metrics": metrics,
        "traces": b"".join(sink.received),
        "process list": b"\n".join(processes.arguments),
    }
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "secret"]
    texts |= {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}
    expected = {"kept.ledger", "out.json", "review.html", "browser-arguments", "results/train/experiment.yaml"}
    expected |= {"work/out.json.ledger.0-of-1", "urls.html", "signed/inference/experiment.yaml"}
    assert expected <= texts.keys()
    assert {name: session.found(text) for name, text in texts.items() if session.found(text)} == {}
    assert list((tmp_path / "tmp").rglob("*mal*")) == []
