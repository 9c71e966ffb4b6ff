"""Launches that are not what they say, and processes that would train different things, are refused."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist

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


FACTS = {
    **dict.fromkeys(("evaluated", "base"), None),
    "data": "d1",
    "order": {"seed": 1},
    "rows_a_step": 8,
    "launch": "ddp",
    "precision": "no",
    "config_files": {},
    "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    "settings": {"learning_rate": 1e-5, "output_dir": "out"},
    "code": {"digest": "c1", "commit": "abc"},
}


@pytest.fixture
def meet(monkeypatch, tmp_path):
    """Have some processes meet, each with its facts and folder; returns what each was told, None where all is well."""
    monkeypatch.setattr(launch, "SEEN_WITHIN", 0.1)
    kept = dist.HashStore()
    monkeypatch.setattr(launch, "store", lambda: kept)
    monkeypatch.setattr(launch.platform, "node", lambda: threading.current_thread().name)

    def start(*processes, timeout=20):
        told = {}

        def one(rank, facts, folder):
            about = SimpleNamespace(
                process_index=rank, world_size=len(processes), output_dir=str(folder), ddp_timeout=timeout
            )
            try:
                told[rank] = launch.require_one_run({**FACTS, **facts}, about)
            except UserError as error:
                told[rank] = str(error)

        threads = []
        for rank, process in enumerate(processes):
            if process is None:  # never comes
                continue
            host, facts, folder = process
            (tmp_path / folder).mkdir(exist_ok=True)
            thread = threading.Thread(target=one, args=(rank, facts, tmp_path / folder), name=host)
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return told

    start.kept = kept
    return start


def test_processes_that_train_the_same(meet, tmp_path):
    other_commit = {"code": {"digest": "c1", "commit": "def"}}
    assert meet(("a", {}, "out"), ("a", {}, "out"), ("b", other_commit, "out")) == {0: None, 1: None, 2: None}
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (
            {"settings": {"learning_rate": 2e-5, "output_dir": "out"}},
            "learning_rate: 1e-05 on a (process 0, 1); 2e-05",
        ),
        ({"settings": {**FACTS["settings"], "seed": 1}}, "seed: nothing on a (process 0, 1); 1 on b (process 2, 3)"),
        ({"versions": {**FACTS["versions"], "trl": "1.15.0"}}, 'versions: trl: "1.16.0" on a'),
        ({"code": {"digest": "c2"}}, 'code of open_r1: "c1" on a'),
        ({"data": "d2"}, 'data: "d1" on a (process 0, 1); "d2" on b (process 2, 3)'),
        ({"precision": "bf16"}, 'precision: "no" on a'),
        ({"base": "b2"}, "base: null on a"),
    ],
)
def test_processes_that_would_train_different_things(meet, tmp_path, facts, says):
    told = meet(*[("a", {}, "out")] * 2, *[("b", facts, "out")] * 2)
    assert len(set(told.values())) == 1
    assert says in told[0]
    assert told[0].count("\n  ") == 1
    assert not list((tmp_path / "out").iterdir())


def test_output_directories_that_are_not_one(meet):
    told = meet(("a", {}, "out"), ("a", {}, "out"), ("b", {}, "another"))
    assert len(set(told.values())) == 1
    assert "out on b (process 2) is not the directory of that name on a" in told[0]
    assert "a file system that all machines share" in told[0]


def test_a_process_that_never_comes(meet):
    told = meet(("a", {}, "out"), ("a", {}, "out"), None, timeout=1)
    assert told[0].startswith("process 2 has not come to the start within 1 seconds (ddp_timeout)")
    assert told[1].startswith("process 0 has not come to the start") or told[1] == told[0]


def test_a_store_that_is_gone(monkeypatch, tmp_path):
    class Gone:
        def check(self, keys):
            raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(launch, "store", Gone)
    about = SimpleNamespace(process_index=1, world_size=2, output_dir=str(tmp_path), ddp_timeout=5)
    with pytest.raises(UserError, match="the first process is gone"):
        launch.require_one_run(FACTS, about)
    assert launch.refused() == ""


def test_a_process_that_cannot_go_on_ends_those_that_wait(meet):
    shown = []
    for host in ("b", "b", "a"):
        thread = threading.Thread(target=lambda: shown.append(launch.announce("row 7 is broken")), name=host)
        thread.start()
        thread.join()
    assert shown == [True, False, True]  # once on every machine
    assert launch.refused() == "row 7 is broken"
    assert meet(("a", {}, "out"), ("a", {}, "out"), None) == {0: "row 7 is broken", 1: "row 7 is broken"}


def test_without_other_processes_the_first_of_a_machine_speaks(environment, monkeypatch):
    monkeypatch.setattr(launch, "store", lambda: None)
    assert launch.announce("it")
    environment(LOCAL_RANK="0", TORCHELASTIC_RESTART_COUNT="1")
    assert not launch.announce("it")  # it was said before
    environment(LOCAL_RANK="1", TORCHELASTIC_RESTART_COUNT="0")
    assert not launch.announce("it")
    assert launch.refused() == ""
