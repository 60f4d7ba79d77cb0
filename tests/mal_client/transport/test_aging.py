"""Claims about clients of a server that ends its connections after a fraction of a second."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mal_client.client import AsyncClient, Client
from mal_client.types import BoxLabel, Progress

from mal_server.server import MalServer
from tests.mal_client.datasets import make_dataset, with_masks
from tests.mal_client.test_against_server import DISC, served
from tests.mal_client.transport.test_balancing import handled
from tests.mal_server.fakes import DISC_BOX, BrightPredictor

AGING = {"max_age_s": 0.3, "age_grace_s": 0.2}
BOXES = [DISC_BOX] * 8
CALLS = 12
BATCH_S = 0.04
"""Four calls at once, of four batches each, take longer than the age and its grace together."""


def slow() -> BrightPredictor:
    return BrightPredictor(wait_s=BATCH_S)


def has_each_box_once(labels: list[BoxLabel]) -> bool:
    return [(label.index, label.ok) for label in labels] == [(index, True) for index in range(len(BOXES))]


def label_blocking(address: str) -> list[list[BoxLabel]]:
    with Client(address, timeout_s=60) as client, ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda _: client.label_image(DISC, BOXES), range(CALLS)))


def label_asyncio(address: str) -> list[list[BoxLabel]]:
    async def send() -> list[list[BoxLabel]]:
        async with AsyncClient(address, timeout_s=60) as client:
            return await asyncio.gather(*(client.label_image(DISC, BOXES) for _ in range(CALLS)))

    return asyncio.run(send())


@pytest.mark.parametrize("label", [label_blocking, label_asyncio])
def test_calls_outlive_the_age_of_their_connection(label: Callable[[str], list[list[BoxLabel]]]) -> None:
    servers = list[MalServer]()
    with served(slow(), servers=servers, max_batch_size=2, connections=AGING) as address:
        answers = label(address)
        cut = handled(servers[0], code="CANCELLED")
    assert len(answers) == CALLS
    assert all(map(has_each_box_once, answers))
    assert cut > 0


def test_a_job_outlives_the_age_of_its_connections_without_a_pause_or_a_notice(tmp_path: Path) -> None:
    dataset, notices, progress = make_dataset(tmp_path, images=40), list[str](), Counter[int]()
    servers = list[MalServer]()
    with (
        served(slow(), servers=servers, max_batch_size=2, connections=AGING) as address,
        Client(address, timeout_s=60) as client,
    ):
        result = client.label_dataset(
            dataset.json_path,
            dataset.images_dir,
            dataset.output,
            on_progress=lambda now: progress.update([now.boxes_done]),
            on_notice=notices.append,
        )
        cut = handled(servers[0], "mal.v1.LabelingService/LabelImages", "CANCELLED")
    assert (result.labeled, result.failed_count, result.is_final) == (80, 0, True)
    assert cut > 1
    assert set(progress.values()) == {1}
    assert notices == []


def test_an_evaluation_outlives_the_age_of_its_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_client.evaluation.stream.RETRY_PAUSE_S", 0.01)
    dataset, done = with_masks(make_dataset(tmp_path, images=60)), list[Progress]()
    # Long enough to send the records of earlier streams again.
    aging = {"max_age_s": 0.8, "age_grace_s": 0.8}
    servers = list[MalServer]()
    with (
        served(slow(), servers=servers, max_batch_size=2, connections=aging) as address,
        Client(address, timeout_s=60) as client,
    ):
        evaluation = client.evaluate(dataset.json_path, dataset.images_dir, on_progress=done.append)
        cut = handled(servers[0], "mal.v1.EvaluationService/Evaluate", "CANCELLED")
    assert (evaluation.images, evaluation.failed_count) == (60, 0)
    assert cut > 0
    assert done[-1].images_done == 60
