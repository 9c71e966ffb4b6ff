"""Notes what every optimiser step costs, in a trainer that knows nothing of it: `trl sft` and `sft.py` alike.

Python imports this module by its name when its folder is on PYTHONPATH. Where STAMPS names a file, the trainer of
transformers gets a callback more, which writes lines of JSON: `begin`, with what the trainer was told, and one for
each step. The process ends with step STAMPS_STEPS, with the first that ends STAMPS_SECONDS after step STAMPS_SKIPPED
and is the STAMPS_LEAST-th after it or a later one, or with training: what follows it is not measured, and nothing is
saved.
"""

import atexit
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
    batches: list[tuple[Any, ...]] = []
    train = trainer.Trainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Left where it is computed: reading it now would make this process wait for the device.
        noted = (lengths_of(inputs), inputs["input_ids"].numel(), (inputs["labels"] != -100).sum())
        loss = train(self, model, inputs, *args, **kwargs)
        batches.append((*noted, loss))
        return loss

    trainer.Trainer.training_step = training_step
    trainer.DEFAULT_CALLBACKS.append(type("Stamps", (Notes, trainer.TrainerCallback), {"batches": batches}))


class Notes:
    """The callback. On a GPU nothing waits for the device before the end: steps are read when it is done with them."""

    batches: list[tuple[Any, ...]]  # of the step that is being done: lengths, tokens, those in the loss, the loss

    def __init__(self) -> None:
        import torch

        self.torch, self.held, self.since = torch, [], 0.0
        names = ("STEPS", "SKIPPED", "LEAST")
        self.last, self.skipped, self.least = (int(os.environ.get(f"STAMPS_{name}", 0)) for name in names)
        self.seconds = float(os.environ.get("STAMPS_SECONDS", "inf"))
        self.device = torch.cuda.is_available()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = {
            "attn_implementation": model.config.get_text_config()._attn_implementation,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(each.numel() for each in model.parameters()),
            "trained": sum(each.numel() for each in model.parameters() if each.requires_grad),
        }
        told = {name: getattr(args, name, None) for name in TOLD}
        if self.device:
            self.torch.cuda.synchronize()
            self.first, self.aside = self.mark(), self.torch.cuda.Stream()
        self.begun = self.since = time.perf_counter()
        write(
            event="begin",
            time=time.time(),
            **of_session(),
            wall=self.begun,
            cpu=cpu_seconds(),
            told=json.loads(json.dumps(told, default=str)),
            **weights,
        )
        atexit.register(self.let_go, last=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, step = time.perf_counter(), state.global_step
        noted = {"step": step, "cpu": cpu_seconds(), **memory(self.torch)}
        noted |= {"time": time.time(), **of_session()} if step == 1 else {}
        self.held.append((noted, self.mark() if self.device else now, [*self.batches]))
        self.batches.clear()
        self.let_go()
        if step <= self.skipped:
            self.since = now
        late = now - self.since > self.seconds and step >= self.skipped + self.least
        if step == self.last or late:
            self.leave()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """End this process at once."""
        self.let_go(last=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def mark(self) -> Any:
        """Have the device note when it gets here."""
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def let_go(self, last: bool = False) -> None:
        """Write down the steps that are held, as far as the device is done with them; at last, all."""
        if not self.device:
            while self.held:
                write_step(*self.held.pop(0))
            return
        if last:
            self.torch.cuda.synchronize()
        with self.torch.cuda.stream(self.aside):  # in its own, a copy would wait for all that is queued
            while self.held and self.held[0][1].query():
                noted, mark, batches = self.held.pop(0)
                write_step(noted, self.begun + self.first.elapsed_time(mark) / 1000, batches)


def write_step(noted: dict[str, Any], wall: float, batches: list[tuple[Any, ...]]) -> None:
    """A line of what a step was and when it ended."""
    lengths = [each for batch in batches for each in batch[0].tolist()]
    write(
        **noted,
        wall=wall,
        loss=sum(float(batch[3]) for batch in batches),
        padded=sum(batch[1] for batch in batches),
        real=sum(lengths),
        supervised=sum(int(batch[2]) for batch in batches),
        squares=sum(each**2 for each in lengths),
    )


def write(**line: Any) -> None:
    """A line of what is noted."""
    with open(os.environ["STAMPS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that make its batches."""
    import multiprocessing

    children = [child.pid for child in multiprocessing.active_children()]
    return time.process_time() + sum(map(seconds_of, children))


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
