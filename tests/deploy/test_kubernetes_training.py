"""The training job of deploy/kubernetes, run by two processes of torchrun in place of two pods."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mal_train.distributed.launch import free_port
from tests.deploy.pods import Host
from tests.deploy.rendered import only, pod_of, render
from tests.mal_train.training.runs import SMALL
from tests.scenes import write_scenes

IMAGES, BATCH, PODS = 6, 2, 2
EPOCHS = 100
STEPS_AN_EPOCH = 2 * IMAGES // (BATCH * PODS)
"""With two boxes an image; a pod that trained alone would make twice as many."""
TINY = [*SMALL, f"train.batch_size={BATCH}", "train.pretrained_model_path=null", "train.gpu_ids=[]"]
VARIABLES = {"TORCH_COMPILE_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def machine(tmp_path: Path) -> Host:
    """A machine with the settings and the dataset of the job."""
    found = Host(tmp_path, {"mal-train-node-0-0.mal-train": "127.0.0.1", "29500": str(free_port())})
    annotations, _ = write_scenes(found.path("/data/x").parent, images=IMAGES, masks=False, seed=1)
    annotations.rename(found.path("/data/boxes.json"))
    manifests = render("train")
    found.mount(manifests, pod_of(only(manifests, "JobSet")))
    return found


@contextmanager
def pods(machine: Host, *overrides: str) -> "Iterator[list[subprocess.Popen[bytes]]]":
    """Runs the pods of the job; kills those that still run at the end."""
    (container,) = pod_of(only(render("train"), "JobSet"))["containers"]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                machine.running(container, *TINY, *overrides, JOB_COMPLETION_INDEX=str(index), **VARIABLES)
            )
            for index in range(PODS)
        ]


def codes(running: "list[subprocess.Popen[bytes]]") -> list[int]:
    return [process.wait(240) for process in running]


def steps(machine: Host) -> list[int]:
    """Returns the steps of the checkpoints of the run."""
    folder = machine.path("/data/results/train/x").parent
    return sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("model_epoch_*.malckpt"))


def test_the_pods_train_one_model_together(machine: Host) -> None:
    with pods(machine, "train.num_epochs=2") as running:
        assert codes(running) == [0, 0]
    assert steps(machine)[-1] == 2 * STEPS_AN_EPOCH


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_drained_pod_ends_all_pods_after_a_checkpoint_and_the_next_start_resumes(machine: Host) -> None:
    longer = [f"train.num_epochs={EPOCHS}", "train.checkpoint_interval=1000"]
    with pods(machine, *longer) as running:
        metrics = machine.path("/data/results/train/metrics.csv")
        until = time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)
        # torchrun replaces the codes of mal-train, here 143.
        assert codes(running) == [1, 1]
    (saved,) = steps(machine)
    assert 0 < saved < EPOCHS * STEPS_AN_EPOCH
    with pods(machine, *longer) as running:
        assert codes(running) == [0, 0]
    assert steps(machine)[-1] == EPOCHS * STEPS_AN_EPOCH
