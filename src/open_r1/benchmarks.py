"""Benchmarks of a saved model: lighteval with vLLM, as a job that waits for the training to end well.

As a program it serves `slurm/evaluate.slurm`, and needs no package.
"""

import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)
# Open-R1's names -> tasks of lighteval 0.13, without examples in the prompt.
BENCHMARKS = {
    "math_500": "math_500|0",
    "aime24": "aime24|0",
    "aime25": "aime25|0",
    "gpqa": "gpqa:diamond|0",
    "lcb": "lcb:codegeneration|0",
    "lcb_v4": "lcb:codegeneration_v4|0",
}
KNOWN = [*BENCHMARKS, "all", "suite|task|few_shot"]
PATTERN = rf"^({'|'.join(BENCHMARKS)}|all|([^|,\s]+\|)?[^|,\s]+\|\d+)$"
ANSWER, PROMPT = 32768, 2048  # tokens that an answer may take, and that are kept for the question
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def model_parameters(model: Path, gpus: int, trust_remote_code: bool) -> dict[str, Any]:
    """What lighteval is told of a saved model: its length and sampling (greedy if none), and how it was trained."""
    config, sampling, manifest = (
        json.loads((model / name).read_text("utf-8")) if (model / name).exists() else {}
        for name in ("config.json", "generation_config.json", "manifest.json")
    )
    config = config.get("text_config", config)
    heads, length = config["num_attention_heads"], min(config["max_position_embeddings"], ANSWER + PROMPT)
    written = max((path.stat().st_mtime for path in model.glob("*.safetensors")), default=0)
    sampled = {key: sampling[key] for key in SAMPLING if sampling.get("do_sample") and sampling.get(key) is not None}
    return {
        "model_name": str(model),
        "dtype": "bfloat16",
        "tensor_parallel_size": math.gcd(gpus, heads, config.get("num_key_value_heads") or heads),
        "max_model_length": length,
        "cache_dir": f"{model}/evaluation/cache-{written:.0f}",  # else answers of earlier weights here are taken again
        "trust_remote_code": trust_remote_code,
        "seed": manifest.get("settings", {}).get("seed", 42),
        "system_prompt": manifest.get("recipe", {}).get("system_prompt", {}).get("value"),
        "generation_parameters": {"max_new_tokens": length - min(PROMPT, length // 4), **sampled},
    }


def submit(args: "SFTConfig") -> None:
    """Submit `slurm/evaluate.slurm` behind this Slurm job; where there is none, say how to start it.

    Raises `UserError` when Slurm refuses it.
    """
    from open_r1.errors import UserError

    root, out, job = Path(__file__).parents[2], Path(args.output_dir).absolute(), os.environ.get("SLURM_JOB_ID")
    adapter, slurm = (out / "adapter_config.json").exists(), job and shutil.which("sbatch")
    model, trust = f"{out}-merged" if adapter else str(out), ["--trust_remote_code"] * bool(args.trust_remote_code)
    words = ["slurm/evaluate.slurm", "--model", model, *trust, "--benchmarks", *args.benchmarks]
    by_hand = shlex.join(["sbatch" if job else "bash", *words])
    if adapter:  # lighteval has no way to give vLLM one
        by_hand = f"{shlex.join(['python', 'scripts/merge.py', str(out), model, *trust])} && {by_hand}"
    by_hand = f"cd {shlex.quote(str(root))} && {by_hand}"
    if adapter or not slurm:
        logger.info("benchmarks: %s", by_hand)
        return
    (out / "evaluation").mkdir(exist_ok=True)
    queue = {name: os.environ.get(f"SLURM_JOB_{name.upper()}") for name in ("partition", "account", "qos")}
    options = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]  # not to wait for ever
    options += [f"--output={str(out).replace('%', '%%')}/evaluation/%x-%j.out"]
    options += [f"--{name}={value}" for name, value in queue.items() if value]
    if subprocess.run(["sbatch", *options, *words], cwd=root).returncode:
        raise UserError(f"benchmarks: sbatch says why they are not submitted; by hand: {by_hand}")


if __name__ == "__main__":
    folder, gpus, trust, *names = sys.argv[1:]
    if unknown := [name for name in names if not re.fullmatch(PATTERN, name)]:
        sys.exit(f"evaluate.slurm: unknown benchmark: {', '.join(unknown)}; known: {', '.join(KNOWN)}")
    tasks = [BENCHMARKS.get(name, name) for name in (BENCHMARKS if "all" in names else names)]
    config = {"model_parameters": model_parameters(Path(folder), int(gpus), bool(trust))}
    sys.stdout.write(f"{json.dumps(config)}\0{','.join(tasks)}\0")
