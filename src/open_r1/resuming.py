"""What may change between a start of a run and the next, and what is said of it.

Every key of a recipe is one of: FREE, which says nothing about what is learnt, and takes effect with a note; of the
BATCH, which may change as long as a step takes as many rows; FIXED, which the state in a checkpoint is made for; and
all others, which change the run, and are refused unless `allow_changes` names them. The rows themselves are compared
by their key, `data` in `allow_changes`.
"""

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.checkpoints import WEIGHTS, checkpoint_to_resume, checkpoints, damage, read_seal
from open_r1.errors import UserError
from open_r1.run_state import read_state
from open_r1.schema import SCHEMA, show

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig
    from open_r1.order import Order
    from open_r1.preparation import Part

logger = logging.getLogger(__name__)
# By how keys begin: where things go and what is told, saved, evaluated and pushed; and how data are read from memory.
FREE = ("output_dir", "resume", "allow_changes", "log", "disable_tqdm", "report_to", "run_name", "project", "trackio_")
FREE += ("wandb_", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation", "eval_do_")
FREE += ("eval_use_", "per_device_eval", "prediction_loss_only", "include_for_metrics", "batch_eval", "bf16_full_eval")
FREE += ("fp16_full_eval", "save_", "push_", "hub_", "overwrite_", "callbacks", "benchmarks", "dry_run", "plan_gpu")
FREE += ("env", "do_", "dataset_num_proc", "dataloader_num", "dataloader_pin", "dataloader_pers", "dataloader_pref")
FREE += ("dataloader_multi", "ddp_timeout", "debug", "skip_memory", "include_num", "stall_timeout", "loss_spike")
FREE += ("trust_remote_code", "max_bad_rows", "max_truncated", "activation_", "gradient_checkpointing", "torch_empty")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
FIXED = ("optim", "use_peft", "lora_", "use_rslora", "use_dora", "load_in_", "bnb_", "use_bnb", "fsdp", "deepspeed")
LENGTH = ("num_train_epochs", "max_steps")
# Schedules under which a longer run has the learning rates of a shorter one.
LEVEL = ("constant", "constant_with_warmup")
# What the optimizer keeps in a checkpoint, and what the learning rate of a step follows from.
OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", *LENGTH)


def kind_of(key: str, settings: dict[str, Any] | None = None) -> str:
    """`free`, `batch`, `fixed` or `decisive`; `settings` tell whether the schedule lets a run become longer."""
    if key in BATCH:
        return "batch"
    if key in LENGTH and settings is not None and value_of(settings, "lr_scheduler_type") in LEVEL:
        return "free"
    return "free" if key.startswith(FREE) else "fixed" if key.startswith(FIXED) else "decisive"


def value_of(settings: dict[str, Any], key: str) -> Any:
    """What a recipe says of a key, or the default."""
    return settings.get(key, SCHEMA["properties"].get(key, {}).get("default"))


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, defaults included, as (before, after)."""
    after = json.loads(json.dumps(after, default=str))
    pairs = {key: (value_of(before, key), value_of(after, key)) for key in sorted({**before, **after})}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def told(changes: dict[str, tuple[Any, Any]]) -> str:
    """Changes for a message."""
    return "; ".join(f"{key}: {show(old)} -> {show(new)}" for key, (old, new) in changes.items())


def compare(before: dict[str, Any], after: dict[str, Any], where: str) -> list[str]:
    """Compare two starts' settings; returns what is to be noted.

    Raises `UserError` with all that may not change. Sizes of a batch are compared by `require_same_run`.
    """
    allowed = after.get("allow_changes") or []
    changes = changed(before, after)
    kinds = {key: kind_of(key, after) for key in changes}
    fixed = {key: pair for key, pair in changes.items() if kinds[key] == "fixed"}
    refused = {key: pair for key, pair in changes.items() if kinds[key] == "decisive" and key not in allowed}
    if fixed or refused:
        lines = [f"{where} holds a run with other settings ({told({**fixed, **refused})}); take them back, or"]
        if fixed:
            lines.append(f"choose another output_dir: its optimizer or weights fit no other {', '.join(fixed)}")
        else:
            lines.append(
                f"say allow_changes: [{', '.join(refused)}] to go on under them, or choose another output_dir"
            )
        raise UserError(" ".join(lines))
    return [f"{told({key: pair})} from here on" for key, pair in changes.items() if kinds[key] != "batch"]


def finished(output_dir: str, settings: dict[str, Any]) -> int | None:
    """The last step of the finished run in this directory, None when there is none, or it is to become longer.

    Raises `UserError` when a run there was started with other settings: it is neither passed off as this one nor gone
    on with under them.
    """
    state = read_state(output_dir)
    try:
        status, step, before = state["status"], state["global_step"], dict(state["settings"])
    except (KeyError, TypeError, ValueError):
        return None
    if status != "complete" and not checkpoints(Path(output_dir)):
        return None  # nothing was saved: nothing to mix up
    compare(before, settings, output_dir)
    if status != "complete" or not any(next(Path(output_dir).glob(name), None) for name in WEIGHTS):
        return None
    changes = changed(before, settings)
    if set(changes) & set(LENGTH):
        if not checkpoints(Path(output_dir)):
            raise UserError(
                f"{output_dir} holds a finished run without a checkpoint to go on from; choose another output_dir, "
                f"and train on from its weights: --model_name_or_path {output_dir}"
            )
        return None
    under = {key: pair for key, pair in changes.items() if kind_of(key, settings) == "decisive"}
    if under:
        raise UserError(
            f"{output_dir} holds a run that finished at step {step}: no step is left to go on under {told(under)}; "
            "make it longer too (max_steps, num_train_epochs), or choose another output_dir"
        )
    return step


def facts_of(settings: dict[str, Any], part: "Part", order: "Order", args: "SFTConfig") -> dict[str, Any]:
    """What a checkpoint says of the run that saved it: what decides whether another goes on with it."""
    from open_r1.card import code, versions

    return {
        "settings": settings,
        "data": part.key,
        "order": order.facts,
        "rows_a_step": order.batch,
        "processes": args.world_size,
        "launch": launch_of(args),
        "versions": versions(),
        "code": code(),
    }


def earlier_run(checkpoint: str | None, facts: dict[str, Any], order: "Order", args: "SFTConfig") -> dict[str, Any]:
    """What is known of the run that this one goes on with, empty for a fresh start.

    The facts of its checkpoint, `checkpoint` itself, and `passed`, newer ones that are damaged, with what is wrong.
    Raises `UserError` when there is none to go on from, or this run may not go on with it.
    """
    checkpoint, passed = verified(checkpoint, args.output_dir, args.resume)
    if checkpoint is None:
        return {}
    earlier = require_same_run(checkpoint, facts)
    last = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * order.steps)
    if earlier["step"] > last:
        raise UserError(
            f"{checkpoint} is of step {earlier['step']}, and the run is to end at step {last} (max_steps, "
            "num_train_epochs); make it longer, or choose another output_dir"
        )
    return {**earlier, "checkpoint": checkpoint, "passed": passed}


def require_same_run(checkpoint: str, now: dict[str, Any]) -> dict[str, Any]:
    """Compare a run's facts with those of the checkpoint that it is to go on from, and note what differs.

    Returns the checkpoint's facts. Raises `UserError` with what may not change.
    """
    before = read_seal(Path(checkpoint))
    allowed = now["settings"].get("allow_changes") or []
    notes = compare(before["settings"], now["settings"], checkpoint)
    recut = before["launch"] != "ddp" and before["processes"] != now["processes"]
    if before["launch"] != now["launch"] or recut:
        raise UserError(
            f"{checkpoint} was saved by {before['processes']} processes under {before['launch']}, these are "
            f"{now['processes']} under {now['launch']}, and its optimizer state is cut up for the former; launch it "
            f"as before, or train on from its weights in another output_dir: --model_name_or_path {checkpoint}"
        )
    if before["rows_a_step"] != now["rows_a_step"] and not set(BATCH) & set(allowed):
        raise UserError(
            f"{checkpoint} was trained with {before['rows_a_step']} rows a step, and a step would now take "
            f"{now['rows_a_step']} ({now['processes']} processes, before {before['processes']}); set "
            f"global_batch_size: {before['rows_a_step']}, or say allow_changes: [global_batch_size]"
        )
    named = {"data"} | {key for key in changed(before["settings"], now["settings"]) if kind_of(key) == "decisive"}
    if before["data"] != now["data"] and not named & set(allowed):
        raise UserError(
            f"{checkpoint} was trained on other rows: files, template, tokenizer or evaluation data have changed "
            "since; bring them back, say allow_changes: [data], or choose another output_dir"
        )
    if before["data"] != now["data"]:
        notes.append("the rows are others from here on")
    if before["processes"] != now["processes"]:
        notes.append(
            f"{before['processes']} processes -> {now['processes']}: the same rows a step; what is random within a "
            "step (dropout) is drawn anew"
        )
    for what in ("versions", "code"):
        differs = {
            name: (before[what].get(name), now[what].get(name))
            for name in {**before[what], **now[what]}
            if before[what].get(name) != now[what].get(name)
        }
        if differs:
            notes.append(f"{told(differs)}: losses may differ from those of an uninterrupted run in their last digits")
    for note in notes:
        logger.warning("since %s: %s", Path(checkpoint).name, note)
    return before


def verified(checkpoint: str | None, output_dir: str, resume: str) -> tuple[str | None, dict[str, str]]:
    """The checkpoint whose files are all as they were saved, and those passed over, each with what is wrong.

    Every process digests its share of the files, and all take the first one's choice. Raises `UserError` as
    `checkpoint_to_resume` does.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state, passed = PartialState(), {}
    while True:
        [checkpoint] = broadcast_object_list([checkpoint])
        if checkpoint is None:
            return None, passed
        share = slice(state.process_index, None, state.num_processes)
        wrong = damage(Path(checkpoint), lambda names: names[share], gather_object)  # noqa: B023
        if not wrong:
            logger.info("resuming from %s", checkpoint)
            return checkpoint, passed
        logger.warning("%s is passed over: %s", checkpoint, wrong)
        passed[checkpoint] = wrong
        checkpoint = checkpoint_to_resume(output_dir, resume, passed)


def launch_of(args: "SFTConfig") -> str:
    """How optimizer state is cut up: `ddp` (not at all, one process too), `zero1` to `zero3`, or `fsdp`."""
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    return "fsdp" if args.distributed_state.distributed_type == "FSDP" else "ddp"
