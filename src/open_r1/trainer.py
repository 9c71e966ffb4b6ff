"""TRL's `SFTTrainer`, the order in which it reads rows, and what it and the libraries around it are told.

The order follows from the rows, the seed and the global batch size alone. Rows reach the trainer prepared.
"""

import copy
import hashlib
import json
import logging
import os
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import transformers
from huggingface_hub import HfApi
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTTrainer

from open_r1.callbacks import upload
from open_r1.card import write_card
from open_r1.errors import UserError

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig
    from open_r1.preparation import Part

logger = logging.getLogger(__name__)
BLOCK = 50  # global batches within which group_by_length sorts rows; as upstream, at most a quarter of them all


class Order(Sampler[int]):
    """The rows of an epoch, in the order that all ranks together take them.

    The rows of a run are one stream: permutation 0 of all rows, permutation 1, and so on, each drawn from the seed and
    its number. Optimiser step k (from 0) takes `stream[k * batch : (k + 1) * batch]`, whatever the number of ranks and
    the accumulation: accelerate deals batches out in turn. An epoch of the trainer is `steps` whole steps, so what is
    left of a permutation is the beginning of the next epoch, and no row is read twice to fill a batch.

    `lengths` are the tokens of each row, `batch` the rows of a step, `epoch` the one that is read next. `drawn` are
    the rows that were taken from the epoch so far, those that a resumed run skips included.
    """

    def __init__(self, lengths: np.ndarray, seed: int, batch: int, strategy: str, longest_first: bool) -> None:
        self.lengths, self.seed, self.batch = lengths, seed, batch
        self.strategy, self.longest_first = strategy, longest_first
        self.epoch = 0
        self.drawn = array("q")

    @property
    def steps(self) -> int:
        """Optimiser steps in an epoch."""
        return len(self.lengths) // self.batch

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        self.drawn = array("q")
        for row in self.rows(self.epoch * len(self), (self.epoch + 1) * len(self)).tolist():
            self.drawn.append(row)
            yield row

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The stream from one position to another, int64."""
        first, last = start // len(self.lengths), (stop - 1) // len(self.lengths)
        rows = np.concatenate([self.permutation(number) for number in range(first, last + 1)])
        return rows[start - first * len(self.lengths) : stop - first * len(self.lengths)]

    def permutation(self, number: int) -> np.ndarray:
        """Each row once, int64: the part of the stream with this number."""
        rows = np.arange(len(self.lengths))
        if self.strategy != "sequential":
            random = np.random.default_rng([self.seed, number])
            rows = random.permutation(rows)
            if self.strategy == "group_by_length":
                # The first rows complete the last batch of the permutation before; the last begin one, too.
                head = -number * len(rows) % self.batch
                whole = slice(head, head + (len(rows) - head) // self.batch * self.batch)
                rows[whole] = self.grouped(rows[whole], random)
        return self.with_longest_first(rows) if self.longest_first and number == 0 else rows

    def grouped(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Whole global batches of rows of like length, in a random order; others in every epoch."""
        size = max(1, min(BLOCK, len(rows) // self.batch // 4)) * self.batch
        blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        blocks = [block[np.argsort(-self.lengths[block], kind="stable")] for block in blocks]
        return random.permutation(np.concatenate([rows[:0], *blocks]).reshape(-1, self.batch)).ravel()

    def with_longest_first(self, rows: np.ndarray) -> np.ndarray:
        """The first permutation with the longest global batch in step two and the second longest in step one.

        In step two the optimiser's state is there, so nothing later needs more memory. A longest row that would only
        come with the next epoch changes places with the longest of this one.
        """
        lengths = self.lengths[rows]
        if (longest := lengths.argmax()) >= len(self):
            here = lengths[: len(self)].argmax()
            rows[[here, longest]] = rows[[longest, here]]
        batches = rows[: len(self)].reshape(self.steps, self.batch)
        sizes = self.lengths[batches]
        order = np.arange(self.steps)
        largest = np.lexsort((sizes.sum(axis=1), sizes.max(axis=1)))[::-1]
        for place, number in zip((1, 0) if self.steps > 1 else (0,), largest, strict=False):
            there = np.flatnonzero(order == number)[0]
            order[[place, there]] = order[[there, place]]
        rows[: len(self)] = batches[order].ravel()
        return rows


def order_of(part: "Part", args: "SFTConfig") -> Order:
    """The order of a run's rows. Raises `UserError` when there are fewer rows than an optimiser step takes."""
    processes, rows = args.world_size, len(part.rows)
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes
    if rows < batch:
        most = rows // processes * processes
        fits = f"set per_device_train_batch_size: 1 and global_batch_size: {most}" if most else "start fewer processes"
        raise UserError(
            f"{rows} {'packs' if args.packing else 'rows'} cannot fill one optimiser step, which takes {batch}: "
            f"per_device_train_batch_size {args.train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {processes} process{'es' if processes > 1 else ''}; {fits}, "
            f"{'leave packing out, ' if args.packing else ''}or bring more data"
        )
    first = args.longest_first
    if first is None:
        first = not args.packing and args.train_sampling_strategy != "sequential"
    seed = args.seed if args.data_seed is None else args.data_seed
    return Order(part.lengths, seed, batch, args.train_sampling_strategy, first)


class OrderLog(TrainerCallback):
    """Says which epoch the order gives, and writes `order.jsonl`: what each optimiser step took, as it was drawn.

    A line is `step`, `epoch` (the number of the permutation in which the step starts), `rows` (of the SHA-256 of its
    rows' numbers, int64 little-endian in the order of the stream, 16 hex digits) and `data` (`Part.key`).

    The epoch is said here because neither transformers nor accelerate reaches the sampler of a resumed epoch when
    there are several ranks (transformers 5.23, accelerate 1.15: a skipping batch sampler around a sharded one).
    """

    def __init__(self, order: Order, data: str) -> None:
        self.order, self.data, self.done = order, data, 0

    def on_train_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave in the file what the steps before this one took."""
        if state.is_world_process_zero:
            cut_back(Path(args.output_dir) / "order.jsonl", state.global_step)

    def on_epoch_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the order which epoch is read, and go on counting steps from where it is gone into."""
        self.order.epoch, self.done = divmod(state.global_step, self.order.steps)
        if args.ignore_data_skip:
            self.done = 0

    def on_step_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the line of a step; before the trainer saves, so that a checkpoint never knows more than the file."""
        start = self.done * self.order.batch
        self.done += 1
        if not state.is_world_process_zero:
            return
        rows = np.array(self.order.drawn[start : start + self.order.batch], dtype="<i8")
        epoch = (self.order.epoch * len(self.order) + start) // len(self.order.lengths)
        digest = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
        line = {"step": state.global_step, "epoch": epoch, "rows": digest, "data": self.data}
        with (Path(args.output_dir) / "order.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of an `order.jsonl` up to a step. A line that was not written to its end goes, too."""
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if not line.endswith("}\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


class OrderedTrainer(SFTTrainer):
    """TRL's trainer, reading rows in an `Order`.

    Upstream's order depends on the launch: with several ranks accelerate fills the end of an epoch with rows from its
    beginning, the last step of an epoch is as small as what is left for it, and `group_by_length` groups by the batch
    of one rank. There is no other place to give a trainer a sampler than this method.
    """

    def __init__(self, *args: Any, order: Order, data: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = order
        self.add_callback(OrderLog(order, data))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the model card from the run's manifest, also where upstream would write its own over it."""
        if self.is_world_process_zero() and Path(self.args.output_dir, "manifest.json").exists():
            write_card(self.args.output_dir)

    def push_to_hub(self, commit_message: str = "End of training", **_: Any) -> Any:
        """Push what serving needs and what says how it was made. Upstream pushes rejected rows and pickles too."""
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.create_model_card()
        api = HfApi(token=self.args.hub_token)
        return upload(api, self.hub_model_id, self.args.output_dir, self.args.hub_revision, commit_message)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the servable part of a checkpoint from where it lies, `push_to_hub` and `hub_strategy: every_save`.

        Upstream copies weights and pickled arguments into output_dir, over those of a finished model, and uploads
        whatever else is there. The upload ends before training goes on, so that rotation cannot delete what is being
        read; a failed one is reported and never stops training.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        try:
            api = HfApi(token=self.args.hub_token)
            upload(api, self.hub_model_id, checkpoint_folder, self.args.hub_revision, message)
        except Exception:
            logger.exception("%s was not pushed to %s; training goes on", checkpoint_folder, self.hub_model_id)

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Order:
        """The order, of as many rows a step as the trainer takes: auto_find_batch_size makes them fewer."""
        self.order.batch = self.get_total_train_batch_size(self.args)
        if self.args.global_batch_size not in (None, self.order.batch):
            raise UserError(
                f"global_batch_size: {self.args.global_batch_size} was asked for and a step would take "
                f"{self.order.batch} rows; take out of the launch config and accelerator_config what changes it"
            )
        return self.order


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
