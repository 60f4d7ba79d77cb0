"""Claims about a bulk job whose name gets and loses servers while the job runs."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from mal_client.blocking_client import client_of
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
    monkeypatch.setattr("mal_client.bulk.server_finder.REFRESH_EVERY_S", 0.05)
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
        self.stack = ExitStack()

    def serve(self, host: str, fake: FakeServer | None = None) -> FakeServer:
        """Starts a server on an address, whether the name has it or not."""
        found = fake or FakeServer(Faults(delay_s=0.02))
        address = self.stack.enter_context(serving(found, self.names.port, host))
        self.names.port = int(address.rpartition(":")[2])
        self.fakes[host] = found
        return found

    def run(self) -> DatasetResult:
        dataset = self.dataset
        with self.stack, Client(f"mal.test:{self.names.port}", timeout_s=20) as client:
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


WINDOW = Limits().max_items_in_flight


def held(after: int) -> FakeServer:
    """Returns a server that answers some items and then waits for `released`."""
    return FakeServer(Faults(hold_after=after))


def test_each_address_of_a_name_gets_a_stream_and_a_share(job: Job) -> None:
    job.names.addresses = list(HOSTS)
    fakes = [job.serve(host, held(0)) for host in HOSTS]

    def release() -> None:
        for fake in fakes:
            fake.released.set()

    with once(lambda: all(fake.received for fake in fakes), release):
        assert is_complete(job.run())
    assert job.answered() == EACH_ONCE
    assert all(fake.item_ids for fake in fakes)


def test_the_resolver_of_the_system_finds_the_server_of_a_name(job: Job) -> None:
    job.serve(HOSTS[0])
    dataset = job.dataset
    with job.stack, Client(f"localhost:{job.names.port}", timeout_s=20) as client:
        result = client.label_dataset(
            dataset.json_path, dataset.images_dir, dataset.output, on_notice=job.notices.append
        )
    assert is_complete(result)
    assert job.notices == []


def test_a_server_that_is_added_to_the_name_gets_work(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first, added = job.serve(HOSTS[0], held(5)), job.serve(HOSTS[1])
    with (
        once(lambda: len(first.item_ids) == 5, lambda: job.names.addresses.append(HOSTS[1])),
        once(lambda: len(added.item_ids) >= 5, first.released.set),
    ):
        assert is_complete(job.run())
    assert job.answered() == EACH_ONCE
    assert job.noticed(HOSTS[1], "joins")


def test_a_server_that_is_taken_from_the_name_finishes_its_items_and_gets_no_more(job: Job) -> None:
    job.names.addresses = list(HOSTS[:2])
    staying, leaving = job.serve(HOSTS[0], held(5)), job.serve(HOSTS[1], held(5))

    def release() -> None:
        staying.released.set()
        leaving.released.set()

    with (
        once(lambda: len(leaving.received) == 5 + WINDOW, lambda: job.names.addresses.remove(HOSTS[1])),
        once(lambda: job.noticed(HOSTS[1], "no further items"), release),
    ):
        assert is_complete(job.run())
    assert job.answered() == EACH_ONCE  # those that it had in flight, too: none was sent again
    assert len(leaving.item_ids) == 5 + WINDOW


def test_the_client_of_a_server_that_joined_and_left_is_gone_before_the_job_ends(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[ref[Client]] = []

    def made(*args: Any) -> Client:
        client = client_of(*args)
        clients.append(ref(client))
        return client

    def is_gone() -> bool:
        return {client.address for one in clients if (client := one()) is not None} == {f"{HOSTS[0]}:{job.names.port}"}

    monkeypatch.setattr("mal_client.blocking_client.client_of", made)
    job.names.addresses = [HOSTS[0]]
    first, added = job.serve(HOSTS[0], held(5)), job.serve(HOSTS[1])
    with (
        once(lambda: len(first.item_ids) == 5, lambda: job.names.addresses.append(HOSTS[1])),
        once(lambda: len(added.item_ids) >= 5, lambda: job.names.addresses.remove(HOSTS[1])),
        once(lambda: len(clients) == 2 and is_gone(), first.released.set),
    ):
        assert is_complete(job.run())


def test_the_last_server_is_not_left(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0], held(5))
    # The name moves to a server that does not run.
    with (
        once(lambda: len(first.item_ids) == 5, lambda: job.names.addresses.__setitem__(0, HOSTS[2])),
        once(lambda: job.noticed(HOSTS[2]), first.released.set),
    ):
        assert is_complete(job.run())
    assert len(first.item_ids) == IMAGES


def test_when_all_servers_are_replaced_the_job_goes_to_the_new_ones(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0], FakeServer(Faults(kill_after=5)))
    second = job.serve(HOSTS[1])
    with once(lambda: len(first.item_ids) == 5, lambda: job.names.addresses.__setitem__(0, HOSTS[1])):
        assert is_complete(job.run())
    assert len(second.item_ids) == IMAGES - 5


@pytest.mark.parametrize(
    ("limits", "word"),
    [(Limits(precision="bfloat16"), "precision"), (Limits(max_boxes=1), "max_boxes"), (None, "unavailable")],
)
def test_a_server_that_joins_late_and_differs_is_refused_with_one_notice(
    job: Job, limits: Limits | None, word: str
) -> None:
    job.names.addresses = [HOSTS[0]]
    first, other = job.serve(HOSTS[0], held(3)), FakeServer(limits=limits)
    if limits is not None:
        job.serve(HOSTS[1], other)
    seen: list[int] = []
    """Looks at the time of each poll since the notice."""

    def was_checked_again() -> bool:
        if job.noticed(HOSTS[1], word):
            seen.append(job.names.looks)
        return bool(seen) and seen[-1] >= seen[0] + 10

    with (
        once(lambda: len(first.item_ids) == 3, lambda: job.names.addresses.append(HOSTS[1])),
        once(was_checked_again, first.released.set),
    ):
        assert is_complete(job.run())
    assert "LabelImages" not in other.calls
    assert len(job.noticed(HOSTS[1], word)) == 1


def test_a_name_that_resolves_to_nothing_at_the_start_is_one_error(job: Job) -> None:
    job.serve(HOSTS[0])
    with pytest.raises(ServerUnavailable, match=r"mal\.test"):
        job.run()
    assert not job.dataset.output.exists()


def test_a_name_that_resolves_to_nothing_later_is_a_notice_and_the_job_goes_on(job: Job) -> None:
    job.names.addresses = [HOSTS[0]]
    first = job.serve(HOSTS[0], held(3))

    def release() -> None:
        looks = job.names.looks
        while job.names.looks < looks + 3:
            first.released.wait(0.01)
        first.released.set()

    with (
        once(lambda: len(first.item_ids) == 3, job.names.addresses.clear),
        once(lambda: job.noticed("mal.test", "continuing"), release),
    ):
        assert is_complete(job.run())
    assert len(job.noticed("mal.test", "continuing")) == 1


def other_weights(after: int) -> FakeServer:
    """Returns a server that changes its checkpoint after some items."""
    return FakeServer(Faults(shas=["ab" * 32] * after + ["cd" * 32] * 10**6))


def test_a_server_with_other_weights_is_left_and_the_others_finish(job: Job) -> None:
    job.names.addresses = list(HOSTS[:2])
    first, changed = job.serve(HOSTS[0], held(2)), job.serve(HOSTS[1], other_weights(3))
    with once(lambda: job.noticed(HOSTS[1], "cdcdcdcdcdcd"), first.released.set):
        assert is_complete(job.run())
    assert len(changed.item_ids) >= 4


def test_when_every_server_has_other_weights_the_job_ends(job: Job) -> None:
    job.names.addresses = list(HOSTS[:2])
    for host in HOSTS[:2]:
        job.serve(host, other_weights(3))
    with pytest.raises(ModelChanged):
        job.run()
    assert not job.dataset.output.exists()


def test_a_server_of_a_fixed_list_that_comes_back_gets_work_again(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=IMAGES)
    living, failing = held(5), FakeServer(Faults(kill_after=2))
    notices: list[str] = []

    def is_given_up() -> bool:
        return any("continuing" in notice for notice in notices)

    def come_back() -> None:
        failing.faults.unavailable = 0

    with (
        serving(living) as here,
        serving(failing) as there,
        once(is_given_up, come_back),
        once(lambda: len(failing.item_ids) > 5, living.released.set),
        Client(here, timeout_s=20) as first,
        Client(there, timeout_s=20) as second,
    ):
        result = label_dataset(
            [first, second],
            dataset.json_path,
            dataset.images_dir,
            dataset.output,
            SERVER_DEFAULTS,
            on_notice=notices.append,
        )
    assert is_complete(result)
    about = [notice for notice in notices if there in notice]
    assert CONNECTION_LOST in about[0]
    assert "joins" in about[-1]
