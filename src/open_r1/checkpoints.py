"""Which checkpoint of an output directory a run goes on from, and whether the run there is finished.

`get_last_checkpoint` upstream takes the highest number, complete or not, and a missing optimizer state silently
starts a fresh optimizer. Here a checkpoint counts only when everything a resumed run needs is in it.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from open_r1.errors import UserError

logger = logging.getLogger(__name__)
RUN_STATE = "run_state.json"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp_0", "model.safetensors.index.json")
NOT_SERVED = ("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "training_args.bin", "latest")
# Settings that may change between a start and the next, by how their names begin.
FREE = ("log", "report_to", "run_name", "save_", "eval_", "do_eval", "per_device_eval", "resume", "push_", "hub_")
FREE += ("overwrite_", "wandb_", "trackio_", "callbacks", "disable_tqdm", "ddp_timeout", "dry_run", "dataloader_")
FREE += ("dataset_num_proc", "env", "plan_gpu")
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")  # plain, FSDP, DeepSpeed


def checkpoint_to_resume(output_dir: str, asked: str | bool | None) -> str | None:
    """The checkpoint to go on from, None for a fresh start.

    `asked` is `resume_from_checkpoint`: unset takes the newest complete checkpoint if there is one, true insists on
    one, false insists on none, and a path names it. Raises `UserError` when that cannot be had.
    """
    asked = {"true": True, "false": False}.get(asked.lower(), asked) if isinstance(asked, str) else asked
    if isinstance(asked, str):
        if lacking := what_it_lacks(Path(asked)):
            raise UserError(f"resume_from_checkpoint: {asked} cannot be resumed from: {lacking}")
        return asked
    found = checkpoints(Path(output_dir))
    if asked is False and found:
        raise UserError(
            f"resume_from_checkpoint: false, but {output_dir} holds {found[0].name} of an earlier run; "
            "choose another output_dir, or remove the old checkpoints"
        )
    for checkpoint in found:
        lacking = what_it_lacks(checkpoint)
        if not lacking:
            logger.info("resuming from %s", checkpoint)
            return str(checkpoint)
        logger.warning("%s is passed over: %s", checkpoint, lacking)
    if asked is True:
        raise UserError(f"resume_from_checkpoint: true, but {output_dir} holds no complete checkpoint")
    if found:
        logger.warning("%s holds no complete checkpoint: training starts over", output_dir)
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-<step>` directories, newest step first."""
    steps = {
        path: int(match.group(1))
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return sorted(steps, key=steps.__getitem__, reverse=True)


def what_it_lacks(checkpoint: Path) -> str:
    """Why a directory cannot be resumed from, empty when it can. The trainer writes `trainer_state.json` last."""
    if not checkpoint.is_dir():
        return "there is no such directory"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "trainer_state.json is missing or broken, so it was not saved to the end"
    if not any((checkpoint / name).exists() for name in WEIGHTS) and not (checkpoint / "latest").exists():
        return "it has no weights"
    if not any((checkpoint / name).exists() for name in OPTIMIZER):
        return "it has no optimizer state (saved with save_only_model?)"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "it has no random state"
    if (checkpoint / "optimizer.pt").exists() and not (checkpoint / "scheduler.pt").exists():
        return "it has no scheduler state"
    return ""


def at_last_step(checkpoint: str | None) -> bool:
    """Whether a checkpoint is that of the last step, so that nothing is left to train."""
    if checkpoint is None:
        return False
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state["global_step"] >= state["max_steps"]


def publish(checkpoint: str, output_dir: str) -> None:
    """Copy the model in a checkpoint of the last step, all that serving needs, to where the final model belongs."""
    for path in Path(checkpoint).iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_SERVED):
            shutil.copy2(path, output_dir)


def require_same_data(output_dir: str, checkpoint: str | None, data: str) -> None:
    """Raise `UserError` when a run would go on with other rows than those that it began with."""
    try:
        before = json.loads((Path(output_dir) / RUN_STATE).read_text()).get("data", data)
    except (OSError, ValueError):
        return
    if checkpoint is not None and before != data:
        raise UserError(
            f"{checkpoint} was trained on other rows: files, template, tokenizer or evaluation data have changed "
            "since; bring them back, or choose another output_dir"
        )


def record(output_dir: str, status: str, step: int, settings: dict[str, Any], data: str) -> None:
    """Write `run_state.json`: `running` or `complete`, at which step, with which settings and rows."""
    state = {"status": status, "global_step": step, "data": data, "settings": settings}
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    partial = Path(output_dir) / f"{RUN_STATE}.partial"
    partial.write_text(json.dumps(state, indent=1, default=str) + "\n")
    partial.replace(Path(output_dir) / RUN_STATE)


def finished(output_dir: str, settings: dict[str, Any]) -> int | None:
    """The last step of the finished run in this directory, None when there is none or its model is gone.

    Raises `UserError` when a run there was started with other settings: it is neither passed off as this one nor
    gone on with under them. What only concerns logging, saving and evaluation may differ.
    """
    if not output_dir or Path(output_dir).is_file():
        raise UserError(f"output_dir: {output_dir!r} is no directory that can be written to")
    try:
        state = json.loads((Path(output_dir) / RUN_STATE).read_text())
        status, step, before = state["status"], state["global_step"], dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    now = json.loads(json.dumps(settings, default=str))
    keys = [key for key in {**before, **now} if not key.startswith(FREE) and before.get(key) != now.get(key)]
    if keys and (status == "complete" or checkpoints(Path(output_dir))):
        shown = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted(keys))
        raise UserError(f"{output_dir} holds a run with other settings ({shown}); choose another output_dir")
    served = any((Path(output_dir) / name).exists() for name in WEIGHTS)
    return step if status == "complete" and served else None
