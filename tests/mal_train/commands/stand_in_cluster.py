"""A stand-in for a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from mal_train.core.coco.parquet_parts import Part
from mal_train.offline.part_labeler import PartJob, PartLabeler, encode_task
from mal_train.offline.ray_cluster import ActorPool

Change = Callable[[Iterator[str]], Iterator[str]]


class StandInCluster:
    """A cluster of one actor in this process.

    Attributes:
        labeled: parts that it was given.
        sizes: number of parts of each task.
        change: changes its messages.
    """

    labeled: ClassVar[list[Part]] = []
    sizes: ClassVar[list[int]] = []
    change: ClassVar[Change] = staticmethod(lambda messages: messages)

    def __init__(self, address: str) -> None:
        self.address = address

    def __enter__(self) -> "StandInCluster":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def plan(self, *, use_gpus: bool, count: int, cpus: int) -> ActorPool:
        return ActorPool(count or 1, cpus or 1, 0)

    def label(self, job: PartJob, pool: ActorPool, tasks: Sequence[Sequence[Part]]) -> Iterator[str]:
        type(self).labeled += [part for task in tasks for part in task]
        type(self).sizes += map(len, tasks)
        labeler = PartLabeler(job, pool.device, pool.cpus, lambda code: None)
        rows = labeler({"task": [encode_task(task) for task in tasks]})
        yield from type(self).change(row["message"][0] for row in rows)
