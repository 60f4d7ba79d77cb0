"""Rank and address of a process, from the variables of each launcher."""

import pytest

from mal_train.core.errors import ConfigError
from mal_train.distributed.env import LAUNCHED, DistributedEnv, first_host, read_distributed_env


def test_a_single_process_has_rank_0_of_1() -> None:
    assert read_distributed_env({}) == DistributedEnv()
    one_task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    assert read_distributed_env(one_task) == DistributedEnv()


def test_torchrun_and_mal_train_set_the_same_variables() -> None:
    variables = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "7",
    }
    for mark, launcher in (("TORCHELASTIC_RUN_ID", "torchrun"), (LAUNCHED, "mal-train")):
        expected = DistributedEnv(5, 8, 1, 2, launcher, "a", 7)  # type: ignore[arg-type]
        assert read_distributed_env({mark: "1", **variables}) == expected


def test_slurm_variables_give_rank_and_address() -> None:
    variables = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "1234567",
    }
    assert read_distributed_env(variables) == DistributedEnv(3, 4, 1, 1, "SLURM", "gpu07", 19567)
    assert read_distributed_env({**variables, "MASTER_ADDR": "b", "MASTER_PORT": "9"}).master_addr == "b"
    assert read_distributed_env({**variables, "SLURM_JOB_NAME": "bash"}) == DistributedEnv()


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[3,5-6]", "n3"), ("a-b[001-004],c", "a-b001"), ("x,y", "x")]
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("value", [None, "first", "-1"])
def test_a_missing_or_malformed_variable_is_refused_by_name(value: str | None) -> None:
    variables = {LAUNCHED: "1", "RANK": "0", "LOCAL_RANK": "0", **({} if value is None else {"WORLD_SIZE": value})}
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        read_distributed_env(variables)


def test_a_number_of_processes_that_differs_from_the_spec_is_refused() -> None:
    DistributedEnv(world_size=4).check(2, 2)
    with pytest.raises(ConfigError, match=r"num_gpus 2 x train\.num_nodes 2.*torchrun.* 2\b"):
        DistributedEnv(world_size=2, launcher="torchrun").check(2, 2)
    with pytest.raises(ConfigError, match=r"local rank 3.*SLURM.*train\.num_gpus 2"):
        DistributedEnv(rank=3, world_size=4, local_rank=3, launcher="SLURM").check(2, 2)
