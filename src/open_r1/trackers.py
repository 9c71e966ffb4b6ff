"""A run that goes on stays one run in the trackers of `report_to`, however often it is started.

Each tracker takes the id of a run from a variable of its own; whoever has set one in the environment decides.
"""

import logging
import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from open_r1.resuming import changed, kind_of
from open_r1.run_state import read_state, record

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)
MLFLOW = {"mlflow", "dagshub"}  # two integrations, one client
# Those that keep a metric in a file or a field of its name, so that `loss` cannot be beside `loss/a`.
FOLDERS = {"MLflowCallback", "DagsHubCallback", "NeptuneCallback", "DVCLiveCallback"}
SET: dict[str, str] = {}  # what this process has set itself, and sets anew for another run


def name_run(args: "SFTConfig", facts: dict[str, Any], earlier: dict[str, Any]) -> dict[str, str | None]:
    """Tell the trackers of `report_to` which run this is, before they start: the environment of all processes.

    Returns what `run_state.json` keeps of it: `run_id`, 32 hexadecimal digits, made when a run begins in output_dir;
    and `mlflow_run_id`, since MLflow goes on only with ids that it has made itself (`remember_mlflow`).
    """
    state = read_state(args.output_dir)
    kept = goes_on(args.output_dir, state, facts, earlier) and state.get("run_id")
    run = {"run_id": kept or uuid.uuid4().hex, "mlflow_run_id": state.get("mlflow_run_id") if kept else None}
    trackers, known = set(args.report_to), run["mlflow_run_id"]
    if args.process_index == 0 and trackers & MLFLOW and known and not in_mlflow(known):
        logger.warning("MLflow has no run %s that could go on: it begins another", known)
        run["mlflow_run_id"] = None
    [run] = broadcast_object_list([run])
    told = {  # by tracker; None is nothing to say, and what the user may have said instead
        "wandb": {"WANDB_RUN_ID": run["run_id"], "WANDB_RESUME": "allow"},
        "swanlab": {"SWANLAB_RUN_ID": run["run_id"], "SWANLAB_RESUME": "allow"},
        "comet_ml": {"COMET_EXPERIMENT_KEY": run["run_id"], "COMET_MODE": None, "COMET_START_MODE": None},
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(Path(args.output_dir, "runs", run["run_id"]))},
        **dict.fromkeys(MLFLOW, {"MLFLOW_RUN_ID": run["mlflow_run_id"]}),
    }
    for tracker in trackers & told.keys():
        if all(os.environ.get(name) in (None, SET.get(name)) for name in told[tracker]):
            ours = {name: value for name, value in told[tracker].items() if value}
            os.environ.update(ours)
            SET.update(ours)
    if "trackio" in trackers and args.run_name is None:  # which goes on with what has the name
        args.run_name = f"{Path(args.output_dir).absolute().name}-{run['run_id'][:8]}"
    return run


def goes_on(output_dir: str, state: dict[str, Any], facts: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether the run that `state` tells of is this one: it has a checkpoint here, or was the same and left none."""
    if earlier and Path(earlier["checkpoint"]).resolve().parent == Path(output_dir).resolve():
        return True
    settings = facts["settings"]
    changes = changed(state.get("settings") or {}, settings)
    other = "resume" in changes or any(kind_of(key, settings) in ("decisive", "fixed") for key in changes)
    return state.get("status") != "complete" and state.get("data") == facts["data"] and not other


def in_mlflow(run: str) -> bool:
    """Whether MLflow has a run, not deleted, in the experiment that is asked for."""
    import mlflow

    client = mlflow.MlflowClient()
    try:
        info = client.get_run(run).info
        experiment = client.get_experiment(info.experiment_id).name
    except mlflow.exceptions.MlflowException:
        return False
    return info.lifecycle_stage == "active" and os.environ.get("MLFLOW_EXPERIMENT_NAME", experiment) == experiment


def remember_mlflow(args: "SFTConfig") -> None:
    """Keep the id of the run that MLflow has started."""
    if MLFLOW & set(args.report_to):
        import mlflow

        if run := mlflow.active_run():
            record(args.output_dir, mlflow_run_id=run.info.run_id)


def purge_tensorboard(callbacks: list[TrainerCallback], output_dir: str, step: int) -> None:
    """Let TensorBoard pass over what an earlier start has logged behind `step`, where the directory is this run's.

    Upstream opens its writer without saying where a run goes on (transformers 5.23).
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            logs = Path(callback.logging_dir or "")
            callback._SummaryWriter = partial(
                callback._SummaryWriter, purge_step=step + 1 if logs.parent == Path(output_dir, "runs") else None
            )


def without_folders(callbacks: list[TrainerCallback]) -> None:
    """Say `.` for the `/` in names of metrics to trackers that would take it for a folder."""
    for callback in callbacks:
        if type(callback).__name__ in FOLDERS:
            callback.on_log = partial(log_flat, callback.on_log)


def log_flat(on_log: Callable[..., Any], *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A tracker's `on_log` with names that have no folders."""
    return on_log(*args, logs={key.replace("/", "."): value for key, value in (logs or {}).items()}, **kwargs)
