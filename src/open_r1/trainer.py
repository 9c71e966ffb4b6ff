"""TRL's `SFTTrainer` with what it takes to stop anywhere and go on as if nothing had been.

Rows reach it prepared, and it reads them in an `Order`. Its checkpoints are complete or not there, hold what upstream
forgets between two logs, and are as good at any step; what is no number never reaches the weights.
"""

import contextlib
import copy
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import HfApi
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from trl import SFTTrainer

from open_r1 import checkpoints, faults
from open_r1.callbacks import upload
from open_r1.card import write_card
from open_r1.errors import Stopped, UserError
from open_r1.flops import peak_here, work_of
from open_r1.isolation import require_isolation
from open_r1.memory import keep_freed_memory
from open_r1.metrics import METRICS, Collator, Meter, cut_back_metrics, evened, write_line
from open_r1.order import Order, cut_back, cut_back_order, line_of, require_rows
from open_r1.resuming import OPTIMIZER, SCHEDULE
from open_r1.run_state import record
from open_r1.stopping import SIGNALS, Stop, shield
from open_r1.trackers import purge_tensorboard, remember_mlflow, without_folders

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig
    from open_r1.preparation import Part

logger = logging.getLogger(__name__)


class Course(TrainerCallback):
    """The trainer's events, for a run that can stop anywhere: `OrderedTrainer` has what they call."""

    def __init__(self, trainer: "OrderedTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go on where the checkpoint was, and do what a log or an evaluation of its step still lacks."""
        trainer = self.trainer
        trainer.meter.clock.lap()  # what came before is none of its time
        if trainer.try_isolation:
            with trainer.meter.clock.spent_on("evaluation"):
                require_isolation(trainer)
        trainer.stop.waits = True
        if state.is_world_process_zero:
            remember_mlflow(args)
        state.compute_steps(args, state.max_steps)  # upstream keeps the checkpoint's logging, saving and eval steps
        trainer.settle_order()
        faults.watch(args.stall_timeout)
        if trainer.is_deepspeed_enabled:
            trainer.skipped = trainer.deepspeed.skipped_steps
            trainer.deepspeed.optimizer.check_grad_overflow = True  # else only in half precision
        for callback in trainer.callback_handler.callbacks:  # one that `allow_changes` brought is in no checkpoint
            if isinstance(callback, EarlyStoppingCallback):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        if state.global_step:
            args.eval_on_start = False  # that was done when the run started
            trainer.restore_progress()
            trainer.forget_another_best()
            trainer.catch_up()

    def on_epoch_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the order which epoch is read.

        Neither transformers nor accelerate reaches the sampler of a resumed epoch when there are several ranks
        (transformers 5.23, accelerate 1.15: a skipping batch sampler around a sharded one).
        """
        self.trainer.order.epoch = state.global_step // self.trainer.order.steps

    def on_step_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the batches and the loss of a step anew."""
        self.trainer.micro, self.trainer.step_loss = 0, torch.zeros((), device=args.device)
        self.trainer.meter.clock.begin()

    def on_optimizer_step(
        self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What follows is no part of what a step computes."""
        self.trainer.meter.clock.end()

    def on_step_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step's line, before a checkpoint that knows of it; agree with all processes on what comes next."""
        faults.watch(args.stall_timeout)
        if state.is_world_process_zero:
            with (Path(args.output_dir) / "order.jsonl").open("a", encoding="utf-8") as file:
                file.write(line_of(self.trainer.order, state.global_step, self.trainer.part.key))
        self.trainer.agree(control)
        self.trainer.meter.clock.settle()

    def on_epoch_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An epoch that was broken off is none to be evaluated and saved."""
        if self.trainer.preempted:
            control.should_evaluate = control.should_save = False
            control.should_log = False

    def on_prediction_step(
        self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation goes on."""
        if self.trainer.is_in_train:
            faults.watch(args.stall_timeout)

    def on_log(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say in `run_state.json` how far it is."""
        if state.is_world_process_zero and self.trainer.is_in_train:
            record(args.output_dir, durable=False, global_step=state.global_step)

    def on_train_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nothing waits for the end of a step any more."""
        self.trainer.stop.waits = False


class OrderedTrainer(SFTTrainer):
    """TRL's trainer, reading the rows of `part` in an `Order`, and stopped and resumed exactly.

    `facts` are what a checkpoint says of the run (`resuming.require_same_run`), `earlier` those of the checkpoint it
    goes on from. `stop` knows of signals. It evaluates on the rows of `tested`. `try_isolation`: packed documents that
    see each other are a `UserError` before the first step.

    Upstream's order depends on the launch: with several ranks accelerate fills the end of an epoch with rows from its
    beginning, the last step of an epoch is as small as what is left for it, and `group_by_length` groups by the batch
    of one rank. There is no other place to give a trainer a sampler than `_get_train_sampler`.
    """

    def __init__(
        self,
        *args: Any,
        order: Order,
        part: "Part",
        tested: "Part | None",
        facts: dict[str, Any],
        earlier: dict[str, Any],
        stop: Stop,
        limit: int | None,
        try_isolation: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, eval_dataset=tested and tested.rows, **kwargs)
        self.order, self.part, self.stop, self.limit = order, part, stop, limit
        self.facts, self.earlier, self.try_isolation = facts, earlier, try_isolation
        self.losses = faults.Losses(self.args.loss_spike)
        self.preempted, self.told = False, ""  # and by which signal
        self.asked = False  # a checkpoint, whatever the schedule says
        self.saving = False
        self.skipped = 0
        self.step_of_model: int | None = None  # where it is not the last
        self.seconds, self.started = 0.0, time.time()
        self.last_norm: float | None = None
        self.last_rate: float | None = None
        self.micro, self.step_loss = 0, torch.zeros(())
        self.each = 0  # operations of a token, by upstream's count
        self.parts: list[torch.nn.Module] = []  # of the model as it is trained, which comes first
        self.random = tempfile.TemporaryDirectory()
        self.caught_up = False
        self.add_callback(Course(self))
        self.measure(tested)
        purge_tensorboard(self.callback_handler.callbacks, self.args.output_dir, earlier.get("step", 0))
        without_folders(self.callback_handler.callbacks)

    # Measuring

    def measure(self, tested: "Part | None") -> None:
        """See to it that the source of each token is known, also of those that are evaluated, and count."""
        args, model = self.args, self.model
        half = "bf16" if args.bf16 else "fp16" if args.fp16 else None
        peak = peak_here(args.device, half, model.dtype)
        self.data_collator = Collator(**vars(self.data_collator))
        self.meter = Meter(self.part, tested, work_of(model), peak, args.device, self.accelerator.gather)
        if tested is not None:
            whole = args.world_size > 1 or args.dataloader_drop_last  # batches, or rows are repeated or left out
            self.eval_dataset = evened(tested, args.eval_batch_size * args.world_size if whole else 1)

    def _set_signature_columns_if_needed(self) -> None:
        """Upstream's, and what says where tokens are from."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "source", "lengths"])]

    def heard(self, model: Any, sources: torch.Tensor | None) -> Callable[..., Any]:
        """The forward pass of a model whose fused head is listened to: what it says of each token is counted."""

        def forward(**inputs: Any) -> Any:
            outputs = model(**inputs)
            if sources is not None and inputs.get("fused_lm_head"):
                self.meter.hear(outputs, sources, self.model.training)
            return outputs

        return forward

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Upstream's, with means over all tokens: upstream's are means over batches."""
        self.meter.begin_evaluation()
        with self.meter.clock.spent_on("evaluation"):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            losses, means = self.meter.of_evaluation(metric_key_prefix)
        output.metrics.update(losses)
        self._metrics["eval"].update(means)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Upstream's, with what was measured, and a line of `metrics.jsonl`. What is not known is null there alone."""
        found = self.meter.of_window() if "loss" in logs else self.meter.of_run() if "train_runtime" in logs else {}
        logs.update({key: value for key, value in found.items() if value is not None})
        super().log(logs, start_time)
        if self.is_world_process_zero():
            write_line(Path(self.args.output_dir) / METRICS, self.state.log_history[-1], found.keys() - logs.keys())

    # Reading

    def settle_order(self) -> None:
        """Begin the stream of rows where the checkpoint ended, and make files of steps end there, too."""
        out, step, earlier = Path(self.args.output_dir), self.state.global_step, self.earlier
        same = all(earlier.get(key) == self.facts[key] for key in ("order", "data", "rows_a_step"))
        if step and (earlier["offset"] or earlier["rows_a_step"] != self.order.batch):
            self.order.offset, same = earlier["rows_read"] - step * self.order.batch, False
        if self.is_world_process_zero():
            cut_back_order(out / "order.jsonl", step, self.order, self.part.key, same)
            for name in ("loss_spikes.jsonl", "bad_batch.jsonl", "samples.jsonl"):
                cut_back(out / name, step)
            cut_back_metrics(out / METRICS, step, self.state.log_history)

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Order:
        """The order, when it is of as many rows a step as the trainer takes."""
        if (rows := self.get_total_train_batch_size(self.args)) != self.order.batch:
            raise UserError(
                f"{self.order.batch} rows a step were asked for and the trainer would take {rows}; take out of the "
                "launch config and accelerator_config what changes it"
            )
        return self.order

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, to train and to evaluate, whose workers leave it to this process to heed signals."""
        loader = super()._get_dataloader(*args, **kwargs)
        read = getattr(loader, "base_dataloader", loader)  # accelerate's only asks that one (accelerate 1.15)
        read.worker_init_fn = partial(shield, then=read.worker_init_fn)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of a step, seen to be those of the order, and counted."""
        batches, items = super().get_batch_samples(self.meter.clock.waited(epoch_iterator), *args, **kwargs)
        step, ranks = self.state.global_step + 1, self.args.world_size
        self.meter.read(
            batches, require_rows(batches, self.part.rows, self.order, step, self.args.process_index, ranks)
        )
        return batches, items

    # Numbers that are none, and losses that jump

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; in training, one that is no number stops the run before it is learnt from, on all processes."""
        model_heard = self.heard(model, inputs.pop("sources", None))
        result = super().compute_loss(model_heard, inputs, *args, **kwargs)
        if self.is_in_train and model.training:
            loss = result[0] if isinstance(result, tuple) else result
            broken = (~torch.isfinite(loss.detach()).all()).to(torch.int32).reshape(1)
            if (flags := self.accelerator.gather(broken)).any():
                self.stop_over_loss(flags.flatten().nonzero().flatten().tolist())
        return result

    def stop_over_loss(self, ranks: list[int]) -> None:
        """Raise `Stopped`, and name the rows of the batch whose loss is no number: alone, where a row can be tried."""
        step, world = self.state.global_step + 1, self.args.world_size
        mine = self.order.batches_of(step)[self.micro * world + self.args.process_index]
        if self.args.process_index in ranks and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            bad = [number for number in mine.tolist() if not self.is_finite_alone(number)]
            mine = mine[[number in bad for number in mine.tolist()]] if bad else mine
        found = faults.named(self.part, mine) if self.args.process_index in ranks else []
        self.report_rows("bad_batch.jsonl", {"step": step, "what": "loss is not finite"}, gather_object(found))

    def is_finite_alone(self, number: int) -> bool:
        """Whether the loss of a row of the prepared data is a number, when it is asked for alone."""
        columns = ("input_ids", "labels", "seq_lengths")
        row = {key: value for key, value in self.train_dataset[number].items() if key in columns}
        inputs = self._prepare_inputs(self.data_collator([row]))
        with torch.no_grad(), self.compute_loss_context_manager():
            return bool(torch.isfinite(self.model(**inputs, use_cache=False, fused_lm_head=True).log_probs).all())

    def report_rows(self, name: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write rows to a file in output_dir, from the main process, and raise `Stopped` over them."""
        if self.is_world_process_zero():
            faults.write_rows(Path(self.args.output_dir) / name, about, rows)
        raise Stopped(
            f"step {about['step']}: {about['what']}, and was not learnt from: {faults.in_words(rows)}; {name} in "
            f"{self.args.output_dir} has the rows. All that is saved is finite: take the rows out (allow_changes: "
            "[data]), lower learning_rate (allow_changes: [learning_rate]), or move the newest checkpoints away to go "
            "on from an older one"
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the gradients, over all processes; one that is no number stops the run before a step is taken.

        Not where the loss is scaled (fp16): there it is part of finding the scale, and the step is skipped. DeepSpeed
        has taken its step already (`training_step`).
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            self.require_finite_norm(norm)
        return norm

    def require_finite_norm(self, norm: Any) -> None:
        """Raise `Stopped`, with the rows of the step, when the norm of its gradients is no number."""
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)).all():
            step = self.state.global_step + 1
            rows = faults.named(self.part, self.order.of_step(step)) if self.is_world_process_zero() else []
            about = {"step": step, "what": f"the gradients are not finite (their norm is {float(norm)})"}
            self.report_rows("bad_batch.jsonl", about, rows)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward. DeepSpeed steps in here, or skips the step where gradients overflow."""
        if not self.parts or self.parts[0] is not model:
            self.parts = [*model.modules()]
        if not self.model.training:  # where layers are compiled, another stands in its place and is told
            self.model.train()
        with told_once(self.parts):
            loss = super().training_step(model, *args, **kwargs)
        self.micro += 1
        self.step_loss = self.step_loss + loss.detach().float()
        if self.is_deepspeed_enabled and (skipped := self.deepspeed.skipped_steps) > self.skipped:
            self.skipped = skipped
            if not self.args.fp16:
                self.require_finite_norm(float("nan"))
            faults.logger.warning("gradients overflowed and their step was skipped, %d of them so far", skipped)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Upstream's, which counts the parameters anew for every batch."""
        tokens = inputs["input_ids"].numel()
        self.each = self.each or super().floating_point_ops(inputs) // tokens
        return self.each * tokens

    # Stopping

    def agree(self, control: TrainerControl) -> None:
        """At the end of a step: what any process was told, all do. One sum over all processes, of a few numbers."""
        asked = Path(self.args.output_dir) / "CHECKPOINT_NOW"
        wanted = self.is_world_process_zero() and asked.exists()
        told = [self.stop.signal == number.name for number in SIGNALS]
        told = torch.tensor([*told, wanted], dtype=torch.float32, device=self.args.device)
        mean = (self.step_loss / self.args.world_size).to(self.args.device)
        *told, saving, loss = self.accelerator.reduce(torch.cat([told, mean.reshape(1)]), "sum").tolist()
        self.report_spike(loss)
        if saving:
            control.should_save = self.asked = True
            asked.unlink(missing_ok=True)
        self.told = next((number.name for number, count in zip(SIGNALS, told, strict=True) if count), "")
        if self.told:
            self.preempted = control.should_save = control.should_training_stop = True
            control.preempted = True  # for callbacks: nothing is pushed
            if self.state.global_step < self.state.max_steps:
                control.should_evaluate = False  # what a resumed run begins with: `catch_up`

    def report_spike(self, loss: float) -> None:
        """Report a loss that is far above those before it, with the rows of the step."""
        usual = self.losses.spike(loss)
        if usual is not None and self.is_world_process_zero():
            rows = faults.named(self.part, self.order.of_step(self.state.global_step))
            about = {"step": self.state.global_step, "loss": loss, "median": usual}
            faults.write_rows(Path(self.args.output_dir) / "loss_spikes.jsonl", about, rows)
            faults.logger.warning(
                "step %d: the loss is %.4f, the median of those before is %.4f; loss_spikes.jsonl has its rows: %s",
                *(self.state.global_step, loss, usual, faults.in_words(rows)),
            )

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go: out of sight while they are written."""
        out = super()._get_output_dir(trial)
        return str(Path(out) / checkpoints.SAVING) if self.saving else out

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint that is complete or not there. One that is there already is never written over."""
        out, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        passed = str(out / name) in self.earlier.get("passed", ())
        [there] = broadcast_object_list([not passed and not checkpoints.what_it_lacks(out / name, resume=False)])
        if there:
            return
        only_model = self.args.save_only_model
        self.args.save_only_model = only_model and not self.preempted
        try:
            with self.meter.clock.spent_on("saving"):
                self._save_whole(model, trial, out, name)
        finally:
            self.args.save_only_model = only_model

    def _save_whole(self, model: Any, trial: Any, out: Path, name: str) -> None:
        """Write, seal and publish a checkpoint."""
        step = self.state.global_step
        with checkpoints.room(out, name):
            if self.args.should_save:
                shutil.rmtree(out / checkpoints.SAVING, ignore_errors=True)
                checkpoints.require_room(out, name)
                (out / checkpoints.SAVING).mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.saving = False
            staged = out / checkpoints.SAVING / name
            self.settle_best(out, staged)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
            self.save_progress(staged)
            self.accelerator.wait_for_everyone()
            self.seal(staged)
            if self.args.should_save:
                checkpoints.publish(staged, out)
                with checkpoints.room(out, "the run"):  # the checkpoint is
                    record(str(out), global_step=step)
                checkpoints.rotate(out, self.limit, self.state.best_model_checkpoint, self.earlier.get("passed", ()))
        if self.args.push_to_hub and not self.preempted:
            self._push_from_checkpoint(str(out / name))
        self.accelerator.wait_for_everyone()

    def settle_best(self, out: Path, staged: Path | None = None) -> None:
        """Say where the best checkpoint is, here or beside the one that this run went on from.

        Upstream looks for it where this one is being written.
        """
        name = f"checkpoint-{self.state.best_global_step}"
        beside = Path(self.earlier.get("checkpoint", out / name)).parent / name
        if (out / name).exists() or (staged is not None and name == staged.name):
            self.state.best_model_checkpoint = str(out / name)
        elif beside.exists():
            self.state.best_model_checkpoint = str(beside)

    def seal(self, staged: Path) -> None:
        """Flush a checkpoint and write its seal. Every process takes its share of the digests."""
        if self.accelerator.is_local_main_process:
            checkpoints.flush(staged)
        self.accelerator.wait_for_everyone()
        [names] = broadcast_object_list([checkpoints.files_of(staged)])
        lacking = "" if self.args.save_only_model else checkpoints.state_missing(staged, self.args.world_size)
        # All look before they meet here: behind it the first process gives the checkpoint its name.
        pairs = gather_object([(name, checkpoints.digest(staged / name)) for name in self.share(names)])
        unread = [name for name, digest in pairs if not digest]  # its digest would call a sound checkpoint damaged
        if unseen := next(filter(None, [*gather_object([lacking]), *unread]), None):
            raise Stopped(
                f"{staged.name} was written, and not every process sees the {unseen} in it; output_dir must be on a "
                "file system that all nodes share"
            )
        if self.args.should_save:
            facts = {"step": self.state.global_step, "resumable": not self.args.save_only_model, **self.facts}
            facts |= {"rows_read": self.order.read(self.state.global_step), "offset": self.order.offset}
            checkpoints.seal(staged, dict(pairs), facts)
            checkpoints.sync(staged)

    def share(self, names: list[str]) -> list[str]:
        """This process's part of some files."""
        return names[self.args.process_index :: self.args.world_size]

    # What upstream forgets between a checkpoint and the next log

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        """Upstream's, remembering what a log of this step would say."""
        self.last_norm = None if grad_norm is None else float(grad_norm)
        self.last_rate = learning_rate
        asked = self.control.should_save and (self.preempted or self.asked)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)
        if asked:  # save_strategy: best takes it back where an evaluation is not the best; else it is there already
            self._save_checkpoint(self.model_wrapped, None)
        self.asked = False

    def save_progress(self, staged: Path) -> None:
        """Save what is summed up for the next log and for the whole run, of this process. JSON keeps every bit."""
        progress = {
            "tr_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
            "grad_norm": self.last_norm,
            "learning_rate": self.last_rate,
            "metrics": {key: list(values) for key, values in self._metrics["train"].items()},
            "tokens": self._total_train_tokens,
            "losses": list(self.losses.last),
            "seconds": self.seconds + time.time() - self.started,
            "meter": self.meter.state(),
        }
        path = staged / f"progress_{self.args.process_index}.json"
        path.write_text(json.dumps(progress) + "\n", encoding="utf-8")

    def restore_progress(self) -> None:
        """Go on with the sums of the checkpoint. Other processes than then take the mean of the losses."""
        folder = Path(self.earlier["checkpoint"])
        saved = [
            json.loads((folder / f"progress_{rank}.json").read_text("utf-8"))
            for rank in range(self.earlier["processes"])
        ]
        one = saved[self.args.process_index % len(saved)]
        loss = one["tr_loss"]
        if len(saved) != self.args.world_size:
            loss = sum(each["tr_loss"] for each in saved) / len(saved)
        self._tr_loss = torch.tensor(loss, device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = one["total_loss"], one["logged"]
        self._metrics["train"].update(one["metrics"])
        self._total_train_tokens = one["tokens"]
        self.last_norm, self.last_rate = one["grad_norm"], one["learning_rate"]
        self.meter.restore([each["meter"] for each in saved], self.args.process_index, self.args.world_size)
        self.losses.last.extend(one["losses"])
        self.seconds, self.started = one["seconds"], time.time()
        saved = self.state.stateful_callbacks.get("EarlyStoppingCallback")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and saved:
                spent = saved["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = spent
                self.control.should_training_stop = spent >= callback.early_stopping_patience

    def forget_another_best(self) -> None:
        """Begin anew with what is best where that is told by another metric now."""
        if self.earlier["changes"] & {"metric_for_best_model", "greater_is_better"}:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback):
                    callback.early_stopping_patience_counter = 0

    def catch_up(self) -> None:
        """Log and evaluate what belongs to the checkpoint's step and comes behind its save: at the end of an epoch, or
        where the run was told to stop."""
        args, step = self.args, self.state.global_step
        self.model.train()  # which metrics TRL logs
        here = [entry for entry in self.state.log_history if entry.get("step") == step]
        ended = step % self.order.steps == 0
        by_steps = args.eval_strategy == IntervalStrategy.STEPS and step % self.state.eval_steps == 0
        by_epoch = args.eval_strategy == IntervalStrategy.EPOCH and ended
        self.control.should_log = (
            args.logging_strategy == IntervalStrategy.EPOCH and ended and not any("loss" in entry for entry in here)
        )
        self.control.should_evaluate = (
            (by_steps or by_epoch)
            and args.eval_delay <= (step if by_steps else self.state.epoch)
            and not any("eval_loss" in entry for entry in here)
        )
        if evaluates := self.control.should_evaluate:
            self._load_rng_state(self.earlier["checkpoint"])
        self._maybe_log_save_evaluate(
            *(self._tr_loss, self.last_norm, self.model_wrapped, None, self.state.epoch, None, time.time()),
            learning_rate=self.last_rate,
        )
        here = [entry for entry in self.state.log_history if entry.get("step") == step]
        self.model.train(not any("eval_loss" in entry for entry in here))  # as the save was left, for the last log
        if evaluates:  # an evaluation draws random numbers: training goes on behind them
            self._save_rng_state(self.random.name)
            self.caught_up = True

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Upstream's; behind `catch_up`, the state that it left."""
        super()._load_rng_state(self.random.name if checkpoint and self.caught_up else checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's, unless nothing is left to train: it would train a step more (transformers 5.23)."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """The metrics of the whole run, not of what was trained since it was last started."""
        self._initial_global_step = 0
        self.settle_best(Path(self.args.output_dir))
        return super()._finalize_training(trial, num_train_samples, start_time - self.seconds)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Upstream's, and what `allow_changes` lets through: it would silently keep the checkpoint's."""
        super()._load_optimizer_and_scheduler(checkpoint)
        changes = self.earlier.get("changes", set())
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it under DeepSpeed
        groups = self.optimizer.param_groups
        if changes & {*OPTIMIZER}:
            # DeepSpeed drops groups without parameters, as adapters without biases have one.
            made = self.fresh if len(self.fresh) == len(groups) else [fresh for fresh in self.fresh if fresh["filled"]]
            for group, each in zip(groups, made, strict=True):
                fresh = {key: value for key, value in each.items() if key != "filled"}
                group.update(fresh, lr=group["lr"], initial_lr=fresh["lr"])
            scheduler.base_lrs = [self.args.learning_rate] * len(scheduler.base_lrs)
        if changes & {*SCHEDULE} and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            for group, base, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False):
                group["lr"] = base * share(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]  # what is logged

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Upstream's; remembers what it is made with."""
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = getattr(optimizer, "param_groups", ())  # DeepSpeed builds one that its own config describes
        self.fresh = [
            {"filled": bool(group["params"]), **{key: value for key, value in group.items() if key != "params"}}
            for group in groups
        ]
        return optimizer

    def _load_best_model(self) -> None:
        """Upstream's, from a checkpoint that is as it was saved; not where the run is to go on."""
        best = Path(self.state.best_model_checkpoint)
        if self.preempted:
            return
        [wrong] = broadcast_object_list([checkpoints.what_it_lacks(best, resume=False)])
        if wrong := wrong or checkpoints.damage(best, self.share, gather_object):
            raise Stopped(
                f"{best}, the best checkpoint, cannot be loaded: {wrong}; the last one is whole: to end "
                "with that, set load_best_model_at_end: false and allow_changes: [load_best_model_at_end]"
            )
        super()._load_best_model()
        self.step_of_model = self.state.best_global_step

    @contextlib.contextmanager
    def as_of_its_model(self) -> Iterator[None]:
        """Have what is said of the model that training ended with bear its own step: the best one's where that is it.

        Upstream says it of the last step, where another model was evaluated before.
        """
        last = self.state.global_step, self.state.epoch
        if self.step_of_model is not None:
            self.state.global_step, self.state.epoch = self.step_of_model, self.step_of_model / self.order.steps
        try:
            yield
        finally:
            self.state.global_step, self.state.epoch = last

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the model card from the run's manifest, also where upstream would write its own over it."""
        there = Path(self.args.output_dir, "manifest.json").exists()
        if self.is_world_process_zero() and there and not self.is_in_train:  # TRL writes one with every checkpoint
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
        if self.saving or not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return  # upstream calls this before the checkpoint is complete
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        try:
            api = HfApi(token=self.args.hub_token)
            upload(api, self.hub_model_id, checkpoint_folder, self.args.hub_revision, message)
        except Exception:
            logger.exception("%s was not pushed to %s; training goes on", checkpoint_folder, self.hub_model_id)


@contextlib.contextmanager
def told_once(parts: list[torch.nn.Module]) -> Iterator[None]:
    """Have a model of which all parts train, itself the first, not be told so again, in a block.

    Upstream tells every part for every batch: 5 ms of them where a model of 36 layers has adapters.
    """
    model = parts[0]
    if all(map(attrgetter("training"), parts)):
        model.train = lambda mode=True: model if mode else type(model).train(model, mode)
    try:
        yield
    finally:
        vars(model).pop("train", None)


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
    told.save_total_limit = None  # the trainer's rotation counts directories; ours counts complete checkpoints
    told.logging_nan_inf_filter = False  # what is no number stops the run, and looking for it here makes a GPU wait
    told.use_cache = True  # saved into config.json for serving; TRL switches it off in every training step itself
    told.push_to_hub = args.push_to_hub or args.push_to_hub_revision
    if told.push_to_hub and args.hub_model_revision != "main":
        told.hub_revision = args.hub_model_revision
    if args.push_to_hub_revision and not args.push_to_hub:
        told.hub_strategy = "end"
    return told


def tell_libraries(args: "SFTConfig") -> None:
    """Give the libraries the recipe's log level (replicas their own, quieter one) and W&B its names.

    On a CPU the C library keeps freed memory. DeepSpeed stays out of a run that does not use it: to tell whether a
    model is wrapped, accelerate imports it wherever it is installed, which takes time and ends the run where its CUDA
    tools are not found.
    """
    if args.device.type == "cpu":
        keep_freed_memory()
    if args.torch_compile:  # layer by layer: the first is compiled for all
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
    accelerate.utils.other.is_deepspeed_available = lambda: "deepspeed" in sys.modules  # no wrapper without it
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
