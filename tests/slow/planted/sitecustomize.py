"""Faults planted into a run from outside: Python imports this by itself from a folder on PYTHONPATH.

`FAULTS` in the environment is a JSON list of objects: `do` names a function of this file, what else there is are its
arguments. `rank` and `step` say where it strikes: everywhere and always where they are left out. A planted wait
touches the file `mark` when it begins; with `once` it is skipped when that is there.
"""

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

FAULTS = json.loads(os.environ.get("FAULTS", "[]"))
RANK = int(os.environ.get("RANK", "0"))
now = {"step": 0}


def planted(do):
    """The faults of this name that strike here and now."""
    return [
        fault
        for fault in FAULTS
        if fault["do"] == do and fault.get("rank", RANK) == RANK and fault.get("step", now["step"]) == now["step"]
    ]


def wait(do):
    for fault in planted(do):
        if "once" in fault and Path(fault["mark"]).exists():
            continue
        if "mark" in fault:
            Path(fault["mark"]).touch()
        end = time.monotonic() + fault["seconds"]
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))


def fill(do, folder):
    """Leave so many bytes of a file system free."""
    for fault in planted(do):
        taken = shutil.disk_usage(folder).free - fault["free"]
        if taken > 0:
            with (Path(folder) / "filler").open("ab") as file:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, taken)


def before(owner, name, act):
    """Have something done before a function, with its arguments."""
    original = getattr(owner, name)

    def both(*args, **kwargs):
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)


def in_step(trainer, *_, **__):
    now["step"] = trainer.state.global_step + 1
    wait("slow step")
    for _ in planted("raise"):
        raise RuntimeError("planted in a step")


def plant_in_trainer(module):
    before(module.OrderedTrainer, "training_step", in_step)
    before(module.OrderedTrainer, "prediction_step", lambda *_, **__: wait("slow evaluation"))
    before(module.Course, "on_step_end", lambda course, args, *_, **__: fill("full at step", args.output_dir))


def plant_in_loading(module):
    wait("slow start")
    before(module, "get_model", lambda *_, **__: wait("slow load"))


def plant_in_model(module):
    """NaN behind the embedding where a token stands, or in its gradients."""
    embed = module.nn.Embedding.forward

    def forward(self, input):
        output = embed(self, input)
        for fault in planted("nan token"):
            output = output.masked_fill((input == fault["token"]).unsqueeze(-1), float("nan"))
        if output.requires_grad and planted("nan gradient"):
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    module.nn.Embedding.forward = forward


def plant_in_state(module):
    """accelerate takes FSDP for GPUs alone; torch's fully_shard works on CPU and gloo, too."""
    start = module.PartialState.__init__

    def begin(state, *args, **kwargs):
        start(state, *args, **kwargs)
        if planted("fsdp on cpu") and state.distributed_type == module.DistributedType.MULTI_CPU:
            module.PartialState._shared_state["distributed_type"] = module.DistributedType.MULTI_GPU

    module.PartialState.__init__ = begin


PLANT = {
    "accelerate.state": plant_in_state,
    "open_r1.trainer": plant_in_trainer,
    "open_r1.checkpoints": lambda module: before(module, "require_room", lambda out, name: fill("full at save", out)),
    "open_r1.finish": lambda module: before(module, "save_model", lambda trainer, out: fill("full at end", out)),
    "open_r1.model": plant_in_loading,
    "transformers.models.qwen3.modeling_qwen3": plant_in_model,
}


class Finder:
    """Finds modules as ever, and has something done to them when they are imported."""

    def find_spec(self, name, path=None, target=None):
        if name not in PLANT:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def execute_and_plant(module):
            execute(module)
            PLANT[name](module)

        spec.loader.exec_module = execute_and_plant
        return spec


if FAULTS:
    sys.meta_path.insert(0, Finder())
