"""Launches that are not what they say, and processes that would train different things, are refused."""

import os
from types import SimpleNamespace

import pytest

from open_r1 import launch
from open_r1.errors import UserError

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *launch.TASKS)


@pytest.fixture
def environment(monkeypatch):
    """Set variables, where none of a launcher's is left."""
    for name in os.environ:
        if name in LAUNCHER or name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "SLURM_")):
            monkeypatch.delenv(name)

    def of(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return of


TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, "srun started 2 processes .* would train alone"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"PMI_SIZE": "2"}, "mpirun started 2 processes"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "env -u MV2_COMM_WORLD_SIZE"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "asked for several processes and started one"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 is set and LOCAL_RANK is not"),
        ({**TWO, "TORCHELASTIC_MAX_RESTARTS": "3"}, "again up to 3 times"),
        ({**TWO, "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({**TWO, "PARALLELISM_CONFIG_CP_SIZE": "2"}, "parallelism_config_cp_size: 2: context parallelism is not"),
        ({**TWO, "PARALLELISM_CONFIG_SP_SIZE": "4"}, "parallelism_config_sp_size: 4: sequence parallelism is not"),
        ({**TWO, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2: tensor parallelism is not"),
    ],
)
def test_wrong_launches(environment, variables, says):
    environment(**variables)
    with pytest.raises(UserError, match=says):
        launch.require_launched()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        TWO,
        {"SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_PROCID": "0"},  # the batch script of a job of two tasks
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", **TWO},  # srun, and accelerate launch on each of two machines
        {"PMI_SIZE": "2", **TWO},
        {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch --num_processes 1
        {"WORLD_SIZE": "1", "RANK": "0"},  # one machine, counted by a platform
        {"MASTER_PORT": "29500"},
        {**TWO, "TORCHELASTIC_MAX_RESTARTS": "0", "PARALLELISM_CONFIG_CP_SIZE": "1"},
        {**TWO, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
    ],
)
def test_right_launches(environment, variables):
    environment(**variables)
    launch.require_launched()


def test_a_dry_run_is_one_in_the_shell_of_two_tasks_too(environment):
    environment(SLURM_STEP_NUM_TASKS="2")  # srun --nodes 2 --pty bash
    launch.require_launched(dry_run=True)
    environment(OMPI_COMM_WORLD_SIZE="2")  # which accelerate takes for a launch, and waits for the other
    with pytest.raises(UserError, match="mpirun started 2"):
        launch.require_launched(dry_run=True)


def test_a_port_that_was_there_before_accelerate_is_none_of_its(environment, monkeypatch):
    environment(ACCELERATE_USE_CPU="False", MASTER_PORT="6000")
    monkeypatch.setattr(launch, "environment_of_parent", lambda: ["PATH", "MASTER_PORT"])
    launch.require_launched()


def test_the_parent_s_environment_can_be_read():
    assert set(launch.environment_of_parent()) & {"PATH", "HOME", "PWD"} or not os.path.exists("/proc/self/environ")


def args(deepspeed=None, kind="NO", **values):
    plugin = None
    if deepspeed is not None:
        stage = deepspeed["zero_optimization"]["stage"]
        plugin = SimpleNamespace(deepspeed_config=deepspeed, zero_stage=stage)
    world = {"world_size": 1, "n_gpu": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    of = {"max_grad_norm": 1.0, "bf16": True, "fp16": False, "optim": "adamw_torch_fused"}
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    world |= {"plan_processes": None, "processes": values.get("world_size", 1)}
    return SimpleNamespace(**{**world, **of, "deepspeed_plugin": plugin, "distributed_state": state, **values})


def test_a_world_that_is_not_the_one_launched(environment):
    launch.require_world(args(n_gpu=1))
    with pytest.raises(UserError, match="one process was started for 4 GPUs"):
        launch.require_world(args(n_gpu=4))
    environment(**TWO)
    with pytest.raises(UserError, match="2 processes were launched, but each would train alone"):
        launch.require_world(args())
    launch.require_world(args(world_size=2, kind="MULTI_CPU"))
    environment(ACCELERATE_USE_FSDP="true")
    launch.require_world(args(world_size=2, kind="MULTI_GPU"))
    with pytest.raises(UserError, match="says FSDP, which accelerate takes for GPUs alone"):
        launch.require_world(args(world_size=2, kind="MULTI_CPU"))


def zero(stage=2, **values):
    sharded = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3}
    sharded |= values.pop("sharded", {})
    said = {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "gradient_accumulation_steps": "auto"}
    said["gradient_clipping"] = "auto"
    return {"zero_optimization": sharded, "train_batch_size": "auto", **said, **values}


OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (zero(gradient_accumulation_steps=4), "gradient_accumulation_steps: 4, and the recipe comes to 2"),
        (zero(gradient_clipping=0.5), "gradient_clipping: 0.5, and the recipe comes to 1.0"),
        (zero(train_batch_size=16), "train_batch_size: 16, and the recipe comes to 8"),
        (zero(train_micro_batch_size_per_gpu=1), "train_micro_batch_size_per_gpu: 1, and the recipe comes to 4"),
        (zero(bf16={"enabled": False}), "bf16.enabled: False, and the recipe comes to True"),
        (zero(fp16={"enabled": True}), "fp16.enabled: True, and the recipe comes to False"),
        (zero(optimizer={"type": "AdamW"}), "has optimizer, which is the recipe's"),
        (zero(tensor_parallel={"autotp_size": 2}), "tensor parallelism is not supported"),
        (zero(sequence_parallel_size=2), "sequence parallelism is not supported"),
        (zero(0), "zero_stage: 0, which is DDP by other means"),
        (zero(3, sharded={"stage3_gather_16bit_weights_on_model_save": False}), "without zero3_save_16bit_model"),
    ],
)
def test_a_deepspeed_config_that_says_another_thing(config, says):
    with pytest.raises(UserError, match=says):
        launch.require_world(args(config))


def test_a_deepspeed_config_file_that_clips_nothing():
    config = zero()
    del config["gradient_clipping"]
    launch.require_world(args(config, max_grad_norm=0.0))
    with pytest.raises(UserError, match="does not say gradient_clipping, so nothing would be clipped"):
        launch.require_world(args(config))


def test_an_offloaded_optimizer_is_not_replaced_in_silence():
    config = zero(3, sharded=OFFLOADED)
    launch.require_world(args(config))
    launch.require_world(args(zero(3), optim="adafactor"))
    with pytest.raises(UserError, match="optim: adafactor would be replaced by DeepSpeedCPUAdam"):
        launch.require_world(args(config, optim="adafactor"))


@pytest.mark.parametrize(
    "config",
    [zero(), zero(3), zero(gradient_accumulation_steps=2, gradient_clipping=1.0, train_batch_size=8), zero(1)],
)
def test_a_deepspeed_config_that_agrees(config):
    launch.require_world(args(config))
