"""Device fields that the sections of all commands share."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from mal_train.core.yaml_config import Strict


class Devices(Strict):
    """Devices of a command: one process per device."""

    num_gpus: int = Field(
        default=1, ge=1, le=1024, description="Processes per machine: one per GPU, or this many on the CPU."
    )
    gpu_ids: tuple[Annotated[int, Field(ge=0, le=1023)], ...] = Field(
        default=(0,),
        description=(
            "GPU index of each process; [0]: the first num_gpus GPUs; []: the CPU.\n"
            "A machine without CUDA uses the CPU whatever this says."
        ),
    )

    @model_validator(mode="after")
    def _one_device_each(self) -> Self:
        ids = self.gpu_ids
        if ids not in {(), (0,)} and (len(ids) != self.num_gpus or len(set(ids)) != len(ids)):
            raise ValueError(
                f"num_gpus {self.num_gpus}, gpu_ids {list(ids)}: give num_gpus different ids, [0] for the first "
                "num_gpus GPUs, or [] for the CPU"
            )
        return self

    @property
    def gpus(self) -> tuple[int, ...]:
        """GPU index of each process; empty for the CPU."""
        return tuple(range(self.num_gpus)) if self.gpu_ids == (0,) else self.gpu_ids


class OneMachine(Devices):
    """Devices of a command that runs on one machine only."""

    num_nodes: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Machines; must be 1. `mal-client label --server A,B` labels on several machines.",
    )

    @field_validator("num_nodes")
    @classmethod
    def _one(cls, value: int) -> int:
        if value != 1:
            raise ValueError(
                "this command runs on one machine; to label on several, start mal-server on each and run "
                "mal-client label --server HOST1:50051,HOST2:50051"
            )
        return value
