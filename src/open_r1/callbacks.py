"""What runs beside training: by the names a recipe's `callbacks` lists, and for those who watch it."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from huggingface_hub import HfApi
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from open_r1.card import device_of, hardware
from open_r1.errors import UserError
from open_r1.generations import Answers, Prompt
from open_r1.live import shown
from open_r1.run_state import read_state, record

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig
    from open_r1.trainer import OrderedTrainer

logger = logging.getLogger(__name__)
# All that leaves this machine: what serving needs, the card, and how the model was made. Whatever else lies in a
# directory (state to go on from, pickles, rows, logs) stays, known by name or not. `*` matches `/`, too, so that a
# pattern has to begin with a name of its own.
PUSHED = [
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors", "adapter_config.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "README.md", "manifest.json"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py"),  # of a model with code of its own
]


class Report(TrainerCallback):
    """Write `report.html` while a run trains, at its logs, evaluations and saves, and count what the run costs.

    Of the run's time the page takes one per cent at most: it is written when a minute has passed, since its imports
    take half a second, and then not more often than every 30 seconds.
    `device_seconds` in `run_state.json` are those of all devices by their name, of all starts; where a run is killed,
    10 seconds and a step old at most.
    """

    SHARE, FIRST, PAUSE, COUNTED = 0.01, 60.0, 30.0, 10.0

    def __init__(self) -> None:
        self.due = self.counts = 0.0
        self.before: dict[str, float] | None = None

    def on_train_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From now on pages are due."""
        self.due = time.monotonic() + self.FIRST

    def on_step_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count when it is time."""
        if state.is_world_process_zero and time.monotonic() > self.counts:
            self.count(args)

    def on_log(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write when it is time."""
        if state.is_world_process_zero:
            self.write(args)

    def on_save(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write when it is time."""
        if state.is_world_process_zero:
            self.write(args)

    def count(self, args: "SFTConfig") -> None:
        """Add the seconds since this process began, times the processes, to those of earlier starts."""
        if self.before is None:
            self.before = read_state(args.output_dir).get("device_seconds") or {}
        device = device_of(hardware(args.world_size))
        seconds = (time.time() - psutil.Process().create_time()) * args.world_size
        spent = {**self.before, device: round(self.before.get(device, 0.0) + seconds, 1)}
        record(args.output_dir, durable=False, device_seconds=spent)
        self.counts = time.monotonic() + self.COUNTED

    def write(self, args: "SFTConfig") -> None:
        """Write the report, and put the next one off by what this one took."""
        if time.monotonic() < self.due:
            return
        from open_r1.report import try_to_write  # with jinja2 and plotly, when they are needed

        begun = time.monotonic()
        try_to_write(args.output_dir)
        self.due = time.monotonic() + max(self.PAUSE, (time.monotonic() - begun) / self.SHARE)


@contextlib.contextmanager
def followed(trainer: "OrderedTrainer", prompts: list[Prompt]) -> Iterator[None]:
    """Let people follow a run: on the terminal, in the report, by what the model says to prompts."""
    display, report = shown(trainer), Report()
    trainer.add_callback(report)
    if prompts:
        trainer.add_callback(Answers(trainer, prompts))
    try:
        yield
    finally:
        display.close()
        if trainer.is_world_process_zero():
            with contextlib.suppress(OSError):  # a full disk: what ended the run is to be told, not this
                report.count(trainer.args)


class PushToHubRevision(TrainerCallback):
    """Push every checkpoint to a branch of its own, `<hub_model_revision>-step-000000100`.

    The upload ends before training goes on, so rotation cannot delete what is being read; a failed one is reported and
    never stops training.
    """

    def __init__(self, api: HfApi | None = None) -> None:
        self.api = api or HfApi()

    def on_save(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push `checkpoint-<step>` from the main process."""
        if not state.is_world_process_zero or getattr(control, "preempted", False):
            return
        branch = f"{args.hub_model_revision}-step-{state.global_step:09d}"
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        try:
            push_folder(self.api, args, folder, branch)
        except Exception:
            logger.exception("%s was not pushed to %s; training goes on", folder, branch)


def ready_branch(args: "SFTConfig", api: HfApi | None = None, resuming: bool = False) -> None:
    """Before training: see that the final model can be pushed. Raises `UserError` if another run took the branch."""
    if not (args.push_to_hub or args.push_to_hub_revision):
        return
    api = api or HfApi()
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        repo = ready_repo(api, args, name)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"push_to_hub: {name} cannot be pushed to: {error}; log in with `hf auth login`") from error
    if not resuming:
        refuse_taken_branch(api, args, repo, args.hub_model_revision)
    api.create_branch(repo, branch=args.hub_model_revision, exist_ok=True)


def ready_repo(api: HfApi, args: "SFTConfig", name: str) -> str:
    """The id of the repository, made private unless the recipe says otherwise. Raises `UserError` for a public one."""
    repo = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    if args.hub_private_repo and not api.repo_info(repo).private:
        raise UserError(f"{repo} is public: make it private, or set hub_private_repo: false to publish this model")
    return repo


def push_folder(api: HfApi, args: "SFTConfig", folder: str, branch: str) -> None:
    """Push the servable part of `folder` to `branch` of `hub_model_id`. Raises `UserError` if the branch has files."""
    repo = ready_repo(api, args, args.hub_model_id)
    refuse_taken_branch(api, args, repo, branch)
    api.create_branch(repo, branch=branch, exist_ok=True)
    upload(api, repo, folder, branch, f"Add {folder.rpartition('/')[2]}")
    logger.info("%s pushed to %s, branch %s", folder, repo, branch)


def upload(api: HfApi, repo: str, folder: str, branch: str | None, message: str) -> Any:
    """Upload what may leave this machine (`PUSHED`) of a folder: the one place from which anything is uploaded."""
    return api.upload_folder(
        repo_id=repo, folder_path=folder, revision=branch, allow_patterns=PUSHED, commit_message=message
    )


def refuse_taken_branch(api: HfApi, args: "SFTConfig", repo: str, branch: str) -> None:
    """Raise `UserError` when the branch holds a model already and the recipe does not say to overwrite it."""
    if args.overwrite_hub_revision or branch == "main":
        return
    if branch not in {ref.name for ref in api.list_repo_refs(repo).branches}:
        return
    files = [file for file in api.list_repo_files(repo, revision=branch) if file != ".gitattributes"]
    if files:
        raise UserError(
            f"{repo} has files on branch {branch} already; set overwrite_hub_revision: true to replace them"
        )


CALLBACKS: dict[str, Callable[[], TrainerCallback]] = {"push_to_hub_revision": PushToHubRevision}


def get_callbacks(args: "SFTConfig") -> list[TrainerCallback]:
    """The callbacks that the recipe asks for. Raises `UserError` when one cannot work."""
    if "push_to_hub_revision" in args.callbacks and not args.hub_model_id:
        raise UserError("callbacks: push_to_hub_revision needs hub_model_id, the repository to push to")
    found = [CALLBACKS[name]() for name in args.callbacks]
    if args.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
    return found
