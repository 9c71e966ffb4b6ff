"""How the processes of a run were started: the world that was launched is the world that trains.

accelerate, torchrun, Slurm and MPI leave what they were told in the environment. Where that is not what trains,
upstream goes on without a word: every process alone, or as plain DDP, or in another precision.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.errors import UserError
from open_r1.schema import show

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig

# Where a starter says how many tasks it started, none of which knows of the others unless a launcher told it.
TASKS = {"SLURM_STEP_NUM_TASKS": "srun"}
TASKS |= dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"), "mpirun")
# What accelerate calls the ways of sharing one batch among processes.
SHARED = {"CP_SIZE": "context parallelism", "SP_SIZE": "sequence parallelism", "TP_SIZE": "tensor parallelism"}
SAME_ROWS = (
    "is not supported: every process must read rows of its own here, which order, resume and the loss of a step are "
    "accounted by; leave it out, and for long rows see recipes/README.md"
)


def require_launched(dry_run: bool = False) -> None:
    """Refuse what the environment tells is no run that several processes train together. Raises `UserError`."""
    said = os.environ
    if "WORLD_SIZE" not in said:
        require_meant_alone(dry_run)
    elif said["WORLD_SIZE"] != "1" and "LOCAL_RANK" not in said:
        raise UserError(
            f"WORLD_SIZE={said['WORLD_SIZE']} is set and LOCAL_RANK is not: this process was started by hand or by a "
            "platform that counts machines, and would train alone; start it with accelerate launch on every machine "
            "(--num_machines, --num_processes, --machine_rank), or unset WORLD_SIZE"
        )
    if (restarts := said.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
        raise UserError(
            f"the launcher would start the run again up to {restarts} times (max_restarts), also after it was told to "
            "stop and had saved, and after an error like this one; leave max_restarts out: the same command goes on "
            "from the last checkpoint, and run_state.json says whether it should"
        )
    if said.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        raise UserError("the launch config says Megatron-LM, which does not train these models; take zero3 or fsdp2")
    for size, name in SHARED.items():
        if (number := said.get(f"PARALLELISM_CONFIG_{size}", "1")) != "1":
            raise UserError(f"the launch config says parallelism_config_{size.lower()}: {number}: {name} {SAME_ROWS}")


def require_meant_alone(dry_run: bool) -> None:
    """Refuse a process that was started as one of several and knows of no other.

    Of a dry run srun may start as many as it likes: the shell of `srun --nodes 2 --pty bash` is one of two tasks.
    """
    for variable, starter in TASKS.items():
        if dry_run and starter == "srun":
            continue
        if (tasks := os.environ.get(variable, "1")) not in ("", "0", "1"):
            raise UserError(
                f"{starter} started {tasks} processes ({variable}), and each would train alone: nothing told them of "
                "each other; start accelerate launch, one on every machine (slurm/train.slurm does), or, when they "
                f"are meant to be runs of their own, each with env -u {variable} and its own output_dir"
            )
    # accelerate without a GPU launcher starts one process, and sets a port for several that it does not start.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in set(os.environ) - set(environment_of_parent()):
        raise UserError(
            "accelerate launch was asked for several processes and started one: --cpu and distributed_type MULTI_CPU "
            "do that; launch with --config_file recipes/accelerate_configs/ddp.yaml --num_processes 2 before the "
            "script and --use_cpu behind it, or with --num_processes 1"
        )


def environment_of_parent() -> list[str]:
    """Names of the variables that this process's parent was started with, empty where that cannot be read."""
    try:
        pairs = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
    return [os.fsdecode(pair.partition(b"=")[0]) for pair in pairs]


def require_world(args: "SFTConfig") -> None:
    """Refuse a world that is not the one that was launched. Raises `UserError`."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != launched:
        raise UserError(
            f"{launched} processes were launched, but each would train alone: no GPU is found for them; on a machine "
            "without GPUs add --use_cpu, else check the driver and CUDA_VISIBLE_DEVICES"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"one process was started for {args.n_gpu} GPUs; start one for each with accelerate launch, or choose a "
            "GPU with CUDA_VISIBLE_DEVICES"
        )
    kind = args.distributed_state.distributed_type.value
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and kind in ("NO", "MULTI_CPU") and args.plan_processes is None:
        raise UserError(
            "the launch config says FSDP, which accelerate takes for GPUs alone and would silently replace with DDP "
            "here; without a GPU launch with ddp.yaml, zero2.yaml or zero3.yaml"
        )
    if args.deepspeed_plugin is not None:
        require_deepspeed(args, args.deepspeed_plugin)


def require_deepspeed(args: "SFTConfig", plugin: Any) -> None:
    """Refuse a DeepSpeed config that says another thing than the recipe, or that saves no model."""
    config, where = plugin.deepspeed_config, "the DeepSpeed config"
    batch = args.per_device_train_batch_size
    due = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "train_micro_batch_size_per_gpu": batch,
        "train_batch_size": batch * args.gradient_accumulation_steps * args.processes,
        "bf16": bool(args.bf16),
        "fp16": bool(args.fp16),
    }
    for key, wanted in due.items():
        found = config.get(key, "auto")
        found = found.get("enabled", "auto") if isinstance(found, dict) else found
        if found not in ("auto", wanted):
            name = f"{key}.enabled" if key in ("bf16", "fp16") else key
            raise UserError(
                f"{where} says {name}: {show(found)}, and the recipe comes to {show(wanted)}; say auto there, or take "
                "it out of a launch config that names no deepspeed_config_file, and it follows the recipe"
            )
    if "gradient_clipping" not in config and args.max_grad_norm:
        raise UserError(f"{where} does not say gradient_clipping, so nothing would be clipped; add auto there")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"{where} has {key}, which is the recipe's (optim, lr_scheduler_type); take it out")
    for key, name in (("sequence_parallel_size", "sequence parallelism"), ("tensor_parallel", "tensor parallelism")):
        size = config.get(key, 1)
        if (size.get("autotp_size", 1) if isinstance(size, dict) else size) not in (0, 1):
            raise UserError(f"{where} says {key}: {show(size)}: {name} {SAME_ROWS}")
    optimizer = str(getattr(args.optim, "value", args.optim))
    home = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if home != "none" and not optimizer.startswith("adamw_torch"):
        raise UserError(
            f"the launch config offloads the optimizer, and optim: {optimizer} would be replaced by DeepSpeedCPUAdam; "
            "leave optim out (AdamW), or launch with zero3.yaml"
        )
    if plugin.zero_stage == 0:
        raise UserError("the launch config says zero_stage: 0, which is DDP by other means; launch with ddp.yaml")
    if plugin.zero_stage == 3 and not config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "the launch config says zero_stage: 3 without zero3_save_16bit_model: true: the weights would be saved in "
            "pieces that from_pretrained does not load; add it (in a DeepSpeed config file: "
            "stage3_gather_16bit_weights_on_model_save)"
        )
