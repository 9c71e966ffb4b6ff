"""A process that measures on a GPU for `bench_gpu.py`: it imports everything, waits to be told what to do, does it.

It trains, ours or stock, and ends when `stamps/sitecustomize.py` says so; or it measures what the device does at most.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def work_as_told() -> int:
    """Import everything, wait for a line on stdin, and do what it says."""
    import peft  # noqa: F401
    import trl.scripts.sft
    import trl.trainer.sft_trainer

    import open_r1.finish
    import open_r1.model
    import open_r1.preparation
    import open_r1.sft
    import open_r1.trainer  # noqa: F401

    line = sys.stdin.readline()
    if not line.strip():
        return 0
    told = json.loads(line)
    if told["what"] == "ceilings":
        print("ANSWER " + json.dumps(ceilings(told["toy"])))
        return 0
    recipe = Path(told["settings"]["output_dir"] + ".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps(told["settings"]))  # JSON is YAML
    if told["side"] == "ours":
        open_r1.model.get_model = of_ours
        return open_r1.sft.main(["--config", str(recipe)])
    trl.trainer.sft_trainer.create_model_from_path = with_random_weights
    parser = trl.scripts.sft.make_parser()
    trl.scripts.sft.main(*parser.parse_args_and_config(["--config", str(recipe)]))
    return 0


def of_ours(model_args: Any, training_args: Any, tokenizer: Any = None) -> Any:
    """In place of `open_r1.model.get_model`."""
    from open_r1.model import weights_dtype

    dtype = weights_dtype(model_args, training_args)
    name = model_args.model_name_or_path
    return with_random_weights(name, dtype=dtype, attn_implementation=model_args.attn_implementation)


def with_random_weights(name: str, dtype: Any = None, attn_implementation: str | None = None, **_: Any) -> Any:
    """A model of a config, made on the device; in place of what loads one from files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(name), dtype=dtype, attn_implementation=attn_implementation
        )


def ceilings(toy: bool) -> dict[str, Any]:
    """What the device does at most, measured: TFLOP/s of a bfloat16 product of square matrices, GB/s of a copy."""
    import torch

    from open_r1.flops import peak_flops

    there = torch.cuda.is_available()
    if not there and not toy:
        raise SystemExit("there is no GPU here; --toy runs all of it at toy scale on a CPU")
    device, size, wide = ("cuda", 8192, 2**31) if there else ("cpu", 256, 2**22)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.randint(0, 255, (wide,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "ceilings": {
            "TFLOP/s of bfloat16 products": round(2 * size**3 / best(lambda: square @ square, 30) / 1e12, 2),
            "GB/s of copies": round(2 * wide / best(lambda: target.copy_(source), 20) / 1e9, 1),
        }
    }
    if there:
        facts = torch.cuda.get_device_properties(0)
        found |= {"device": facts.name, "memory_bytes": facts.total_memory, "cuda": torch.version.cuda}
        found["peak_flops"] = peak_flops(facts.name, "bf16")
    return found


def best(work: Any, times: int) -> float:
    """Seconds of the fastest of some runs."""
    import torch

    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


if __name__ == "__main__":
    sys.exit(work_as_told())
