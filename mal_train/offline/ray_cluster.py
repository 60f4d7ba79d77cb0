"""Runs `PartLabeler` in the actors of a Ray cluster, by Ray Data.

An actor reads, decodes, labels and writes the parts of its tasks: neither pixels nor masks pass through Ray, and no
task needs a CPU beside the actors. A task lists a few parts; its messages come as the parts are finished. Ray gives the
tasks of a lost process to another one.

Needs Ray, which the extra `ray` installs.
"""

import contextlib
import importlib
import inspect
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mal_train.core.addresses import check_address
from mal_train.core.coco.parquet_parts import Part
from mal_train.core.errors import ConfigError, LostProcess
from mal_train.offline.part_labeler import PartJob, PartLabeler, encode_task

CPUS_PER_ACTOR: Final = 4
"""Upper limit of the CPUs of an actor without a GPU, where `inference.ray_cpus_per_actor` is 0."""
TASK_RETRIES: Final = 1
"""Times that Ray itself repeats a task whose process ended; the caller repeats what is missing then."""
TASKS_PER_ACTOR: Final = 2
"""Tasks of an actor: the next one is there when one ends."""
CONNECT_TIMEOUT_S: Final = 10.0
FREE_TIMEOUT_S: Final = 60.0
"""Time that processes of a killed run may take to end, and the cluster to notice the loss of a node."""
OBJECT_STORE_BYTES: Final = 128 << 20
"""Object store of a cluster on this machine; only tasks and messages pass through it."""

_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of Ray: no usage statistics, and no messages of its own on the terminal."""
# Ray reads this name on all systems: 0 makes a cluster of one machine listen on loopback alone.
_LOOPBACK: Final = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


@dataclass(frozen=True)
class ActorPool:
    """Processes on the cluster.

    Attributes:
        count: number of actors.
        cpus: CPUs of each.
        gpus: GPUs of each, 0 or 1.
    """

    count: int
    cpus: int
    gpus: int

    @property
    def device(self) -> str:
        """Torch device in an actor; Ray lets an actor see its own GPU alone."""
        return "cuda" if self.gpus else "cpu"

    @property
    def resources(self) -> str:
        """Resources of an actor, for messages."""
        return _resources(self.cpus, self.gpus)


def plan_actors(nodes: Sequence[Mapping[str, float]], *, use_gpus: bool, count: int, cpus: int) -> ActorPool:
    """Returns the actors for a cluster.

    Args:
        nodes: resources of each node, by Ray's names `CPU` and `GPU`.
        use_gpus: an actor for each GPU, if there are any.
        count: number of actors; 0: as many as fit.
        cpus: CPUs of each; 0: with GPUs, the share of a GPU in the CPUs of its node; else `CPUS_PER_ACTOR`, or all CPUs
            of a smaller node.

    Raises:
        ConfigError: `count` actors do not fit, or not even one.
    """
    sizes = [_size(node) for node in nodes]
    gpus = 1 if use_gpus and any(node_gpus for _, node_gpus in sizes) else 0
    usable = [(node_cpus, node_gpus) for node_cpus, node_gpus in sizes if node_cpus and node_gpus >= gpus]
    if not cpus:
        shares = [node_cpus // node_gpus if gpus else min(node_cpus, CPUS_PER_ACTOR) for node_cpus, node_gpus in usable]
        cpus = max(1, min(shares, default=1))
    fitting = sum(min(node_cpus // cpus, node_gpus if gpus else node_cpus) for node_cpus, node_gpus in usable)
    if fitting < max(1, count):
        raise ConfigError(
            f"inference.ray_actors: {max(1, count)} actors of {_resources(cpus, gpus)} each do not fit on the cluster: "
            f"its nodes have {', '.join(_resources(*size) for size in sizes) or 'no resources'}, on which {fitting} "
            "fit; add nodes, or lower inference.ray_actors or inference.ray_cpus_per_actor"
        )
    return ActorPool(count or fitting, cpus, gpus)


def _size(resources: Mapping[str, float]) -> tuple[int, int]:
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def _resources(cpus: int, gpus: int) -> str:
    return f"{cpus} CPU" + (f" + {gpus} GPU" if gpus else "")


class RayCluster:
    """Connection to a Ray cluster, or a cluster of this machine alone. A context manager.

    Args:
        address: HOST:PORT or `auto` of a cluster; empty: starts one on this machine, and ends it with the block.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached or used.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RayCluster":
        with contextlib.ExitStack() as stack:
            folder = None if self._address else _temporary_folder(stack)
            self._ray = load_ray(_QUIET if self._address else _QUIET | _LOOPBACK)
            stack.callback(self._ray.shutdown)
            handler = signal.getsignal(signal.SIGTERM)
            self._connect(folder)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray has set its own
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _connect(self, folder: str | None) -> None:
        """Connects to the cluster, or starts one with its files in `folder`."""
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if folder is None:
            _check_reachable(self._address)
            options |= {"address": self._address}
        else:
            # The token keeps other accounts of this machine out; the environment takes it to the actors.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            options |= {"address": "local", "include_dashboard": False, "_temp_dir": folder}
            options |= {"num_cpus": len(os.sched_getaffinity(0)), "object_store_memory": OBJECT_STORE_BYTES}
        try:
            self._ray.init(**options)
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(f"inference.ray_address: {self._address!r}: {_line(error, 0)}") from error

    def resources(self) -> str:
        """Describes the nodes and what is free on them, for messages."""
        free = self._ray.available_resources()
        sizes = ", ".join(_resources(*_size(node)) for node in self._nodes()) or "no resources"
        return f"the nodes of the cluster have {sizes}, of which {_resources(*_size(free))} are free"

    def plan(self, *, use_gpus: bool, count: int, cpus: int) -> ActorPool:
        """Returns the actors for the cluster; see `plan_actors`.

        Raises:
            ConfigError: the actors do not fit, or other jobs of the cluster use what they need.
        """
        deadline = time.monotonic() + FREE_TIMEOUT_S
        while True:
            pool = plan_actors(self._nodes(), use_gpus=use_gpus, count=count, cpus=cpus)
            short = self._missing({"CPU": pool.count * pool.cpus, "GPU": pool.count * pool.gpus})
            if not short:
                return pool
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"inference.ray_actors: {pool.count} actors need {short}; wait for the other jobs of the cluster, "
                    "or lower inference.ray_actors"
                )
            time.sleep(0.5)

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _missing(self, needed: Mapping[str, int]) -> str:
        free = self._ray.available_resources()
        short = [name for name, value in needed.items() if free.get(name, 0) < value]
        return ", ".join(f"{needed[name]} {name}, of which {free.get(name, 0):g} are free" for name in short)

    def label(self, job: PartJob, pool: ActorPool, tasks: Sequence[Sequence[Part]]) -> Iterator[str]:
        """Yields the messages of `PartLabeler` in the order in which they come. Parts of lost processes may be missing.

        Raises:
            LostProcess: the cluster ended.
        """
        data = importlib.import_module("ray.data")
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        # A block for each message: others would wait until a block is full, or the task ends.
        context.target_max_block_size = 1
        # The caller finds the parts that are missing. A part may take longer than any time without progress.
        context.max_errored_blocks, context.execution_no_progress_timeout_s = -1, -1
        with data.DataContext.current(context):
            rows = [{"task": encode_task(task)} for task in tasks]
            dataset = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                PartLabeler,
                batch_size=1,
                compute=data.ActorPoolStrategy(
                    size=min(pool.count, len(rows)), max_tasks_in_flight_per_actor=TASKS_PER_ACTOR
                ),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
                fn_constructor_args=(job, pool.device, pool.cpus),
                **_limited_retries(data),
            )
            try:
                for row in dataset.iter_rows():
                    yield row["message"]
            except self._ray.exceptions.RayError as error:
                raise LostProcess(
                    f"the Ray cluster failed: {_line(error, -1)}; run the same command again: it continues with the "
                    "finished parts"
                ) from error


def load_ray(environment: Mapping[str, str]) -> Any:
    """Returns the module ray, which reads the environment when it is imported.

    Raises:
        ConfigError: Ray is not installed.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("ray", "pandas", "pyarrow"):
            raise
        raise ConfigError(
            f"inference.engine: ray; {error.name} is not installed; run: pip install 'mask-auto-labeler[ray]'"
        ) from None
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
            handler.addFilter(_shorten)
    return ray


def _shorten(record: logging.LogRecord) -> bool:
    """Replaces the trace in a message of Ray Data, which shows Ray's own code, with the last line of the error."""
    if record.exc_info and isinstance(record.exc_info[1], Exception):
        record.msg, record.args = "%s: %s", (_line(record.exc_info[1], -1), record.getMessage())
        record.exc_info = record.exc_text = None
    return True


def _limited_retries(data: Any) -> dict[str, Any]:
    """Returns the option by which a task that ends its process is given up after `TASK_RETRIES`; Ray never does."""
    # Ray 2.60 announces that it removes the option, and has no other one yet.
    warnings.filterwarnings("ignore", ".*ray_remote_args_fn")
    known = "ray_remote_args_fn" in inspect.signature(data.Dataset.map_batches).parameters
    return {"ray_remote_args_fn": _retries} if known else {}


def _retries() -> dict[str, int]:
    return {"max_task_retries": TASK_RETRIES}


def _check_reachable(address: str) -> None:
    """Raises ConfigError unless something listens at HOST:PORT; Ray itself tries for minutes."""
    if address == "auto":
        return
    if "://" in address:
        raise ConfigError(
            f"inference.ray_address: {address}: Ray Client is not supported; run the command on a machine of the "
            "cluster, with auto or HOST:PORT"
        )
    check_address(address, "inference.ray_address")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"inference.ray_address: {address}: {error.strerror or error}; give HOST:PORT of the head node, as "
            "`ray start --head` prints it"
        ) from error


def _temporary_folder(stack: contextlib.ExitStack) -> str:
    """Returns the path of a new folder, which the stack removes and only this account can reach."""
    folder = tempfile.mkdtemp(prefix="mal-ray-")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    # Ray makes its own folder writable for all accounts.
    return os.path.join(folder, "r")


def _line(error: Exception, index: int) -> str:
    """Returns the first (0) or the last (-1) line of a message; Ray's have many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[index]
