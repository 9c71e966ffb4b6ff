"""What the kill harness compares with: TRL's `SFTTrainer` alone, resumed as transformers' own examples do it.

    python tests/slow/stock_sft.py --model_name_or_path MODEL --dataset_name chat.jsonl --output_dir OUT ...

Nothing of this repository is in it. The steps that it has done are written down for the harness to watch.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import load_dataset
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer


@dataclass
class Inputs:
    """What is trained on what."""

    model_name_or_path: str
    dataset_name: str
    eval_dataset_name: str | None = None


class Steps(TrainerCallback):
    """Writes a line for each step, where `sft.py` writes its order."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with Path(args.output_dir, "order.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step}) + "\n")


def main():
    inputs, args = HfArgumentParser((Inputs, SFTConfig)).parse_args_into_dataclasses()
    read = partial(load_dataset, "json", split="train")
    trainer = SFTTrainer(
        model=inputs.model_name_or_path,
        args=args,
        train_dataset=read(data_files=inputs.dataset_name),
        eval_dataset=read(data_files=inputs.eval_dataset_name) if inputs.eval_dataset_name else None,
        callbacks=[Steps()],
    )
    state = Path(args.output_dir, "run_state.json")
    if trainer.is_world_process_zero():
        state.unlink(missing_ok=True)
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if last and trainer.is_world_process_zero():
        print("resuming from", last, flush=True)
    metrics = trainer.train(resume_from_checkpoint=last).metrics
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        state.write_text(json.dumps({"status": "complete"}))


if __name__ == "__main__":
    main()
