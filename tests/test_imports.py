"""What is imported up to the first optimiser step: what TRL's own trainer needs, and nothing beside it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, settings, write_jsonl

# Runs a script and prints, as JSON, the packages that are there when it appends to its order.jsonl for the first time,
# which is behind its first step, and how many objects no garbage collection looks at any more.
WATCHED = """
import gc, json, runpy, sys
seen = []
def watch(event, args):
    if event == "open" and args[1] == "a" and str(args[0]).endswith("order.jsonl") and not seen:
        seen.append({"packages": sorted({name.partition(".")[0] for name in sys.modules}), "collects": gc.isenabled(),
            "frozen": gc.get_freeze_count()})
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(seen))
"""
OURS = {"open_r1", "filelock"}


@pytest.fixture(scope="module")
def at_first_step(tiny_model, pairs, tmp_path_factory):
    """What is there behind the first step of our run, and of TRL's trainer alone on the same rows.

    Something that goes for DeepSpeed is installed, too.
    """
    folder = tmp_path_factory.mktemp("imports")
    packages = folder / "packages"
    (packages / "deepspeed").mkdir(parents=True)
    (packages / "deepspeed/__init__.py").write_text("class DeepSpeedEngine:\n    pass\n")
    (packages / "deepspeed-0.19.8.dist-info").mkdir()
    (packages / "deepspeed-0.19.8.dist-info/METADATA").write_text("Name: deepspeed\nVersion: 0.19.8\n")
    data = write_jsonl(folder / "text.jsonl", [{"text": text[:200]} for _, text in pairs[:50]])

    def run(script, **more):
        argv = settings(
            model_name_or_path=tiny_model,
            dataset_name=data,
            output_dir=folder / script.stem,
            max_steps=1,
            report_to="none",
            save_strategy="no",
            **more,
        )
        command = [sys.executable, "-c", WATCHED, script, *argv]
        paths = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [seen] = json.loads(done.stdout.splitlines()[-1])
        return seen

    return run(ROOT / "src/open_r1/sft.py"), run(ROOT / "tests/slow/stock_sft.py", bf16=False)


def test_nothing_is_imported_that_trl_does_without(at_first_step):
    ours, stock = (set(seen["packages"]) for seen in at_first_step)
    beside = {name for name in ours - stock - OURS if name not in sys.stdlib_module_names and name[0] != "_"}
    assert not beside
    assert len(ours & stock) > 100
    assert "deepspeed" in stock - ours


def test_imports_are_out_of_the_way_of_garbage_collection(at_first_step):
    ours, stock = at_first_step
    assert ours["collects"] and stock["frozen"] == 0
    assert ours["frozen"] > 300_000
