"""Claims about a bulk job whose name gets and loses servers while the job runs."""

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from mal_client.bulk.dispatcher import CONNECTION_LOST
from mal_client.client import Client
from mal_client.dataset.run import label_dataset
from mal_client.errors import ModelChanged, ServerUnavailable
from mal_client.types import SERVER_DEFAULTS, DatasetResult

from tests.mal_client.datasets import Dataset, make_dataset
from tests.mal_client.fake_server import FakeServer, Faults, Limits, once, serving

IMAGES = 60
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.bulk.server_finder.LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("mal_client.bulk.server_finder.MIN_PAUSE_S", 0.01)
    monkeypatch.setattr("mal_client.bulk.stream.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("mal_client.dataset.servers.FIRST_PAUSE_S", 0.2)


class Names:
    """A resolver of one name, whose addresses change.

    Attributes:
        addresses: of the name; empty where it has none.
        port: of all servers.
        looks: number of resolutions.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.port = 0
        self.looks = 0

    def lookup(self, host: str, port: int) -> Sequence[str]:
        self.looks += 1
        return list(self.addresses)


class Job:
    """A job on the servers of one name, of which each is slow enough to be seen at work."""

    def __init__(self, folder: Path, *hosts: str) -> None:
        self.dataset: Dataset = make_dataset(folder, images=IMAGES)
        self.names = Names(*hosts)
        self.notices: list[str] = []
        self.fakes: dict[str, FakeServer] = {}
        self._stack = ExitStack()

    def serve(self, host: str, fake: FakeServer | None = None) -> FakeServer:
        """Starts a server on an address, whether the name has it or not."""
        found = fake or FakeServer(Faults(delay_s=0.02))
        address = self._stack.enter_context(serving(found, self.names.port, host))
        self.names.port = int(address.rpartition(":")[2])
        self.fakes[host] = found
        return found

    def run(self) -> DatasetResult:
        dataset = self.dataset
        with self._stack, Client(f"mal.test:{self.names.port}", timeout_s=20) as client:
            return label_dataset(
                [client],
                dataset.json_path,
                dataset.images_dir,
                dataset.output,
                SERVER_DEFAULTS,
                on_notice=self.notices.append,
                lookup=self.names.lookup,
            )

    def answered(self) -> Counter[str]:
        return Counter(item for fake in self.fakes.values() for item in fake.item_ids)

    def noticed(self, *words: str) -> list[str]:
        return [notice for notice in self.notices if all(word in notice for word in words)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def is_complete(result: DatasetResult) -> bool:
    return (result.labeled, result.failed, result.is_final) == (2 * IMAGES, (), True)


EACH_ONCE = Counter(map(str, range(IMAGES)))


def test_each_address_of_a_name_gets_a_stream_and_a_share(job: Job) -> None:
    job.names.addresses = list(HOSTS)
    for host in HOSTS:
        job.serve(host)
    assert is_complete(job.run())
    assert job.answered() == EACH_ONCE
    assert min(len(fake.item_ids) for fake in job.fakes.values()) >= IMAGES // 6


def test_a_server_that_is_added_to_the_name_gets_work(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0])
    added = job.serve(HOSTS[1])
    with once(lambda: len(first.item_ids) >= 5, lambda: job.names.addresses.append(HOSTS[1])):
        assert is_complete(job.run())
    assert len(added.item_ids) >= 5
    assert job.answered() == EACH_ONCE
    assert job.noticed(HOSTS[1], "joins")


def test_a_server_that_is_taken_from_the_name_finishes_its_items_and_gets_no_more(job: Job) -> None:
    job.names.addresses = list(HOSTS[:2])
    staying, leaving = job.serve(HOSTS[0]), job.serve(HOSTS[1])
    counts: list[int] = []

    def leave() -> None:
        job.names.addresses.remove(HOSTS[1])

    def count() -> None:
        counts.append(len(leaving.item_ids))

    with once(lambda: len(leaving.item_ids) >= 5, leave), once(lambda: len(staying.item_ids) >= IMAGES // 2, count):
        assert is_complete(job.run())
    assert job.answered() == EACH_ONCE  # also those that it had in flight: none was sent again
    assert len(leaving.item_ids) == counts[0] < IMAGES // 2
    assert job.noticed(HOSTS[1], "no further items")


def test_the_last_server_is_not_left(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0])
    # The name moves to a server that does not run.
    with once(lambda: len(first.item_ids) >= 5, lambda: job.names.addresses.__setitem__(0, HOSTS[2])):
        assert is_complete(job.run())
    assert len(first.item_ids) == IMAGES


def test_when_all_servers_are_replaced_the_job_goes_to_the_new_ones(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0], FakeServer(Faults(delay_s=0.02, kill_after=5)))
    second = job.serve(HOSTS[1])
    with once(lambda: len(first.item_ids) == 5, lambda: job.names.addresses.__setitem__(0, HOSTS[1])):
        assert is_complete(job.run())
    assert len(second.item_ids) == IMAGES - 5


@pytest.mark.parametrize(
    ("limits", "word"),
    [(Limits(precision="bfloat16"), "precision"), (Limits(max_boxes=1), "max_boxes"), (None, "unavailable")],
)
def test_a_server_that_joins_late_and_differs_is_refused_with_a_notice(
    job: Job, limits: Limits | None, word: str
) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0])
    other = FakeServer(limits=limits)
    if limits is not None:
        job.serve(HOSTS[1], other)
    with once(lambda: len(first.item_ids) >= 3, lambda: job.names.addresses.append(HOSTS[1])):
        assert is_complete(job.run())
    assert "LabelImages" not in other.calls
    assert len(job.noticed(HOSTS[1], word)) == 1  # although it was checked several times


def test_a_name_that_resolves_to_nothing_at_the_start_is_one_error(job: Job) -> None:
    job.serve(HOSTS[0])
    with pytest.raises(ServerUnavailable, match=r"mal\.test"):
        job.run()
    assert not job.dataset.output.exists()


def test_a_name_that_resolves_to_nothing_later_is_a_notice_and_the_job_goes_on(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0])
    with once(lambda: len(first.item_ids) >= 3, job.names.addresses.clear):
        assert is_complete(job.run())
    assert job.names.looks > 3
    assert len(job.noticed("mal.test", "continuing")) == 1


def test_a_server_with_other_weights_is_left_and_the_others_finish(job: Job) -> None:
    job.names.addresses = list(HOSTS[:2])
    job.serve(HOSTS[0])
    changed = job.serve(HOSTS[1], FakeServer(Faults(delay_s=0.02, shas=["ab" * 32] * 3 + ["cd" * 32] * 10**6)))
    assert is_complete(job.run())
    assert len(changed.item_ids) >= 4
    assert job.noticed(HOSTS[1], "cdcdcdcdcdcd")


def test_when_every_server_has_other_weights_the_job_ends(job: Job) -> None:
    job.names.addresses = list(HOSTS[:2])
    for host in HOSTS[:2]:
        job.serve(host, FakeServer(Faults(delay_s=0.02, shas=["ab" * 32] * 3 + ["cd" * 32] * 10**6)))
    with pytest.raises(ModelChanged):
        job.run()
    assert not job.dataset.output.exists()


def test_a_server_of_a_fixed_list_that_comes_back_gets_work_again(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=IMAGES)
    living = FakeServer(Faults(delay_s=0.04))
    failing = FakeServer(Faults(delay_s=0.04, break_after=2, breaks=1))
    notices: list[str] = []

    def fail() -> None:
        failing.faults.unavailable = 10**6
        threading.Timer(1.0, lambda: setattr(failing.faults, "unavailable", 0)).start()

    with serving(living) as here, serving(failing) as there, once(lambda: len(failing.item_ids) >= 2, fail):
        clients = [Client(here, timeout_s=20), Client(there, timeout_s=20)]
        result = label_dataset(
            clients,
            dataset.json_path,
            dataset.images_dir,
            dataset.output,
            SERVER_DEFAULTS,
            on_notice=notices.append,
        )
        for client in clients:
            client.close()
    assert is_complete(result)
    about = [notice for notice in notices if there in notice]
    assert CONNECTION_LOST in about[0]
    assert "joins" in about[-1]
    assert len(failing.item_ids) > 2
