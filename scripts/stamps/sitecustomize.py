"""Notes what every optimiser step costs, in a trainer that knows nothing of it: `trl sft` and `sft.py` alike.

Python imports this module by its name when its folder is on PYTHONPATH. Where STAMPS names a file, the trainer of
transformers gets a callback more, which writes lines of JSON: `begin`, with what the trainer was told, and one for
each step. The process ends with step STAMPS_STEPS, with the first from STAMPS_LEAST on that ends after STAMPS_SECONDS
of training, or with training: what follows it is not measured, and nothing is saved.
"""

import json
import os
import sys
import time
from typing import Any

# What of the trainer's arguments makes a run faster or slower.
TOLD = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "packing_strategy",
    "padding_free",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "train_sampling_strategy",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "torch_compile",
    "optim",
    "bf16",
    "logging_steps",
    "use_liger_kernel",
)


class Waiting:
    """Finds no module, but has the trainer's fitted with stamps when it is imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers.trainer":
            return None
        import importlib.util

        sys.meta_path.remove(Waiting)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_fit(module: Any) -> None:
            run(module)
            fit(module)

        spec.loader.exec_module = run_and_fit
        return spec


def fit(trainer: Any) -> None:
    """Give the module `transformers.trainer` the callback, and its trainer the notes that the callback writes down."""
    import multiprocessing

    import torch

    batches, path = [], os.environ["STAMPS"]
    steps, least = (int(os.environ.get(f"STAMPS_{name}", 0)) for name in ("STEPS", "LEAST"))
    seconds = float(os.environ.get("STAMPS_SECONDS", "inf"))
    train = trainer.Trainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Left where it is computed: reading it now would make this process wait for the device.
        noted = (lengths_of(inputs), inputs["input_ids"].numel(), (inputs["labels"] != -100).sum())
        loss = train(self, model, inputs, *args, **kwargs)
        batches.append((*noted, loss))
        return loss

    def write(**line: Any) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def now() -> dict[str, float]:
        children = [child.pid for child in multiprocessing.active_children()]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"wall": time.perf_counter(), "cpu": time.process_time() + sum(map(seconds_of, children))}

    class Stamps(trainer.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            attention = model.config.get_text_config()._attn_implementation
            weights = {
                "attn_implementation": attention,
                "dtype": str(model.dtype).removeprefix("torch."),
                "parameters": sum(each.numel() for each in model.parameters()),
                "trained": sum(each.numel() for each in model.parameters() if each.requires_grad),
            }
            told = {name: getattr(args, name, None) for name in TOLD}
            write(
                event="begin",
                time=time.time(),
                **of_session(),
                **now(),
                told=json.loads(json.dumps(told, default=str)),
                **weights,
            )
            self.started = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            at, lengths = now(), [each for batch in batches for each in batch[0].tolist()]
            write(
                step=state.global_step,
                **at,
                loss=sum(float(batch[3]) for batch in batches),
                padded=sum(batch[1] for batch in batches),
                real=sum(lengths),
                supervised=sum(int(batch[2]) for batch in batches),
                squares=sum(each**2 for each in lengths),
                **({"time": time.time(), **of_session()} if state.global_step == 1 else {}),
                **memory(torch),
            )
            batches.clear()
            late = time.monotonic() - self.started > seconds and state.global_step >= least
            if state.global_step == steps or late:
                leave()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            leave()

    trainer.Trainer.training_step = training_step
    trainer.DEFAULT_CALLBACKS.append(Stamps)


def leave() -> None:
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def lengths_of(inputs: dict[str, Any]) -> Any:
    """Tokens of each document of a batch, without padding."""
    if inputs.get("cu_seq_lens_q") is not None:
        return inputs["cu_seq_lens_q"].diff()
    return inputs["attention_mask"].sum(-1)


def memory(torch: Any) -> dict[str, int]:
    """Bytes of the device's memory at most so far: given to tensors, and held by the allocator."""
    if not torch.cuda.is_available():
        return {}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def of_session() -> dict[str, float]:
    """CPU seconds of all processes of this session, those that have ended with them: of what the command started."""
    total, me = 0, os.getsid(0)
    for name in filter(str.isdigit, os.listdir("/proc")):
        fields = fields_of(name)
        if fields and int(fields[3]) == me:
            total += sum(map(int, fields[11:15]))
    return {"session_cpu": total / os.sysconf("SC_CLK_TCK")}


def seconds_of(process: int) -> float:
    """CPU seconds of a process that lives."""
    return sum(map(int, fields_of(process)[11:13])) / os.sysconf("SC_CLK_TCK")


def fields_of(process: int | str) -> list[str]:
    """What /proc says of a process behind its name; nothing when it has ended."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


if "STAMPS" in os.environ:
    sys.meta_path.insert(0, Waiting)
