"""What follows training: evaluation, model card, upload, and the summary. The model is saved before any of it."""

import contextlib
import json
import logging
import shutil
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import SFTTrainer

from open_r1.benchmarks import submit
from open_r1.card import write_manifest
from open_r1.checkpoints import SAVING, flush, room, sync, write_whole
from open_r1.errors import Stopped, UserError
from open_r1.faults import watch
from open_r1.findings import Finding, as_text, has_errors
from open_r1.generations import Answers
from open_r1.handover import answers, parameters, verify
from open_r1.live import leave_terminals_that_are_gone
from open_r1.model import adapters_at_work
from open_r1.processes import Agreed
from open_r1.recipe import Recipe
from open_r1.stopping import Preempted

if TYPE_CHECKING:
    from datasets import Dataset

    from open_r1.preparation import Prepared
    from open_r1.trainer import OrderedTrainer

logger = logging.getLogger(__name__)
FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")  # what libraries say of a device
# Parameters up to which the saved model answers prompts: on this device, or on the CPU where the weights are sharded.
ANSWERS, ANSWERS_ON_CPU = 1_000_000_000, 200_000_000
ANSWER_TOKENS = 64


def train(trainer: "OrderedTrainer") -> None:
    """Train, from the checkpoint of an earlier run where there is one, and save model, state and metrics first of all.

    Raises `Preempted` when the run was told to stop: it is saved, and there is no final model.
    """
    out = Path(trainer.args.output_dir)
    try:
        autocast = trainer.args.bf16 or trainer.args.fp16
        explained = explained_when_full(partial(out_of_memory, trainer))
        with room(out, "the run"), explained, adapters_at_work(trainer.model, autocast):
            metrics = trainer.train(resume_from_checkpoint=trainer.earlier.get("checkpoint")).metrics
    finally:
        watch(None)
    if trainer.preempted:
        step = trainer.state.global_step
        raise Agreed(f"{trainer.told}, saved as checkpoint-{step}")
    with room(out, "the final model"):
        save_model(trainer, out)
        save_results(trainer, "train", metrics)
    if trainer.stop.signal:  # it came when no step was left that could end
        raise Preempted(f"{trainer.stop.signal}: trained and saved, what follows is left to the next start")


@contextlib.contextmanager
def explained_when_full(say: Callable[[RuntimeError], str]) -> Iterator[None]:
    """Say in words that a device's memory is full, whether torch finds it so or a library. Raises `Stopped`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in FULL):
            raise
        raise Stopped(say(error)) from error


def does_not_fit(error: Exception) -> str:
    """What to do about a model that is larger than a device's memory."""
    return (
        f"the model does not fit into the device's memory ({str(error).partition('. ')[0]}); see with nvidia-smi "
        "that nothing else is in it, set use_peft: true with load_in_4bit: true, or take devices that share the "
        "model (zero3, fsdp2); make check plans it"
    )


def out_of_memory(trainer: "OrderedTrainer", error: Exception) -> str:
    """What to do about a device whose memory is full: in a step, or in an evaluation behind one."""
    args, each, step = trainer.args, trainer.args.per_device_train_batch_size, trainer.state.global_step
    full = f"the device's memory is full ({str(error).partition('. ')[0]})"
    if any(frame.f_code.co_name == "evaluate" for frame, _ in traceback.walk_tb(error.__traceback__)):
        rows = args.per_device_eval_batch_size
        fewer = f"per_device_eval_batch_size: {rows // 2}, the same losses" if rows > 1 else "a smaller max_length"
        return f"evaluation at step {step}: {full}; set {fewer}. Checkpoints are as they were"
    every = (args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
    whole = args.activation_checkpointing and every == 1  # by default it may be of some layers
    ways = [] if whole else ["activation_checkpointing: true"]
    if each > 1:
        size = trainer.order.batch
        ways.append(f"per_device_train_batch_size: {each // 2} with global_batch_size: {size}, the same steps")
    ways += ["a smaller max_length", "use_peft: true", "or more devices that share the model (zero3, fsdp2)"]
    return f"step {step + 1}: {full}; set {', '.join(ways)}; make check plans it. Checkpoints are as they were"


def save_results(trainer: SFTTrainer, split: str, metrics: dict[str, float]) -> None:
    """Write `trainer_state.json`, `<split>_results.json` and `all_results.json`, each the old one or the new one.

    Upstream writes them in place, and cannot start again over one that it was killed in.
    """
    if not trainer.is_world_process_zero():
        return
    out = Path(trainer.args.output_dir)
    partial = out / "trainer_state.json.partial"
    trainer.state.save_to_json(str(partial))
    partial.replace(out / "trainer_state.json")
    write_whole(out / f"{split}_results.json", json.dumps(metrics, indent=4, sort_keys=True) + "\n")
    before = {} if split == "train" else json.loads((out / "train_results.json").read_text())
    write_whole(out / "all_results.json", json.dumps({**before, **metrics}, indent=4, sort_keys=True) + "\n")


def save_model(trainer: SFTTrainer, out: Path) -> None:
    """Save the final model so that each of its files is the old one or the new one, whatever happens meanwhile."""
    staged = out / SAVING / "final"
    if trainer.is_world_process_zero():
        shutil.rmtree(out / SAVING, ignore_errors=True)
        staged.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # upstream saves nothing where checkpoints are sharded (transformers 5.23)
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(staged), _internal_call=True)  # without pushing: that comes last
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        if hasattr(model, "peft_config"):  # PEFT does not save what says where answers stop
            model.generation_config.save_pretrained(staged)
        flush(staged)
        for path in staged.iterdir():
            path.replace(out / path.name)
        sync(out)
        shutil.rmtree(out / SAVING)
    trainer.accelerator.wait_for_everyone()


def after_saving(trainer: "OrderedTrainer", recipe: Recipe, prepared: "Prepared") -> list[str]:
    """Evaluate, write manifest and card, verify what was saved, push, submit: none can lose the model any more.

    Returns which of them failed; what is found wrong is still pushed.
    """

    def evaluation() -> None:
        with trainer.as_of_its_model(), explained_when_full(partial(out_of_memory, trainer)):
            metrics = trainer.evaluate()
        save_results(trainer, "eval", metrics)

    def last_answers(callback: Answers) -> None:
        with trainer.as_of_its_model():
            callback.ask()

    failed: list[str] = []
    steps: dict[str, Callable[[], Any]] = {"evaluation": evaluation} if prepared.eval is not None else {}
    if trainer.is_world_process_zero():
        steps["manifest"] = lambda: write_manifest(trainer, recipe, prepared)
    steps["model card"] = trainer.create_model_card
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Answers):
            steps["sample_prompts"] = partial(last_answers, callback)
    steps["verification"] = lambda: verification(trainer, prepared.train.unpacked)
    if trainer.args.push_to_hub:
        steps["push"] = trainer.push_to_hub
    if trainer.is_world_process_zero() and trainer.args.benchmarks:
        steps["benchmarks"] = lambda: failed or submit(trainer.args)  # such a job would not start behind a failed one
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            if name == "evaluation" and trainer.args.world_size > 1:
                raise  # the other processes wait for this one in it: only its end lets the launcher end them
            failed.append(name)
            if isinstance(error, UserError):
                logger.error("%s failed:\n%s", name, error)
            else:
                logger.exception("%s failed; the trained model is safe in %s", name, trainer.args.output_dir)
    return failed


def verification(trainer: SFTTrainer, rows: "Dataset") -> None:
    """Verify the saved model, on the main process. Raises `UserError` with what makes it unfit to be handed over.

    It is read from disk, on its own: transformers would spread it over all ranks as long as it knows of ZeRO-3. Short
    training may not teach to stop and answers may be long, so that answers without an end are only a warning.
    """
    if not trainer.is_world_process_zero():
        return
    out, trust = trainer.args.output_dir, trainer.args.trust_remote_code
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    largest = ANSWERS_ON_CPU if sharded else ANSWERS
    unset_hf_deepspeed_config()
    try:
        findings = verify(out, trust_remote_code=trust)
        prompts = [] if has_errors(findings) else prompts_of(rows)
        if sharded and trainer.args.use_liger_kernel:  # which is in transformers' classes now, and runs on no CPU
            text = "no prompt was answered: liger-kernel runs on GPUs alone, and the weights are shared out"
            findings.append(Finding("note", text, f"python scripts/verify.py {out} --prompt ..."))
        elif prompts and parameters(out, trust) >= largest:
            text = f"no prompt was answered: that is done below {largest / 1e6:,.0f}M parameters here"
            findings.append(Finding("note", text, f"python scripts/verify.py {out} --prompt ..."))
        elif prompts:
            found = answers(out, prompts, ANSWER_TOKENS, "cpu" if sharded else trainer.args.device, trust)
            findings += [each._replace(level="warning") if each.level == "error" else each for each in found]
    finally:
        if trainer.is_deepspeed_enabled:
            set_hf_deepspeed_config(trainer.accelerator.state.deepspeed_plugin.hf_ds_config)
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in findings:
        if finding.level != "error":
            logger.log(logging.INFO if finding.level == "note" else logging.WARNING, as_text([finding])[8:])
    if errors:
        raise UserError(as_text(errors))


def prompts_of(rows: "Dataset", count: int = 2, longest: int = 512) -> list[list[int]]:
    """Token ids of a few prompts of training rows: what stands before the first thing that the model says."""
    prompts = []
    for row in rows.select(range(min(100, len(rows)))):
        start = next((at for at, label in enumerate(row["labels"]) if label != -100), 0)
        if 0 < start <= longest and len(prompts) < count:
            prompts.append(list(row["input_ids"][:start]))
    return prompts


def summarize(trainer: SFTTrainer) -> None:
    """Five lines: what was done, what came out, and where everything is."""
    leave_terminals_that_are_gone()
    out, history = Path(trainer.args.output_dir), trainer.state.log_history
    seconds = round(sum(entry.get("train_runtime", 0) for entry in history))
    beside = sorted(
        path.name for path in [*out.glob("*_results.json"), *out.glob("checkpoint-*"), *out.glob("report.html")]
    )

    def course(key: str, mean: str = "") -> str:
        values = [entry[key] for entry in history if key in entry]
        if values:
            return f"{values[0]:.4f} at first, {values[-1]:.4f} at last"
        means = [entry[mean] for entry in history if mean in entry]  # where there was no log on the way
        return f"{means[-1]:.4f}, the mean of all steps" if means else "not measured"

    steps, epochs = trainer.state.global_step, trainer.state.epoch
    print(f"\ntrained     {steps} steps, {epochs:.2f} epochs in {seconds // 60} min {seconds % 60} s")
    print(f"train loss  {course('loss', mean='train_loss')}")
    print(f"eval loss   {course('eval_loss')}")
    print(f"model       {out} (weights, tokenizer with chat template, generation config, card)")
    print(f"beside it   {', '.join(beside)}")


def end(trainer: SFTTrainer) -> None:
    """Finish the trackers and leave the process group.

    Destroying a gloo group right behind its last collective can deadlock (torch 2.13): its thread wants the GIL to
    free a tensor, and the destroying thread holds it while joining that thread. At a barrier the GIL is free.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.end()
