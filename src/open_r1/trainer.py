"""What TRL's `SFTTrainer` and the libraries around it are told. The trainer stays TRL's; rows reach it prepared."""

import copy
import os
import sys
from typing import TYPE_CHECKING

import datasets
import transformers

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig


def trainer_arguments(args: "SFTConfig") -> "SFTConfig":
    """A copy of the training arguments in which everything that preparation has honoured is neutral.

    Labels are made, rows are cut and packed: the trainer would refuse `assistant_only_loss` on tokenised rows, and
    would prepare them once more. A copy, since building a second config would reset accelerate's state.
    """
    told = copy.copy(args)
    told.dataset_kwargs = {"skip_prepare_dataset": True}
    told.assistant_only_loss = False
    told.completion_only_loss = None
    told.chat_template_path = None
    told.model_init_kwargs = None
    if told.padding_free and not told.packing:
        told.max_length = None  # rows are cut already; TRL refuses a limit it would not enforce
    told.use_cache = True  # saved into config.json for serving; TRL switches it off in every training step itself
    told.push_to_hub = args.push_to_hub or args.push_to_hub_revision
    if told.push_to_hub and args.hub_model_revision != "main":
        told.hub_revision = args.hub_model_revision
    if args.push_to_hub_revision and not args.push_to_hub:
        told.hub_strategy = "end"
    return told


def tell_libraries(args: "SFTConfig") -> None:
    """Give the libraries the recipe's log level (replicas their own, quieter one) and W&B its names."""
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    if args.process_index != 0 or not sys.stderr.isatty():  # a log would be nothing but bars
        datasets.disable_progress_bars()
    names = {
        "WANDB_ENTITY": args.wandb_entity,
        "WANDB_PROJECT": args.wandb_project,
        "WANDB_RUN_GROUP": args.wandb_run_group,
    }
    os.environ.update({name: value for name, value in names.items() if value is not None})
