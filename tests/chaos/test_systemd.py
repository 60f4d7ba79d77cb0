"""The shipped unit under systemd: a killed server restarts, a stopped one drains, a failing one is not restarted.

These tests start a user manager of their own, in its own cgroup and runtime folder, which sees no other units. The unit
is the shipped file with other paths; the only lines removed are those of `REMOVED_LINES` and sandbox options that this
manager refuses.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from benchmarks.load.run import ROOT, environment
from mal_server.ops.health_probe import HealthProbe
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

Record = Callable[..., None]

UNIT = ROOT / "deploy" / "mal-server.service"
SYSTEMD = Path("/lib/systemd/systemd")
BOOTED = Path("/run/systemd/system")
"""systemd refuses to run as a user manager without this folder."""
SCOPE = f"mal-test-{os.getpid()}"
"""Name of the manager's cgroup, which contains only its own processes."""
STATE_PARENT = "/var/lib"
"""Parent of the test's folder: the sandbox hides /tmp from the unit, and in a container /run too."""
WAIT_TIMEOUT_S = 240.0
"""Time limit of each awaited event; large enough for a busy machine."""

REMOVED_LINES = {
    "DynamicUser=yes": "only the system manager creates users",
    "StateDirectory=mal-server": "a user manager creates it in the user's configuration folder",
    "LoadCredential=identity:/etc/mal-server/identity.txt": "mounted where user services cannot see it",
    "ProtectHome=yes": "the test's Python may be in a home folder",
}
SANDBOX = re.compile(
    r"(CapabilityBoundingSet|AmbientCapabilities|Protect\w+|Restrict\w+|NoNewPrivileges|LockPersonality|RemoveIPC"
    r"|SystemCall\w+)="
)
"""Options that a manager in a container may refuse, because it cannot change the mounts."""


def own_cgroup() -> Path | None:
    """Returns this process's folder in systemd's cgroup hierarchy; None if there is no writable one."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []
    paths = {name: path for _, name, path in (line.split(":", 2) for line in lines)}
    for mount, name in (("", ""), ("unified", ""), ("systemd", "name=systemd")):
        folder = Path("/sys/fs/cgroup", mount, paths.get(name, "").lstrip("/"))
        if name in paths and (folder / "cgroup.procs").exists():
            return folder if os.access(folder / "cgroup.procs", os.W_OK) else None
    return None


def skip_reason() -> str:
    """Returns why no manager can be started here; empty if one can."""
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        return "systemd is not installed"
    if os.geteuid() != 0:
        return "needs root to create a cgroup"
    if any(path.is_relative_to(hidden) for path in (ROOT, Path(sys.prefix)) for hidden in ("/tmp", "/var/tmp")):
        return "the program is in /tmp, which the unit cannot see"
    return "" if own_cgroup() is not None else "cannot create a cgroup"


SKIP_REASON = skip_reason()
pytestmark = [
    pytest.mark.slow,  # several starts, each of which imports torch
    pytest.mark.skipif(bool(SKIP_REASON), reason=SKIP_REASON or "not skipped"),
]


def wait_for(condition: Callable[[], object], event: str) -> None:
    """Waits until a condition holds; fails after WAIT_TIMEOUT_S."""
    until = time.monotonic() + WAIT_TIMEOUT_S
    while not condition():
        assert time.monotonic() < until, f"{event} did not happen within {WAIT_TIMEOUT_S:g} s"
        time.sleep(0.05)


@contextmanager
def booted_by_systemd() -> Iterator[None]:
    """Creates the folder that marks a machine booted by systemd; a manager checks it when it starts."""
    if BOOTED.exists():
        yield
        return
    BOOTED.mkdir(parents=True)
    try:
        yield
    finally:
        BOOTED.rmdir()


@contextmanager
def cgroup() -> Iterator[Path]:
    """Creates a cgroup below this process's and removes it at the end, in every hierarchy."""
    own = own_cgroup()
    assert own is not None
    folder = own / SCOPE
    folder.mkdir()
    try:
        yield folder
    finally:
        for top in Path("/sys/fs/cgroup").rglob(SCOPE):
            for child in sorted(top.rglob("*/"), reverse=True):
                child.rmdir()
            top.rmdir()


@dataclass
class Manager:
    """systemd as a user manager that reads the units of one folder.

    Attributes:
        folder: holds its units and their files.
    """

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "SYSTEMD_UNIT_PATH": f"{self.folder / 'units'}:/usr/lib/systemd/user",
        }

    def ctl(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Runs `systemctl`; does not check its exit code."""
        command = ["systemctl", "--user", "--no-pager", *arguments]
        return subprocess.run(command, env=self.variables, capture_output=True, text=True, check=False)

    def add(self, name: str, lines: Sequence[str]) -> None:
        """Adds or replaces a unit file."""
        (self.folder / "units" / name).write_text("\n".join([*lines, ""]))
        self.ctl("daemon-reload")

    def supports(self, line: str) -> bool:
        """Returns whether a service with this line starts."""
        lines = ["[Unit]", "StartLimitIntervalSec=0", "[Service]", "Type=oneshot", line, "ExecStart=/bin/true"]
        self.add("can.service", lines)
        return self.ctl("start", "can.service").returncode == 0


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    with ExitStack() as stack:
        yield start_manager(Manager(Path(tempfile.mkdtemp(prefix="mal-test-", dir=STATE_PARENT))), stack)


def start_manager(manager: Manager, stack: ExitStack) -> Manager:
    """Starts a manager; the stack stops it and removes its files. Skips if systemd refuses to run."""
    stack.callback(shutil.rmtree, manager.folder)
    (manager.folder / "run").mkdir(mode=0o700)
    (manager.folder / "units").mkdir()
    for name in ("basic.target", "default.target"):  # systemd's own targets would start other user units
        (manager.folder / "units" / name).write_text("[Unit]\nDefaultDependencies=no\n")
    procs = stack.enter_context(cgroup()) / "cgroup.procs"
    with booted_by_systemd():
        joins = f'echo $$ > "{procs}" && exec {SYSTEMD} --user'
        process = subprocess.Popen(["sh", "-c", joins], env=manager.variables)
        stack.callback(process.wait, WAIT_TIMEOUT_S)
        stack.callback(process.terminate)
        wait_for(
            lambda: process.poll() is not None or manager.ctl("show-environment").returncode == 0, "a manager's start"
        )
    if process.poll() is not None:
        pytest.skip(f"systemd ended with {process.returncode}: it cannot run as a manager here")
    return manager


@pytest.fixture(scope="module")
def refused(manager: Manager, record: Record) -> list[str]:
    """Returns the sandbox lines of the unit that this manager refuses."""
    lines = [line for line in UNIT.read_text().splitlines() if SANDBOX.match(line)]
    refused = [line for line in lines if not manager.supports(line)]
    record("systemd's sandbox", tested=len(lines) - len(refused), removed=refused)
    return refused


@dataclass
class Unit:
    """The shipped unit, installed in the manager."""

    manager: Manager
    removed_lines: list[str]

    name = UNIT.name

    @property
    def address_file(self) -> Path:
        return self.manager.folder / "run" / "mal-server" / "address"

    @property
    def log(self) -> str:
        return (self.manager.folder / "log").read_text()

    def shown(self, *names: str) -> tuple[str, ...]:
        """Returns properties as `systemctl show` prints them."""
        return tuple(
            self.manager.ctl("show", "--value", "--property", name, self.name).stdout.strip() for name in names
        )

    def serves(self) -> bool:
        try:
            return HealthProbe(self.address_file.read_text().strip(), timeout_s=5.0).check() == "SERVING"
        except FileNotFoundError:
            return False

    def kill(self) -> None:
        """Kills the main process and waits until systemd has noticed."""
        (pid,) = self.shown("MainPID")
        os.kill(int(pid), signal.SIGKILL)
        wait_for(lambda: self.shown("MainPID") != (pid,), "systemd's notice of the exit")


@pytest.fixture
def unit(manager: Manager, refused: list[str]) -> Iterator[Unit]:
    """Installs the unit, an encrypted checkpoint and the configuration; stops the unit at the end."""
    folder = manager.folder
    paths = {
        "/opt/mask-auto-labeler/bin": str(Path(sys.executable).parent),
        "/etc/mal-server": str(folder),
        "/run/mal-server": str(folder / "run" / "mal-server"),
        "/var/lib/mal-server": str(folder),
    }
    kept, removed = list[str](), list[str]()
    for line in UNIT.read_text().splitlines():
        (removed if line in REMOVED_LINES or line in refused else kept).append(line)
    text = re.sub("|".join(paths), lambda match: paths[match[0]], "\n".join(kept))
    test_lines = [
        f"Environment=PYTHONPATH={environment()['PYTHONPATH']}",
        *(f"Standard{name}=append:{folder / 'log'}" for name in ("Output", "Error")),
    ]
    manager.add(UNIT.name, [*text.replace("[Service]", "\n".join(["[Service]", *test_lines])).splitlines()])
    write_settings(folder)
    (folder / "log").write_text("")
    yield Unit(manager, removed)
    manager.ctl("stop", UNIT.name)
    manager.ctl("reset-failed", UNIT.name)


def write_settings(folder: Path) -> None:
    """Writes what the unit's header asks for: an encrypted checkpoint, its identity and a configuration."""
    model = ModelConfig("vit-micro/16", mask_head_num_convs=1, mask_head_hidden_channel=8, mask_head_out_channel=8)
    weights = {name: tensor.detach() for name, tensor in MalNetwork(model).state_dict().items()}
    (folder / "identity.txt").unlink(missing_ok=True)
    key = parse_key(write_identity(folder / "identity.txt"), purpose="encryption", source="command line")
    save_checkpoint(folder / "micro.malckpt", Checkpoint(model, LabelerConfig(crop_size=64), weights, []), key)
    settings = {
        "checkpoint": str(folder / "micro.malckpt"),
        "decryption_key": f"file:{folder / 'identity.txt'}",
        "gpu_ids": [],
        "drain_delay_s": 0.0,
        "listen": {"port": 0},
    }
    (folder / "server.yaml").write_text(yaml.safe_dump(settings))


def test_the_tested_unit_is_the_shipped_one_except_for_the_removed_lines(unit: Unit, refused: list[str]) -> None:
    shipped = UNIT.read_text().splitlines()
    assert unit.removed_lines == [line for line in shipped if line in REMOVED_LINES or line in refused]
    assert set(REMOVED_LINES) <= set(shipped)
    tested = unit.manager.ctl("cat", unit.name).stdout.splitlines()
    for start in ("Type", "Restart", "KillSignal", "TimeoutStopSec", "StartLimit", "ExecReload", "RuntimeDirectory"):
        lines = [line for line in shipped if line.startswith(start)]
        assert lines, start
        assert [line for line in tested if line.startswith(start)] == lines


@pytest.mark.promise("deployment", "systemd restarts a server that is killed, and one that is stopped drains")
def test_a_killed_server_restarts_and_a_stopped_one_drains(unit: Unit, record: Record) -> None:
    assert unit.manager.ctl("start", unit.name).returncode == 0
    wait_for(unit.serves, "the first start")
    (before,) = unit.shown("NRestarts")
    unit.kill()
    began = time.monotonic()
    wait_for(unit.serves, "the start after a kill")
    record("systemd", down_s=time.monotonic() - began)
    assert unit.shown("NRestarts", "ActiveState") == (str(int(before) + 1), "active")
    assert unit.manager.ctl("reload", unit.name).returncode == 0
    wait_for(lambda: "tokens reloaded" in unit.log, "a reload of the tokens")
    began = time.monotonic()
    unit.manager.ctl("stop", unit.name)
    record("systemd", stop_s=time.monotonic() - began)
    assert unit.shown("Result", "ActiveState", "ExecMainStatus") == ("success", "inactive", "0")
    assert "draining" in unit.log
    assert not unit.address_file.exists()


@pytest.mark.promise("deployment", "systemd replaces a server process that does not run")
def test_a_process_that_does_not_run_is_replaced(unit: Unit, record: Record) -> None:
    limit_s = 30  # the shipped limit takes minutes
    with override(unit, f"WatchdogSec={limit_s}"):
        unit.manager.ctl("start", unit.name)
        wait_for(unit.serves, "the first start")
        (pid,) = unit.shown("MainPID")
        os.kill(int(pid), signal.SIGSTOP)
        wait_for(lambda: unit.shown("MainPID") != (pid,) and unit.serves(), "a new process")
        record("systemd's watchdog", restarts=int(*unit.shown("NRestarts")), limit_s=limit_s)
        assert unit.shown("Result", "ActiveState") == ("success", "active")


@contextmanager
def override(unit: Unit, line: str) -> Iterator[None]:
    """Replaces a line of the service by another for the block."""
    folder = unit.manager.folder / "units" / f"{unit.name}.d"
    folder.mkdir()
    try:
        unit.manager.add(f"{unit.name}.d/override.conf", ["[Service]", line])
        yield
    finally:
        shutil.rmtree(folder)
        unit.manager.ctl("daemon-reload")


def test_a_server_with_invalid_settings_is_not_restarted(unit: Unit) -> None:
    (unit.manager.folder / "server.yaml").write_text("checkpoint: nothing.malckpt\nlisten: {port: 0}\n")
    unit.manager.ctl("start", unit.name)
    wait_for(lambda: unit.shown("ActiveState") == ("failed",), "the end of a server that cannot serve")
    assert unit.shown("ExecMainStatus", "NRestarts") == ("2", "0")
    assert "nothing.malckpt" in unit.log


def test_a_server_that_keeps_dying_is_not_restarted_forever(unit: Unit) -> None:
    (allowed,) = re.findall(r"^StartLimitBurst=(\d+)$", UNIT.read_text(), re.MULTILINE)
    unit.manager.ctl("start", unit.name)
    for _ in range(int(allowed)):
        wait_for(lambda: unit.shown("MainPID") != ("0",), "a start")
        unit.kill()
    wait_for(lambda: unit.shown("ActiveState") == ("failed",), "the last start")
    assert unit.shown("NRestarts", "ExecMainStatus") == (allowed, str(int(signal.SIGKILL)))
