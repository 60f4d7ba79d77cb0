"""Three servers behind each shipped proxy configuration; one is killed under load and no call is lost."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.load.client import Plan
from benchmarks.load.run import ROOT, Server, all_samples, fake_server, run_clients
from mal_server.ops.health_probe import HealthProbe
from tests.chaos.test_load import free_port
from tests.form import Form
from tests.tools import program

Record = Callable[..., None]

PROXIES = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}


def command_of(proxy: str, config: Path) -> list[str]:
    """Returns the command that runs a proxy in the foreground."""
    if proxy == "haproxy":
        return [program(proxy), "-db", "-f", str(config)]
    return [program(proxy), "-c", str(config), "-g", f"daemon off; pid {config.parent}/nginx.pid;"]


@contextmanager
def proxied(proxy: str, folder: Path, servers: list[Server]) -> Iterator[str]:
    """Runs a proxy with the shipped configuration, changed to these servers' addresses and a free port."""
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
            assert time.monotonic() < until, "the proxy did not start"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.promise("faults", "One of three servers behind a shipped proxy is killed, and no call is lost")
@pytest.mark.slow
@pytest.mark.parametrize("proxy", sorted(PROXIES))
def test_killing_one_of_three_servers_behind_a_proxy_loses_no_call(
    proxy: str, form: Form, deck_folder: Path, tmp_path: Path, record: Record
) -> None:
    with ExitStack() as stack:
        # Several messages per response: the killed server is in the middle of some.
        settings = ("--batch-ms", "20", "max_batch_size=2")
        servers = [stack.enter_context(fake_server(tmp_path, *settings, name=f"s{i}")) for i in range(3)]
        address = stack.enter_context(proxied(proxy, tmp_path, servers))
        plan = Plan(address, clients=8, seconds=3600.0, calls=form.pick(600, 3000), boxes=8, retries=True)
        with run_clients([plan], deck_folder) as load:
            time.sleep(max(load.start_at - time.monotonic(), 0) + 1.0)
            servers[0].process.send_signal(signal.SIGKILL)
            samples = all_samples(load.wait(900))
        cpu_s = [server.cpu_s() for server in servers[1:]]
    tries = sum(one.tries for one in samples)
    record(f"{proxy}, one of three killed", calls=len(samples), tries=tries, others_cpu_s=cpu_s)
    assert len(samples) == plan.calls
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", 8, 0)}
    # Calls that the killed server held are sent again; the proxy sends it no others. Without its checks: hundreds.
    assert tries - len(samples) <= 10 * plan.clients


def test_clients_with_several_addresses_fail_over_when_one_server_is_killed(
    form: Form, deck_folder: Path, tmp_path: Path, record: Record
) -> None:
    """Without a proxy: each client has both addresses."""
    with ExitStack() as stack:
        servers = [stack.enter_context(fake_server(tmp_path, "--batch-ms", "20", name=f"s{i}")) for i in range(2)]
        addresses = ",".join(server.address for server in servers)
        plan = Plan(addresses, clients=4, seconds=3600.0, calls=form.pick(100, 6000), boxes=2, retries=True)
        with run_clients([plan], deck_folder) as load:
            time.sleep(max(load.start_at - time.monotonic(), 0) + 0.3)
            servers[0].process.send_signal(signal.SIGKILL)
            samples = all_samples(load.wait(900))
    tries = sum(one.tries for one in samples)
    record("one of two killed", calls=len(samples), tries=tries)
    assert len(samples) == plan.calls
    assert {(one.code, one.right, one.wrong) for one in samples} == {("OK", 2, 0)}
