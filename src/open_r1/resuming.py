"""What may change between a start of a run and the next, and what is said of it.

Every key of a recipe is one of: FREE, which says nothing about what is learnt, and takes effect with a note; of the
BATCH, which may change as long as a step takes as many rows; FIXED, which the state in a checkpoint is made for; and
all others, which change the run, and are refused unless `allow_changes` names them. The rows themselves are compared
by their key, `data` in `allow_changes`.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.checkpoints import (
    WEIGHTS,
    checkpoint_to_resume,
    checkpoints,
    damage,
    read_seal,
    sha256,
    what_it_lacks,
)
from open_r1.errors import UserError
from open_r1.run_state import read_state
from open_r1.schema import SCHEMA, show

if TYPE_CHECKING:
    from open_r1.configs import ModelConfig, SFTConfig
    from open_r1.order import Order
    from open_r1.preparation import Prepared

logger = logging.getLogger(__name__)
# By how keys begin: where things go and what is told, saved, evaluated and pushed; and how data are read from memory.
FREE = ("output_dir", "resume", "allow_changes", "log", "disable_tqdm", "report_to", "run_name", "project", "trackio_")
FREE += ("wandb_", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation", "eval_do_")
FREE += ("eval_use_", "per_device_eval", "prediction_loss_only", "include_for_metrics", "batch_eval", "bf16_full_eval")
FREE += ("fp16_full_eval", "save_", "push_", "hub_", "overwrite_", "callbacks", "benchmarks", "dry_run", "plan_")
FREE += ("env", "do_", "dataset_num_proc", "dataloader_num", "dataloader_pin", "dataloader_pers", "dataloader_pref")
FREE += ("dataloader_multi", "ddp_timeout", "debug", "skip_memory", "include_num", "stall_timeout", "loss_spike")
FREE += ("trust_remote_code", "max_bad_rows", "max_truncated", "activation_", "gradient_checkpointing", "torch_empty")
FREE += ("sample_",)
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
FIXED = ("optim", "use_peft", "lora_", "use_rslora", "use_dora", "load_in_", "bnb_", "use_bnb", "fsdp", "deepspeed")
# Of the others, those that say which rows there are: with one of them, the rows may be others too.
ROWS = ("dataset", "test_split", "max_length", "packing", "supervision", "on_", "empty_reasoning", "dedup", "chat_")
ROWS += ("system_prompt", "eos_token", "truncation", "completion_only", "assistant_only", "shuffle", "seed", "model_")
# Settings that may name a file of settings.
FILES = ("deepspeed", "fsdp_config", "accelerator_config", "liger_kernel_config")
LENGTH = ("num_train_epochs", "max_steps")
REOPENS = (*LENGTH, "early_stopping_patience", "early_stopping_threshold")
# Schedules under which a longer run has the learning rates of a shorter one, and those that only PyTorch steps.
LEVEL, OWN = ("constant", "constant_with_warmup"), ("reduce_lr_on_plateau", "greedy")
# What the optimizer keeps in a checkpoint, and what the learning rate of a step follows from.
OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
RATE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
SCHEDULE = (*RATE, *LENGTH)


def kind_of(key: str, settings: dict[str, Any] | None = None) -> str:
    """`free`, `batch`, `fixed` or `decisive`; for some keys it depends on what else the recipe says."""
    said = settings or {}
    schedule = value_of(said, "lr_scheduler_type")
    if key in BATCH:
        return "batch"
    if key in LENGTH and settings is not None:
        warm = value_of(said, "warmup_steps")  # below 1 a share of all steps
        return "free" if schedule in LEVEL and not 0 < warm < 1 else "decisive"
    if key.startswith("eval_") and (
        schedule in OWN or said.get("early_stopping_patience") or said.get("load_best_model_at_end")
    ):
        return "decisive"  # evaluations steer the run
    return "free" if key.startswith(FREE) else "fixed" if key.startswith(FIXED) else "decisive"


def value_of(settings: dict[str, Any], key: str) -> Any:
    """What a recipe says of a key, or the default."""
    return settings.get(key, SCHEMA["properties"].get(key, {}).get("default"))


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, defaults included, as (before, after)."""
    after = json.loads(json.dumps(after, default=str))
    pairs = {key: (value_of(before, key), value_of(after, key)) for key in sorted({**before, **after})}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def as_said(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The settings of an earlier start: with what was settled for it (`defaults.py`) where that is said now."""
    settled = before.get("settled", {})
    return {**before["settings"], **{key: settled[key] for key in settled if after.get(key) not in (None, "auto")}}


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
    if {value_of(before, "lr_scheduler_type"), value_of(after, "lr_scheduler_type")} & {*OWN}:
        kinds |= dict.fromkeys(changes.keys() & {*RATE}, "fixed")  # such a schedule keeps its rates
    fixed = {key: pair for key, pair in changes.items() if kinds[key] == "fixed"}
    refused = {key: pair for key, pair in changes.items() if kinds[key] == "decisive" and key not in allowed}
    if fixed or refused:
        lines = [f"{where} holds a run with other settings ({told({**fixed, **refused})}); take them back, or"]
        if fixed:
            lines.append(f"choose another output_dir: its optimizer or weights fit no other {', '.join(fixed)}")
        else:
            said = [*allowed, *refused]
            lines.append(f"say allow_changes: [{', '.join(said)}] to go on under them, or choose another output_dir")
        raise UserError(" ".join(lines))
    stay = dict.fromkeys(("model_name_or_path", "model_revision"), "; the weights stay the checkpoint's")
    return [
        f"{told({key: pair})} from here on{stay.get(key, '')}"
        for key, pair in changes.items()
        if kinds[key] != "batch"
    ]


def finished(output_dir: str, settings: dict[str, Any]) -> int | None:
    """The last step of the finished run in this directory, None when there is none, or it is to become longer.

    Raises `UserError` when the run there was another: it is neither passed off as this one nor opened again as it.
    """
    state = read_state(output_dir)
    served = any(next(Path(output_dir).glob(name), None) for name in WEIGHTS)
    if state.get("status") != "complete" or not isinstance(state.get("settings"), dict) or not served:
        return None
    step, before = state["global_step"], as_said(state, settings)
    notes, changes = compare(before, settings, output_dir), changed(before, settings)
    if settings.get("resume") == "never":
        raise UserError(f"resume: never, but {output_dir} holds a finished run; choose another output_dir")
    if set(changes) & set(REOPENS):
        if not checkpoints(Path(output_dir)):
            raise UserError(
                f"{output_dir} holds a finished run without a checkpoint to go on from; choose another output_dir, "
                f"and train on from its weights: --model_name_or_path {output_dir}"
            )
        return None
    under = {key: pair for key, pair in changes.items() if kind_of(key, settings) in ("decisive", "batch")}
    if under:
        raise UserError(
            f"{output_dir} holds a run that finished at step {step}: no step is left to go on under {told(under)}; "
            "make it longer too (max_steps, num_train_epochs), or choose another output_dir"
        )
    for note in notes:
        if not note.startswith(("output_dir", "resume", "allow_changes", "dry_run")):
            logger.warning("the run is finished, so this changes nothing: %s", note.removesuffix(" from here on"))
    return step


def checkpoint_of(output_dir: str, settings: dict[str, Any]) -> str | None:
    """The checkpoint to go on from, None for a fresh start, compared as far as recipes alone tell.

    Raises `UserError` when there is none to go on from, or settings are in the way; in a dry run that is only told.
    """
    checkpoint = None
    try:
        checkpoint = checkpoint_to_resume(output_dir, settings.get("resume", "auto"))
        if checkpoint is not None:
            compare(as_said(read_seal(Path(checkpoint)), settings), settings, checkpoint)
    except UserError as error:
        if settings.get("dry_run") in (None, False):
            raise
        logger.warning("as things are, this would not start: %s", error)
    return checkpoint


def facts_of(
    settings: dict[str, Any], prepared: "Prepared", order: "Order", args: "SFTConfig", model: "ModelConfig"
) -> dict[str, Any]:
    """What a checkpoint says of the run that saved it: what decides whether another goes on with it."""
    from open_r1.card import code, versions
    from open_r1.model import contents_of_base

    defaults = {key: spec["default"] for key, spec in SCHEMA["properties"].items() if spec.get("default") is not None}
    named = {key: value for key, value in settings.items() if isinstance(value, str) and key in FILES}
    return {
        "settings": settings,
        "defaults": defaults,
        "settled": {
            "padding_free": args.padding_free,
            "attn_implementation": model.attn_implementation,
            "use_liger_kernel": args.use_liger_kernel,
        },
        "data": prepared.train.key,
        "evaluated": prepared.eval.key if prepared.eval else None,
        "order": order.facts,
        "rows_a_step": order.batch,
        "processes": args.world_size,
        "launch": launch_of(args),
        "precision": "fp16" if args.fp16 else "bf16" if args.bf16 else "no",
        "base": contents_of_base(model) if model.use_peft else None,
        "config_files": {key: sha256(Path(path)) for key, path in named.items() if Path(path).is_file()},
        "versions": versions(),
        "code": code(),
    }


def earlier_run(checkpoint: str | None, facts: dict[str, Any], order: "Order", args: "SFTConfig") -> dict[str, Any]:
    """What is known of the run that this one goes on with, empty for a fresh start.

    The facts of its checkpoint and `changes` (see `require_same_run`), `checkpoint` itself, and `passed`, newer ones
    that are damaged, with what is wrong.
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
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    best = state.get("best_global_step") if args.load_best_model_at_end else None
    places = [Path(args.output_dir) / f"checkpoint-{best}", Path(checkpoint).parent / f"checkpoint-{best}"]
    if best and all(what_it_lacks(place, resume=False) for place in places):
        raise UserError(
            f"the best checkpoint so far, {places[0]}, is not there or not whole, and load_best_model_at_end would "
            "end with it; bring it back, or set load_best_model_at_end: false and allow_changes: "
            "[load_best_model_at_end]"
        )
    return {**earlier, "checkpoint": checkpoint, "passed": passed}


def require_same_run(checkpoint: str, now: dict[str, Any]) -> dict[str, Any]:
    """Compare a run's facts with those of the checkpoint that it is to go on from, and note what differs.

    Returns the checkpoint's facts, and in `changes` the settings that differ. Raises `UserError` with what may not
    change.
    """
    before = read_seal(Path(checkpoint))
    if "meter" not in json.loads((Path(checkpoint) / "progress_0.json").read_text(encoding="utf-8")):
        raise UserError(
            f"{checkpoint} was written by an earlier version, which did not measure what this one goes on with; end "
            "the run with that version, or choose another output_dir and start from the model of the checkpoint"
        )
    # What had a default of its own then and is left open now was never said, and is settled anew.
    defaults = {key: value for key, value in before["defaults"].items() if key in now["defaults"]}
    settings = {**defaults, **as_said(before, now["settings"])}
    allowed = set(now["settings"].get("allow_changes") or [])
    notes = compare(settings, now["settings"], checkpoint)
    changes = changed(settings, now["settings"])
    recut = before["launch"] != "ddp" and before["processes"] != now["processes"]
    if before["launch"] != now["launch"] or recut:
        raise UserError(
            f"{checkpoint} was saved by {before['processes']} processes under {before['launch']}, these are "
            f"{now['processes']} under {now['launch']}, and its optimizer state is cut up for the former; launch it "
            f"as before, or train on from its weights in another output_dir: --model_name_or_path {checkpoint}"
        )
    if before["rows_a_step"] != now["rows_a_step"] and not set(BATCH) & allowed:
        raise UserError(
            f"{checkpoint} was trained with {before['rows_a_step']} rows a step, and a step would now take "
            f"{now['rows_a_step']} ({now['processes']} processes, before {before['processes']}); set "
            f"global_batch_size: {before['rows_a_step']}, or say allow_changes: [global_batch_size]"
        )
    of_rows = {"data"} | {key for key in changes if key.startswith(ROWS) and kind_of(key) == "decisive"}
    for what, names, says in (
        ("data", of_rows, "was trained on other rows: files, template or tokenizer have changed"),
        (
            "evaluated",
            {*of_rows, "eval_dataset_name", "eval_datasets"},
            "was evaluated on other rows, files have changed",
        ),
        ("precision", {"bf16", "fp16"}, f"was trained in {before['precision']}, this would be {now['precision']}"),
        ("base", {"model_name_or_path", "model_revision"}, "is an adapter of other weights"),
    ):
        if before[what] != now[what] and None not in (before[what], now[what]):
            if not names & allowed:
                name = "data" if what == "evaluated" else min(names, key=len)
                raise UserError(
                    f"{checkpoint} {says} since; bring that back, say allow_changes: [{name}], or choose another "
                    "output_dir"
                )
            notes.append(f"{what} is another from here on")
    for key in {**before["config_files"], **now["config_files"]}:
        if before["config_files"].get(key) != now["config_files"].get(key) and key not in allowed:
            raise UserError(f"{key}: what the file says has changed since {checkpoint}; bring it back")
    if before["rows_a_step"] != now["rows_a_step"]:
        notes.append(
            f"{before['rows_a_step']} rows a step -> {now['rows_a_step']}, beginning with the next unread row"
        )
    if before["processes"] != now["processes"]:
        notes.append(
            f"{before['processes']} processes -> {now['processes']}: the same rows a step; what is random within a "
            "step (dropout) is drawn anew"
        )
    then, this = (
        {**facts["versions"], "open_r1": facts["code"].get("digest"), **now["settled"], **facts.get("settled", {})}
        for facts in (before, now)
    )
    differs = {name: (then.get(name), this.get(name)) for name in {**then, **this} if then.get(name) != this.get(name)}
    if differs:
        notes.append(f"{told(differs)}: losses may differ from those of an uninterrupted run in their last digits")
    for note in notes:
        logger.warning("since %s: %s", Path(checkpoint).name, note)
    return {**before, "changes": set(changes)}


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
    # The trainer alone turns accelerate's state into FSDP, and comes later (accelerate 1.15).
    sharded = args.world_size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "fsdp" if sharded else "ddp"
