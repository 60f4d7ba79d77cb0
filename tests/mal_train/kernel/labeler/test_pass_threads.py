"""Passes on the CPU: cores for each, order, errors, busy cores, and bits that do not depend on the threads."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pytest
import torch

from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.pass_threads import EqualBits, PassThreads, SharedCores, pass_sizes, pass_threads
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions
from tests.networks import spread_network

Result = TypeVar("Result")


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class IdleCores(SharedCores):
    """Cores that nobody else uses: a pass of a microsecond measures the noise of the clock."""

    def record(self, running_share: float) -> None:
        pass


@pytest.fixture
def threads() -> Iterator[PassThreads]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield PassThreads(4, IdleCores())
    torch.set_num_threads(before)


def threads_of_pass(_batch: int) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("crops", range(1, 40))
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_passes_hold_all_crops_and_use_every_thread(crops: int, count: int) -> None:
    sizes = pass_sizes(crops, 5, count)
    assert sum(sizes) == crops
    assert max(sizes) <= 5
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) % count == 0 or len(sizes) == crops


@pytest.mark.parametrize(("passes", "count"), [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_few_passes_share_all_cores(threads: PassThreads, passes: int, count: int) -> None:
    assert threads.run(threads_of_pass, range(passes)) == [count] * passes
    assert threads.run(threads_of_pass, range(passes), one_core_each=True) == [1] * passes


def test_threads_of_others_keep_their_number(threads: PassThreads) -> None:
    assert threads.run(threads_of_pass, range(8)) == [1] * 8
    assert torch.get_num_threads() == 4
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 4


def test_each_calling_thread_has_threads_of_its_own() -> None:
    own = pass_threads()
    assert pass_threads() is own
    with ThreadPoolExecutor(1) as other:
        assert other.submit(pass_threads).result() is not own


def test_results_keep_the_order_of_the_batches(threads: PassThreads) -> None:
    last_has_run = threading.Event()

    def run(batch: int) -> int:
        if batch == 3:
            last_has_run.set()
        assert last_has_run.wait(60)
        return batch

    assert threads.run(run, range(4)) == [0, 1, 2, 3]


def test_no_pass_runs_after_an_error(threads: PassThreads) -> None:
    running = set[int]()

    def run(batch: int) -> None:
        running.add(batch)
        if batch == 0:
            raise MemoryError
        running.discard(batch)

    with pytest.raises(MemoryError):
        threads.run(run, range(100))
    assert running == {0}


def test_busy_cores_pause_passes_on_several_of_them_for_longer_each_time() -> None:
    clock = Clock()
    cores = SharedCores(clock)
    pauses = []
    for _ in range(12):
        assert cores.are_idle
        cores.record(0.5)
        began = clock.now
        while not cores.are_idle:
            clock.now += 0.0625
        pauses.append(clock.now - began)
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.5
    assert 20 < pauses[-1] < 31
    cores.record(0.99)
    cores.record(0.5)
    clock.now += 0.2
    assert cores.are_idle


def test_a_lone_pass_takes_one_core_while_the_others_are_busy() -> None:
    clock = Clock()
    cores = SharedCores(clock)
    threads = PassThreads(4, cores)
    assert threads.threads_per_pass(1) == 4
    cores.record(0.4)
    assert threads.threads_per_pass(1) == 1
    assert threads.run(threads_of_pass, [0]) == [1]
    clock.now += 1.0
    assert threads.threads_per_pass(1) == 4


def test_a_pass_that_waits_for_its_core_is_noticed() -> None:
    cores = SharedCores()
    PassThreads(4, cores).run(lambda _: threading.Event().wait(0.05), [0])
    assert not cores.are_idle


@pytest.mark.parametrize(("differs", "expected"), [(False, [1, 4, 4]), (True, [1, 1, 1])])
def test_a_lone_pass_takes_all_cores_only_where_its_bits_stay(
    threads: PassThreads, differs: bool, expected: list[int]
) -> None:
    equal_bits = EqualBits[int](lambda one, other: one == other or not differs)
    run: Callable[[str], list[int]] = lambda kind: [  # noqa: E731
        equal_bits.run(threads, threads_of_pass, 0, kind) for _ in range(3)
    ]
    assert run("small") == expected
    assert run("large") == expected


def maps_with(labeler: Labeler, crops: list[Crop], count: int, size: int) -> list[bytes]:
    """Returns the maps of the crops, predicted `size` at a time, twice, by a thread with `count` torch threads."""

    def predict() -> list[bytes]:
        return [
            prediction.prob.tobytes()
            for _ in range(2)
            for start in range(0, len(crops), size)
            for prediction in labeler.predict(crops[start : start + size])
        ]

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(count,)) as thread:
            return thread.submit(predict).result()
    finally:
        torch.set_num_threads(before)


def test_float32_masks_have_the_same_bytes_on_any_number_of_threads() -> None:
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    boxes = [(0, 0, 150, 110), (10, 20, 60, 60), (70, 50, 12, 12), (30, 30, 40, 20), (5, 5, 100, 100)]
    expected: list[bytes] = []
    for count in (1, 2, 3, 4):
        labeler = Labeler(spread_network(0), LabelerConfig(crop_size=64), precision="float32")
        crops = [crop for crop in labeler.prepare(image, boxes) if isinstance(crop, Crop)]
        for size in (1, len(crops)):
            maps = maps_with(labeler, crops, count, size)
            expected = expected or maps
            assert maps == expected


def test_few_float32_crops_take_all_cores_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = Labeler(spread_network(0), LabelerConfig(crop_size=64), precision="float32")
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    crops = [crop for crop in labeler.prepare(image, [(10, 10, 60, 60)] * 5) if isinstance(crop, Crop)]
    idle, seen, inner = PassThreads(4, IdleCores()), list[int](), labeler._predictor._predict_batch
    monkeypatch.setattr("mal_train.kernel.labeler.crop_predictor.pass_threads", lambda: idle)
    monkeypatch.setattr(EqualBits, "run", lambda _self, threads, run, batch, _kind: threads.run(run, [batch])[0])

    def counting(batch: Sequence[Crop], options: PredictOptions) -> list[Prediction]:
        seen.append(torch.get_num_threads())
        return inner(batch, options)

    monkeypatch.setattr(labeler._predictor, "_predict_batch", counting)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for count in (1, 2, 3, 5):
            labeler.predict(crops[:count])
    finally:
        torch.set_num_threads(before)
    assert seen == [4] + [4] * 2 + [1] * 3 + [1] * 5


def test_crops_of_other_mask_regions_are_passes_of_another_kind() -> None:
    labeler = Labeler(spread_network(0), LabelerConfig(crop_size=64), precision="float32")
    boxes = [(40, 40, 40, 40), (50, 45, 41, 41), (60, 60, 2, 40), (60, 60, 40, 2)]
    crops = [crop for crop in labeler.prepare(np.zeros((120, 160, 3), np.uint8), boxes) if isinstance(crop, Crop)]
    usual, similar, narrow, flat = (labeler._predictor._kind([crop], PredictOptions()) for crop in crops)
    assert usual == similar
    assert len({usual, narrow, flat}) == 3
