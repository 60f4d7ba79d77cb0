"""Claims about bulk jobs on several servers."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from mal_client.bulk.dispatcher import CONNECTED_AGAIN, CONNECTION_LOST
from mal_client.client import Client
from mal_client.dataset.run import label_dataset
from mal_client.errors import ServerUnavailable
from mal_client.types import SERVER_DEFAULTS, DatasetResult, Progress

from mal_train.core.errors import ConfigError
from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, Limits, once, serving


def label(dataset: Dataset, *fakes: FakeServer, also: tuple[str, ...] = ()) -> tuple[DatasetResult, list[str]]:
    notices: list[str] = []
    with ExitStack() as stack:
        addresses = [stack.enter_context(serving(fake)) for fake in fakes]
        clients = [stack.enter_context(Client(address, timeout_s=20)) for address in [*addresses, *also]]
        result = label_dataset(
            clients, dataset.json_path, dataset.images_dir, dataset.output, SERVER_DEFAULTS, on_notice=notices.append
        )
    return result, notices


def test_several_servers_write_the_file_that_one_would_write(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=30)
    label(dataset, FakeServer())
    expected = dataset.output.read_bytes()
    fakes = [FakeServer(Faults(hold_after=0)) for _ in range(3)]

    def release() -> None:
        for fake in fakes:
            fake.released.set()

    with once(lambda: all(len(fake.received) >= 3 for fake in fakes), release):
        label(dataset, *fakes)
    assert dataset.output.read_bytes() == expected
    assert Counter(item for fake in fakes for item in fake.item_ids) == Counter(map(str, range(30)))
    assert all(len(fake.item_ids) >= 3 for fake in fakes)


def test_no_result_is_lost_when_a_server_dies_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    dataset = make_dataset(tmp_path, images=40)
    dying, living = FakeServer(Faults(kill_after=5)), FakeServer(Faults(hold_after=0))
    with once(lambda: len(dying.item_ids) == 5, living.released.set):
        result, notices = label(dataset, dying, living)
    assert (result.labeled, result.failed, result.is_final) == (80, (), True)
    assert len(dying.item_ids) == 5
    assert sorted({*dying.item_ids, *living.item_ids}, key=int) == [str(image) for image in range(40)]
    lost, *given_up = notices
    assert CONNECTION_LOST in lost
    assert "other servers" in lost
    assert given_up == [] or "1 of 2" in given_up[0]


def test_a_lost_connection_and_its_return_are_one_notice_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.001)
    # Three failures without a response between them are one absence.
    result, notices = label(make_dataset(tmp_path, images=10), FakeServer(Faults(break_after=0, breaks=3)))
    assert result.labeled == 20
    assert [notice.partition(": ")[2].partition(" (")[0] for notice in notices] == [CONNECTION_LOST, CONNECTED_AGAIN]
    assert "other servers" not in notices[0]


def test_no_result_is_lost_when_the_port_of_a_server_closes_under_load(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=40)
    living, leaving = FakeServer(Faults(hold_after=0)), FakeServer(Faults(hold_after=2))
    left = threading.Event()
    with serving(living) as here, ExitStack() as there:
        clients = [Client(here), Client(there.enter_context(serving(leaving)))]

        def leave() -> None:
            there.close()
            left.set()
            living.released.set()

        # It leaves with some items answered and others in flight.
        with once(lambda: len(leaving.item_ids) == 2 and len(leaving.received) > 2, leave):
            result = label_dataset(clients, dataset.json_path, dataset.images_dir, dataset.output, SERVER_DEFAULTS)
        for client in clients:
            client.close()
    assert (result.labeled, result.failed) == (80, ())
    assert left.is_set()


@contextmanager
def served_by_a_process() -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Runs a fake server in its own process; yields the process and the address."""
    code = (
        "import time\nfrom tests.mal_client.fake_server import FakeServer, Faults, serving\n"
        "with serving(FakeServer(Faults(delay_s=0.01))) as address:\n"
        "    print(address, flush=True)\n    time.sleep(600)"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.promise("faults", "One of two servers that a dataset job names is killed, and no result is lost")
def test_no_result_is_lost_when_a_server_process_is_killed_under_load(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=60)
    label(dataset, FakeServer())
    expected = dataset.output.read_bytes()
    with served_by_a_process() as (doomed, there), served_by_a_process() as (_, here):
        clients = [Client(here, timeout_s=20), Client(there, timeout_s=20)]
        notices: list[str] = []

        def kill_half_way(progress: Progress) -> None:
            if progress.images_done == 20:
                doomed.kill()

        result = label_dataset(
            clients,
            dataset.json_path,
            dataset.images_dir,
            dataset.output,
            SERVER_DEFAULTS,
            on_progress=kill_half_way,
            on_notice=notices.append,
        )
        for client in clients:
            client.close()
    assert (result.labeled, result.failed, result.is_final) == (120, (), True)
    assert notices[0].startswith(f"{there}: {CONNECTION_LOST}")
    assert not any(CONNECTION_LOST in notice for notice in notices[1:])
    assert dataset.output.read_bytes() == expected


def test_when_all_servers_are_lost_results_are_kept_and_the_rest_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.001)
    dataset = make_dataset(tmp_path, images=20)
    result, _ = label(dataset, *(FakeServer(Faults(kill_after=3, delay_s=0.005)) for _ in range(2)))
    assert (result.labeled, result.failed_count, result.is_final) == (12, 28, False)
    assert label(dataset, FakeServer())[0].labeled == 40


def test_a_server_that_is_unreachable_at_the_start_is_named_and_left_out(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    result, notices = label(dataset, FakeServer(), also=("127.0.0.1:9",))
    assert result.labeled == 6
    assert "127.0.0.1:9" in notices[0]
    assert "1 of 2" in notices[0]


def test_a_job_without_a_reachable_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:9"):
        label(make_dataset(tmp_path), also=("127.0.0.1:9",))


def test_servers_with_different_settings_are_refused_before_any_work(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    fakes = FakeServer(), FakeServer(limits=Limits(precision="bfloat16"))
    with pytest.raises(ConfigError, match=r"precision 'bfloat16' .*'float32'"):
        label(dataset, *fakes)
    assert all("LabelImages" not in fake.calls for fake in fakes)


@pytest.mark.parametrize("is_0_1_0", [False, True])
def test_an_item_whose_masks_exceed_a_message_is_split(tmp_path: Path, *, is_0_1_0: bool) -> None:
    dataset = make_dataset(tmp_path, images=2, boxes=7)
    fake = FakeServer(limits=Limits(boxes_per_response=2, is_0_1_0=is_0_1_0))
    result, _ = label(dataset, fake)
    assert (result.labeled, result.failed) == (14, ())
    too_large = FakeServer(limits=Limits(boxes_per_response=0, is_0_1_0=is_0_1_0))
    result, _ = label(dataset, too_large)
    assert {row.error.reason for row in result.failed} == {"RESPONSE_TOO_LARGE"}
