"""Which devices a task runs on: fields that stand in the sections of all tasks."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from mal_train.core.yaml_config import Strict


class Devices(Strict):
    """Where a task runs: one process a device."""

    num_gpus: int = Field(default=1, ge=1, description="Processes on a machine, one a GPU (or so many on the CPU).")
    gpu_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0,),
        description=(
            "Their GPUs, one each; [0] stands for the first num_gpus.\n"
            "[]: the CPU, which also does the work on a machine without CUDA."
        ),
    )

    @model_validator(mode="after")
    def _one_device_each(self) -> Self:
        ids = self.gpu_ids
        if ids not in {(), (0,)} and (len(ids) != self.num_gpus or len(set(ids)) != len(ids)):
            raise ValueError(
                f"num_gpus {self.num_gpus}, gpu_ids {list(ids)}: name as many different ids as num_gpus says, [0] for "
                "the first ones, or [] for the CPU"
            )
        return self

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPU of each process; empty for the CPU."""
        return tuple(range(self.num_gpus)) if self.gpu_ids == (0,) else self.gpu_ids


class OneMachine(Devices):
    """Where labeling runs."""

    num_nodes: int = Field(
        default=1, ge=1, description="Machines; 1, for several share a file through mal-client label --server A,B."
    )

    @field_validator("num_nodes")
    @classmethod
    def _one(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                "this command labels on one machine; for several, start mal-server on each and label with "
                "mal-client label --server HOST1:50051,HOST2:50051"
            )
        return value
