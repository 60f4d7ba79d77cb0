"""Three servers behind the proxies whose configurations we ship, one of them killed under load: nothing is lost."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.load.caller import Plan
from benchmarks.load.run import ROOT, Server, loading, samples_of, stand_in
from mal_server.ops.health_probe import HealthProbe
from tests.chaos.conftest import Form
from tests.chaos.test_load import free_port

Say = Callable[..., None]

PROXIES = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}


def command_of(proxy: str, config: Path) -> list[str]:
    """Runs a proxy in the foreground."""
    if proxy == "haproxy":
        return ["haproxy", "-db", "-f", str(config)]
    return ["nginx", "-c", str(config), "-g", f"daemon off; pid {config.parent}/nginx.pid;"]


@contextmanager
def proxied(proxy: str, folder: Path, servers: list[Server]) -> Iterator[str]:
    """The shipped configuration with these servers' addresses and a free port."""
    if shutil.which(proxy) is None:
        pytest.skip(f"{proxy} is not installed (Debian: haproxy, nginx-light)")
    port = free_port()
    text = (ROOT / "deploy" / "proxy" / PROXIES[proxy]).read_text().replace("127.0.0.1:50051", f"127.0.0.1:{port}")
    for number, server in enumerate(servers, start=1):
        text, count = re.subn(rf"10\.0\.0\.1{number}:50051", server.address, text)
        assert count == 1
    config = folder / PROXIES[proxy]
    config.write_text(text)
    process = subprocess.Popen(command_of(proxy, config))
    try:
        until = time.monotonic() + 60
        while HealthProbe(f"127.0.0.1:{port}").check() != "SERVING":
            assert process.poll() is None, f"the proxy ended with {process.returncode}"
            assert time.monotonic() < until, "the proxy did not come up"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("proxy", sorted(PROXIES))
def test_one_of_three_servers_dies_behind_a_proxy_and_nothing_is_lost(
    proxy: str, form: Form, deck_folder: Path, tmp_path: Path, say: Say
) -> None:
    with ExitStack() as stack:
        # Answers of several messages: the one that dies is in the middle of some.
        settings = ("--batch-ms", "20", "max_batch_size=2")
        servers = [stack.enter_context(stand_in(tmp_path, *settings, name=f"s{i}")) for i in range(3)]
        address = stack.enter_context(proxied(proxy, tmp_path, servers))
        plan = Plan(address, clients=8, seconds=3600.0, calls=form.pick(600, 3000), boxes=8, retries=True)
        with loading([plan], deck_folder) as load:
            time.sleep(max(load.start_at - time.monotonic(), 0) + 1.0)
            servers[0].process.send_signal(signal.SIGKILL)
            samples = samples_of(load.wait(900))
        shares = [server.cpu_s() for server in servers[1:]]
    tries = sum(one.tries for one in samples)
    say(f"{proxy}, one of three killed", calls=len(samples), tries=tries, others_cpu_s=shares)
    assert len(samples) == plan.calls
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", 8, 0)}


def test_clients_of_several_servers_move_on_when_one_dies(
    form: Form, deck_folder: Path, tmp_path: Path, say: Say
) -> None:
    """Without a proxy: each client knows both addresses."""
    with ExitStack() as stack:
        servers = [stack.enter_context(stand_in(tmp_path, "--batch-ms", "20", name=f"s{i}")) for i in range(2)]
        addresses = ",".join(server.address for server in servers)
        plan = Plan(addresses, clients=4, seconds=3600.0, calls=form.pick(100, 6000), boxes=2, retries=True)
        with loading([plan], deck_folder) as load:
            time.sleep(max(load.start_at - time.monotonic(), 0) + 0.3)
            servers[0].process.send_signal(signal.SIGKILL)
            samples = samples_of(load.wait(900))
    tries = sum(one.tries for one in samples)
    say("one of two killed", calls=len(samples), tries=tries)
    assert len(samples) == plan.calls
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", 2, 0)}
