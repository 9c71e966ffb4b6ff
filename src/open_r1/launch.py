"""How the processes of a run were started, and that they are one run.

accelerate, torchrun, Slurm and MPI leave what they were told in the environment. Where that is not what trains,
upstream goes on without a word: every process alone, or as plain DDP, or in another precision.
"""

import contextlib
import json
import logging
import os
import platform
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.errors import UserError
from open_r1.schema import show

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)
# Where a starter says how many tasks it started, none of which knows of the others unless a launcher told it.
TASKS = {"SLURM_STEP_NUM_TASKS": "srun"}
TASKS |= dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"), "mpirun")
# What accelerate calls the ways of sharing one batch among processes.
SHARED = {"CP_SIZE": "context parallelism", "SP_SIZE": "sequence parallelism", "TP_SIZE": "tensor parallelism"}
SAME_ROWS = (
    "is not supported: every process must read rows of its own here, which order, resume and the loss of a step are "
    "accounted by; leave it out, and for long rows see recipes/README.md"
)
SEEN_WITHIN = 60.0  # seconds until a file made on one machine is seen on another: as long as NFS caches a folder
OURS = "open_r1/"  # how keys begin in the store that the processes meet at
COMPARED = ("data", "evaluated", "order", "rows_a_step", "launch", "precision", "base", "config_files", "versions")


def require_launched() -> None:
    """Refuse what the environment tells is no run that several processes train together. Raises `UserError`."""
    said = os.environ
    if "WORLD_SIZE" not in said:
        require_meant_alone()
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


def require_meant_alone() -> None:
    """Refuse a process that was started as one of several and knows of no other."""
    for variable, starter in TASKS.items():
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


# What the processes of a run tell each other


def store() -> Any:
    """The store that the processes of a run met at; None where there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def announce(problem: str) -> bool:
    """Tell the other processes that this one cannot go on; returns whether it is this one that says why.

    On every machine one does: the first to know. Those that wait in `require_one_run` end with the same words.
    """
    with contextlib.suppress(RuntimeError):  # the process that kept the store is gone
        if (kept := store()) is not None:
            kept.compare_set(f"{OURS}refused", "", problem)
            return kept.add(f"{OURS}said on {platform.node()}", 1) == 1
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def refused() -> str:
    """Why another process cannot go on, empty where none said so; its launcher then ends this one with a signal."""
    with contextlib.suppress(RuntimeError):
        kept = store()
        if kept is not None and kept.check([f"{OURS}refused"]):
            return kept.get(f"{OURS}refused").decode()
    return ""


def require_one_run(facts: dict[str, Any], args: "SFTConfig") -> None:
    """Compare what all processes are about to train, and see that they share an output directory.

    No collective: the slowest machine may prepare data for hours, which its launcher and `ddp_timeout` watch over.
    Raises `UserError` on all processes, with what differs and on which machines.
    """
    rank, world, kept = args.process_index, args.world_size, store()
    if kept is None or world == 1:
        return
    folder = Path(args.output_dir)
    with left_in(folder) if rank == 0 else contextlib.nullcontext() as token:
        if rank != 0:
            wait(kept, ["0"], args.ddp_timeout)
            token = json.loads(kept.get(f"{OURS}0"))["token"]
        said = {"host": platform.node(), "token": token, "sees": seen(folder / token), "facts": settled(facts)}
        kept.set(f"{OURS}{rank}", json.dumps(said))
        if rank == 0:
            wait(kept, [str(number) for number in range(world)], args.ddp_timeout)
            told = [json.loads(kept.get(f"{OURS}{number}")) for number in range(world)]
            kept.set(f"{OURS}verdict", differences(told) or unseen(told, args.output_dir))
        wait(kept, ["verdict"], args.ddp_timeout)
    if verdict := kept.get(f"{OURS}verdict").decode():
        raise UserError(verdict)


@contextlib.contextmanager
def left_in(folder: Path) -> Iterator[str]:
    """A file of a name that nobody can have guessed or cached; gives the name."""
    token = folder / f"{uuid.uuid4().hex}.partial"  # which the next start removes, should this one be killed
    token.touch()
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)


def seen(path: Path) -> bool:
    """Whether a file of another machine shows up here."""
    until = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def wait(kept: Any, keys: list[str], seconds: float) -> None:
    """Wait until all keys are in the store, heeding signals. Raises `UserError` when a process cannot go on."""
    began = shown = time.monotonic()
    for key in keys:
        while not is_there(kept, key):
            if problem := refused():
                raise UserError(problem)
            now = time.monotonic()
            if now - began > seconds:
                raise UserError(
                    f"process {0 if key == 'verdict' else key} has not come to the start within {seconds:.0f} seconds "
                    "(ddp_timeout): see what it does, or prepare the data first (make prepare)"
                )
            if now - shown > 60:
                logger.info("waiting for process %s, which is still preparing", 0 if key == "verdict" else key)
                shown = now
            time.sleep(0.2)


def is_there(kept: Any, key: str) -> bool:
    """Whether a process has said this. Raises `UserError` when the store is gone."""
    try:
        return kept.check([f"{OURS}{key}"])
    except RuntimeError as error:
        raise UserError("the first process is gone, which the others wait for; see what it said last") from error


def settled(facts: dict[str, Any]) -> dict[str, str]:
    """What must be the same on all processes, each with its value as text."""
    compared = {key: facts[key] for key in COMPARED if not isinstance(facts[key], dict)}
    for key in COMPARED:
        if isinstance(facts[key], dict):
            compared |= {f"{key}: {name}": value for name, value in facts[key].items()}
    compared |= facts["settings"] | {"code of open_r1": facts["code"]["digest"]}
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in compared.items()}


def differences(told: list[dict[str, Any]]) -> str:
    """What processes would train differently, for a message; empty when nothing. `told[rank]` is what each said."""
    lines = []
    for key in sorted({key for each in told for key in each["facts"]}):
        of = defaultdict(list)
        for rank, each in enumerate(told):
            of[each["facts"].get(key, "nothing")].append(rank)
        if len(of) > 1:
            lines.append(f"  {key}: " + "; ".join(f"{shortened(value)} on {places(of[value], told)}" for value in of))
    if not lines:
        return ""
    return "\n".join(
        [
            "the processes of this run would train different things:",
            *lines,
            "bring recipes, packages and data to the same state on all machines (data: the rows that preparation "
            "comes to), then start it again",
        ]
    )


def unseen(told: list[dict[str, Any]], output_dir: str) -> str:
    """Which machines do not see the first process's output directory, for a message; empty when all do."""
    blind = [rank for rank, each in enumerate(told) if not each["sees"]]
    if not blind:
        return ""
    return (
        f"output_dir: {output_dir} on {places(blind, told)} is not the directory of that name on {told[0]['host']}, "
        "where the run is saved; put output_dir on a file system that all machines share"
    )


def places(ranks: list[int], told: list[dict[str, Any]]) -> str:
    """Machines with the processes on them, for a message."""
    hosts = defaultdict(list)
    for rank in ranks:
        hosts[told[rank]["host"]].append(str(rank))
    few = [f"{host} (process {', '.join(on[:8])}{' ...' if len(on) > 8 else ''})" for host, on in hosts.items()]
    return ", ".join(few[:4]) + (f" and {len(few) - 4} more machines" if len(few) > 4 else "")


def shortened(value: str) -> str:
    """A value as JSON, for a message."""
    return value if len(value) <= 100 else value[:97] + "..."
