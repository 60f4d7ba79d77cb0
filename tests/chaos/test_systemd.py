"""systemd runs the shipped unit: a killed server comes back, one that is stopped drains, hopeless ones are left alone.

A user's manager is started for these tests alone, in a cgroup and a runtime folder of its own; no unit but ours is in
its sight. The unit is the file that we ship: paths are others, and of its lines only those are left out that
`LEFT_OUT` names, or that belong to the sandbox and are refused by this manager.
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

Say = Callable[..., None]

UNIT = ROOT / "deploy" / "mal-server.service"
SYSTEMD = Path("/lib/systemd/systemd")
BOOTED = Path("/run/systemd/system")
"""systemd refuses to be any user's manager where this folder is missing."""
SCOPE = f"mal-test-{os.getpid()}"
"""Of the manager's cgroup: what it starts and ends lies below, and it takes charge of nobody else's processes."""
HOME_OF_STATE = "/var/lib"
"""The sandbox shows the unit no /tmp, and in a container no /run, but its own."""
PATIENCE_S = 240.0
"""For each thing that is bound to happen, however busy the machine is."""

LEFT_OUT = {
    "DynamicUser=yes": "only the system's manager makes users",
    "StateDirectory=mal-server": "a user's manager makes it where users keep their settings",
    "LoadCredential=identity:/etc/mal-server/identity.txt": "mounted where a user's services do not see it",
    "ProtectHome=yes": "the test's Python may lie in a home folder",
}
SANDBOX = re.compile(
    r"(CapabilityBoundingSet|AmbientCapabilities|Protect\w+|Restrict\w+|NoNewPrivileges|LockPersonality|RemoveIPC"
    r"|SystemCall\w+)="
)
"""What a manager inside a container may be unable to do: mounts that it would have to change are not its own."""


def own_cgroup() -> Path | None:
    """This process's folder in the hierarchy that systemd keeps its books in; None where there is none to write to."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []
    paths = {name: path for _, name, path in (line.split(":", 2) for line in lines)}
    for mount, name in (("", ""), ("unified", ""), ("systemd", "name=systemd")):
        folder = Path("/sys/fs/cgroup", mount, paths.get(name, "").lstrip("/"))
        if name in paths and (folder / "cgroup.procs").exists():
            return folder if os.access(folder / "cgroup.procs", os.W_OK) else None
    return None


def trouble() -> str:
    """Why no manager can be started here; empty where one can."""
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        return "systemd is not installed"
    if os.geteuid() != 0:
        return "needs root: a manager of the test's own needs a cgroup of its own"
    if any(path.is_relative_to(hidden) for path in (ROOT, Path(sys.prefix)) for hidden in ("/tmp", "/var/tmp")):
        return "the unit has a /tmp of its own, and in this one lies the program"
    return "" if own_cgroup() is not None else "no cgroup can be made here"


TROUBLE = trouble()
pytestmark = [
    pytest.mark.slow,  # several starts, each of which imports torch
    pytest.mark.skipif(bool(TROUBLE), reason=TROUBLE or "a manager can be started"),
]


def wait_for(holds: Callable[[], object], what: str) -> None:
    """Until it is so."""
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, f"{what} did not happen within {PATIENCE_S:g} s"
        time.sleep(0.05)


@contextmanager
def booted_by_systemd() -> Iterator[None]:
    """For as long as a manager takes to start, this machine looks as if systemd had booted it."""
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
    """A cgroup of our own below this process's; what was made of it in other hierarchies goes, too."""
    own = own_cgroup()
    assert own is not None
    folder = own / SCOPE
    folder.mkdir()
    try:
        yield folder
    finally:
        for top in Path("/sys/fs/cgroup").rglob(SCOPE):
            for below in sorted(top.rglob("*/"), reverse=True):
                below.rmdir()
            top.rmdir()


@dataclass
class Manager:
    """systemd as a user's manager that knows the units of one folder.

    Attributes:
        folder: of its units, and of all that they read and write.
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
        """`systemctl`, whatever comes of it."""
        command = ["systemctl", "--user", "--no-pager", *arguments]
        return subprocess.run(command, env=self.variables, capture_output=True, text=True, check=False)

    def add(self, name: str, lines: Sequence[str]) -> None:
        """A unit's file."""
        (self.folder / "units" / name).write_text("\n".join([*lines, ""]))
        self.ctl("daemon-reload")

    def can(self, line: str) -> bool:
        """Whether a service with this line starts."""
        lines = ["[Unit]", "StartLimitIntervalSec=0", "[Service]", "Type=oneshot", line, "ExecStart=/bin/true"]
        self.add("can.service", lines)
        return self.ctl("start", "can.service").returncode == 0


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    with ExitStack() as stack:
        yield started_manager(Manager(Path(tempfile.mkdtemp(prefix="mal-test-", dir=HOME_OF_STATE))), stack)


def started_manager(found: Manager, stack: ExitStack) -> Manager:
    """It ends, and all that belongs to it goes, with the stack; skips where systemd refuses."""
    stack.callback(shutil.rmtree, found.folder)
    (found.folder / "run").mkdir(mode=0o700)
    (found.folder / "units").mkdir()
    for name in ("basic.target", "default.target"):  # systemd's own would start what else users have
        (found.folder / "units" / name).write_text("[Unit]\nDefaultDependencies=no\n")
    procs = stack.enter_context(cgroup()) / "cgroup.procs"
    with booted_by_systemd():
        joins = f'echo $$ > "{procs}" && exec {SYSTEMD} --user'
        process = subprocess.Popen(["sh", "-c", joins], env=found.variables)
        stack.callback(process.wait, PATIENCE_S)
        stack.callback(process.terminate)
        wait_for(
            lambda: process.poll() is not None or found.ctl("show-environment").returncode == 0, "a manager's start"
        )
    if process.poll() is not None:
        pytest.skip(f"systemd ended with {process.returncode}: it can be no manager here")
    return found


@pytest.fixture(scope="module")
def refused(manager: Manager, say: Say) -> list[str]:
    """Lines of the unit's sandbox that this manager cannot do."""
    lines = [line for line in UNIT.read_text().splitlines() if SANDBOX.match(line)]
    found = [line for line in lines if not manager.can(line)]
    say("systemd's sandbox", tried_here=len(lines) - len(found), left_out=found)
    return found


@dataclass
class Unit:
    """The shipped unit, in the manager's hands."""

    manager: Manager
    left_out: list[str]

    name = UNIT.name

    @property
    def address_file(self) -> Path:
        return self.manager.folder / "run" / "mal-server" / "address"

    @property
    def log(self) -> str:
        return (self.manager.folder / "log").read_text()

    def shown(self, *names: str) -> tuple[str, ...]:
        """Properties as `systemctl show` prints them."""
        return tuple(
            self.manager.ctl("show", "--value", "--property", name, self.name).stdout.strip() for name in names
        )

    def serves(self) -> bool:
        try:
            return HealthProbe(self.address_file.read_text().strip(), timeout_s=5.0).check() == "SERVING"
        except FileNotFoundError:
            return False

    def kill(self) -> None:
        """By SIGKILL, and waits until systemd has seen it."""
        (pid,) = self.shown("MainPID")
        os.kill(int(pid), signal.SIGKILL)
        wait_for(lambda: self.shown("MainPID") != (pid,), "the notice of a process's end")


@pytest.fixture
def unit(manager: Manager, refused: list[str]) -> Iterator[Unit]:
    """The unit, its sealed checkpoint and its configuration; stopped and forgotten at the end."""
    folder = manager.folder
    places = {
        "/opt/mask-auto-labeler/bin": str(Path(sys.executable).parent),
        "/etc/mal-server": str(folder),
        "/run/mal-server": str(folder / "run" / "mal-server"),
        "/var/lib/mal-server": str(folder),
    }
    kept, left_out = list[str](), list[str]()
    for line in UNIT.read_text().splitlines():
        (left_out if line in LEFT_OUT or line in refused else kept).append(line)
    text = re.sub("|".join(places), lambda found: places[found[0]], "\n".join(kept))
    ours = [
        f"Environment=PYTHONPATH={environment()['PYTHONPATH']}",
        *(f"Standard{name}=append:{folder / 'log'}" for name in ("Output", "Error")),
    ]
    manager.add(UNIT.name, [*text.replace("[Service]", "\n".join(["[Service]", *ours])).splitlines()])
    write_settings(folder)
    (folder / "log").write_text("")
    yield Unit(manager, left_out)
    manager.ctl("stop", UNIT.name)
    manager.ctl("reset-failed", UNIT.name)


def write_settings(folder: Path) -> None:
    """As the unit's head tells: a sealed checkpoint, its identity, and a configuration that names both."""
    model = ModelConfig("vit-micro/16", mask_head_num_convs=1, mask_head_hidden_channel=8, mask_head_out_channel=8)
    weights = {name: tensor.detach() for name, tensor in MalNetwork(model).state_dict().items()}
    (folder / "identity.txt").unlink(missing_ok=True)
    key = parse_key(write_identity(folder / "identity.txt"), purpose="encryption", where="command line")
    save_checkpoint(folder / "micro.malckpt", Checkpoint(model, LabelerConfig(crop_size=64), weights, []), key)
    settings = {
        "checkpoint": str(folder / "micro.malckpt"),
        "decryption_key": f"file:{folder / 'identity.txt'}",
        "gpu_ids": [],
        "drain_delay_s": 0.0,
        "listen": {"port": 0},
    }
    (folder / "server.yaml").write_text(yaml.safe_dump(settings))


def test_the_unit_that_is_tried_is_the_shipped_one_but_for_what_is_said(unit: Unit, refused: list[str]) -> None:
    shipped = UNIT.read_text().splitlines()
    assert unit.left_out == [line for line in shipped if line in LEFT_OUT or line in refused]
    assert set(LEFT_OUT) <= set(shipped)
    tried = unit.manager.ctl("cat", unit.name).stdout.splitlines()
    for start in ("Type", "Restart", "KillSignal", "TimeoutStopSec", "StartLimit", "ExecReload", "RuntimeDirectory"):
        lines = [line for line in shipped if line.startswith(start)]
        assert lines, start
        assert [line for line in tried if line.startswith(start)] == lines


def test_a_killed_server_is_started_again_and_one_that_is_stopped_drains(unit: Unit, say: Say) -> None:
    assert unit.manager.ctl("start", unit.name).returncode == 0
    wait_for(unit.serves, "the first start")
    (before,) = unit.shown("NRestarts")
    unit.kill()
    began = time.monotonic()
    wait_for(unit.serves, "the start after a kill")
    say("systemd", down_s=time.monotonic() - began)
    assert unit.shown("NRestarts", "ActiveState") == (str(int(before) + 1), "active")
    assert unit.manager.ctl("reload", unit.name).returncode == 0
    wait_for(lambda: "tokens reloaded" in unit.log, "a reload of the tokens")
    began = time.monotonic()
    unit.manager.ctl("stop", unit.name)
    say("systemd", stop_s=time.monotonic() - began)
    assert unit.shown("Result", "ActiveState", "ExecMainStatus") == ("success", "inactive", "0")
    assert "draining" in unit.log
    assert not unit.address_file.exists()


def test_a_server_whose_settings_are_wrong_is_not_started_again(unit: Unit) -> None:
    (unit.manager.folder / "server.yaml").write_text("checkpoint: nothing.malckpt\nlisten: {port: 0}\n")
    unit.manager.ctl("start", unit.name)
    wait_for(lambda: unit.shown("ActiveState") == ("failed",), "the end of a server that cannot serve")
    assert unit.shown("ExecMainStatus", "NRestarts") == ("2", "0")
    assert "nothing.malckpt" in unit.log


def test_a_server_that_dies_at_once_is_given_up(unit: Unit) -> None:
    (allowed,) = re.findall(r"^StartLimitBurst=(\d+)$", UNIT.read_text(), re.MULTILINE)
    unit.manager.ctl("start", unit.name)
    for _ in range(int(allowed)):
        wait_for(lambda: unit.shown("MainPID") != ("0",), "a start")
        unit.kill()
    wait_for(lambda: unit.shown("ActiveState") == ("failed",), "the last start")
    assert unit.shown("NRestarts", "ExecMainStatus") == (allowed, str(int(signal.SIGKILL)))
