"""The demo, as `make demo` runs it: nothing solved before, at least 90 % after, and every answer stops by itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def run(cwd, *command):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_DATASETS_CACHE": str(cwd / "cache")}
    environment.pop("OMP_NUM_THREADS", None)  # the demo trains on all cores
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def scores(cwd, model):
    output = run(cwd, "python", ROOT / "scripts/score_demo.py", model, "--problems", "data/demo/held_out.jsonl")
    found = dict(re.findall(r"(exact match|stopped): +([\d.]+)%", output))
    return float(found["exact match"]), float(found["stopped"])


def test_the_demo_learns_and_stops(tmp_path):
    run(tmp_path, "python", ROOT / "scripts/make_demo.py", "data/demo")
    assert scores(tmp_path, "data/demo/model")[0] < 2
    launcher = ["accelerate", "launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    recipe = ROOT / "recipes/demo/sft/config_arithmetic.yaml"
    output = run(tmp_path, *launcher, "--dynamo_backend", "no", ROOT / "src/open_r1/sft.py", "--config", recipe)
    assert "trained     900 steps" in output
    solved, stopped = scores(tmp_path, "data/demo/run")
    assert solved >= 90
    assert stopped == 100
