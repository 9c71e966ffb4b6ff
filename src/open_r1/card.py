"""What a run was, for machines (`manifest.json`) and for people (the model card, written from it)."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from open_r1.checkpoints import write_whole
from open_r1.recipe import Recipe
from open_r1.schema import masked
from open_r1.tables import looks_local

if TYPE_CHECKING:
    from trl import SFTTrainer

    from open_r1.preparation import Prepared

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "accelerate",
    "peft",
    "deepspeed",
    "liger-kernel",
    "flash-attn",
)
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_length",
    "packing",
    "padding_free",
    "activation_checkpointing",
    "dataloader_num_workers",
    "seed",
)
OF_A_SOURCE = ("source", "rows_in_source", "rows_in", "trained", "dropped", "tokens", "supervised", "achieved_share")


def write_manifest(trainer: "SFTTrainer", recipe: Recipe, prepared: "Prepared") -> dict[str, Any]:
    """Write `manifest.json` into output_dir: recipe, code, versions, hardware, data, order, results. Returns it."""
    out, args, history = Path(trainer.args.output_dir), trainer.args, trainer.state.log_history
    seconds = sum(entry.get("train_runtime", 0) for entry in history)
    tokens = next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), None)
    ended = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    order = out / "order.jsonl"
    manifest = {
        "recipe": {key: {"value": value, "from": recipe.origin.get(key)} for key, value in recipe.values.items()},
        "code": code(),
        "versions": versions(),
        "hardware": hardware(args.world_size),
        "data": {
            "key": prepared.train.key,
            **{
                name: [
                    {**{key: entry[key] for key in OF_A_SOURCE}, "contents": entry["contents"]} for entry in entries
                ]
                for name, entries in ((name, part.ledger["sources"]) for name, part in prepared.parts.items())
            },
        },
        "order": hashlib.sha256(order.read_bytes()).hexdigest() if order.exists() else None,
        "settings": {key: plain(getattr(args, key)) for key in SETTINGS}
        | {"global_batch_size": trainer.get_total_train_batch_size(args)},
        "results": {
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "train_loss": last(history, "loss"),
            "eval_loss": last(history, "eval_loss"),
            "seconds": round(seconds, 3),
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else None,
            **{key: value for key, value in ended.items() if key.startswith("train_") and key != "train_loss"},
        },
    }
    text = masked(json.dumps(manifest, indent=1, default=str))
    write_whole(out / "manifest.json", text + "\n")
    return manifest


def plain(value: Any) -> Any:
    """An enumeration's value, anything else as it is."""
    return getattr(value, "value", value)


def last(history: list[dict[str, Any]], key: str) -> float | None:
    """The last value that was logged under a key."""
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def code() -> dict[str, Any]:
    """This package's code: a digest of its files, and the commit of its repository, where it is in one."""
    here = Path(__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    found: dict[str, Any] = {"digest": hashlib.sha256(text).hexdigest()[:16]}

    def git(*argv: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *argv], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            **found,
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--", str(here))),
        }
    except (OSError, subprocess.CalledProcessError):
        return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(processes: int) -> dict[str, Any]:
    """What the run was on, as this process sees it."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "processes": processes,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def device_of(hardware: dict[str, Any]) -> str:
    """What each process computes on, in words."""
    return hardware["gpu"] or f"CPU ({hardware['machine']})"


def write_card(output_dir: str) -> None:
    """Write the model card, `README.md`, from `manifest.json` of the same directory."""
    out = Path(output_dir)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    values = {key: said["value"] for key, said in manifest["recipe"].items()}
    base, results, data = values["model_name_or_path"], manifest["results"], manifest["data"]["train"]
    mixture = (values.get("dataset_mixture") or {}).get("datasets") or [{"id": values.get("dataset_name")}]
    ids = [source["id"] for source in mixture if source.get("id")]
    about = ModelCardData(
        base_model=None if looks_local(base) or Path(base).exists() else base,
        datasets=[name for name in dict.fromkeys(ids) if not looks_local(name) and not Path(name).exists()] or None,
        library_name="peft" if values.get("use_peft") else "transformers",
        pipeline_tag="text-generation",
        tags=["open-r1", "sft", "trl"],
    )
    rows = [
        f"| {s['source']} | {s['trained']:,} | {s['tokens']:,} | {s['supervised']:,} | {s['achieved_share']:.1%} |"
        for s in data
    ]
    measured = {
        "steps": results["steps"],
        "epochs": round(results["epochs"], 2),
        "train loss": results["train_loss"],
        "eval loss": results["eval_loss"],
        "seconds": results["seconds"],
        "tokens per second": results["tokens_per_second"],
    }
    hardware, code = manifest["hardware"], manifest["code"]
    written_by = code.get("commit", "unknown") + (" with changes" if code.get("changed") else "")
    machine = device_of(hardware)
    text = f"""---
{about.to_yaml()}
---

# {out.absolute().name}

Supervised fine-tuning of {base}, on {hardware["processes"]} x {machine}.

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{out.absolute().name}")
messages = [{{"role": "user", "content": "Hello"}}]
print(generator(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])
```

## Data

| source | rows | tokens | supervised tokens | share of them |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

## Training

{bullets(manifest["settings"])}

## Results

{bullets(measured)}

## Made with

{bullets({"code": written_by, **manifest["versions"]})}

`manifest.json` has the whole recipe, what the data were and a digest of the order in which rows were read.
"""
    ModelCard(text).save(out / "README.md")


def bullets(values: dict[str, Any]) -> str:
    """A list of what is known."""
    return "\n".join(f"- {key}: {value}" for key, value in values.items() if value is not None)
