"""What follows training: evaluation, model card, upload, and the summary. The model is saved before any of it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerState
from trl import SFTTrainer

from open_r1.checkpoints import publish

if TYPE_CHECKING:
    from open_r1.configs import ScriptArguments

logger = logging.getLogger(__name__)


def train(trainer: SFTTrainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint where there is one, and save model, state and metrics before anything else."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model(trainer.args.output_dir, _internal_call=True)  # without pushing: that comes last
    trainer.save_state()
    trainer.save_metrics("train", metrics)


def restore(trainer: SFTTrainer, checkpoint: str) -> None:
    """Take model and state from a checkpoint of the last step instead of training."""
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    if trainer.is_world_process_zero():
        publish(checkpoint, trainer.args.output_dir)
    trainer.save_state()


def after_saving(trainer: SFTTrainer, script_args: "ScriptArguments", evaluate: bool) -> bool:
    """Evaluate, write the card, push: none can lose the model any more. Returns whether one of them failed."""
    about = {
        "dataset_name": [source.id or source.data_files for source in script_args.sources],
        "tags": ["open-r1"],
    }

    def evaluation() -> None:
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.save_state()

    steps = {"evaluation": evaluation} if evaluate else {}
    steps["model card"] = lambda: trainer.create_model_card(**about)
    if trainer.args.push_to_hub:
        steps["push"] = lambda: trainer.push_to_hub(**about)
    failed = False
    for name, step in steps.items():
        try:
            step()
        except Exception:
            failed = True
            logger.exception("%s failed; the trained model is safe in %s", name, trainer.args.output_dir)
    return failed


def summarize(trainer: SFTTrainer) -> None:
    """Five lines: what was done, what came out, and where everything is."""
    out, history = Path(trainer.args.output_dir), trainer.state.log_history
    seconds = round(sum(entry.get("train_runtime", 0) for entry in history))
    beside = sorted(path.name for path in [*out.glob("*_results.json"), *out.glob("checkpoint-*")])

    def course(key: str) -> str:
        values = [entry[key] for entry in history if key in entry]
        return f"{values[0]:.4f} at first, {values[-1]:.4f} at last" if values else "not measured"

    steps, epochs = trainer.state.global_step, trainer.state.epoch
    print(f"\ntrained     {steps} steps, {epochs:.2f} epochs in {seconds // 60} min {seconds % 60} s")
    print(f"train loss  {course('loss')}")
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
