"""The benchmarks at toy scale: everything that they do, and figures that mean nothing."""

import subprocess
import sys

import bench
import bench_gpu
import bench_tables
import pytest
from bench_results import read_results
from conftest import ROOT


def bench_of(*argv):
    """What `scripts/bench.py` prints."""
    command = [sys.executable, "scripts/bench.py", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("section", bench.SECTIONS)
def test_a_section(tmp_path, section):
    out = tmp_path / "cpu.json"
    said = bench_of(section, "--quick", "--repeats", 1, "--out", out)
    made = read_results(out).sections[section]
    assert len(made["runs"]) == len([line for line in said.splitlines() if line.startswith(f"{section} 1, ")]) > 3
    slow = {"torch_compile"}  # which may not be done with the first step in a minute
    assert not [run for run in made["runs"] if "failed" in run and run.get("variant") not in slow], said
    if section == "ablation":
        assert len({run["real"] for run in made["runs"] if "real" in run}) == 1  # the same rows in whatever order
    table = bench_tables.TABLES[section](made)
    assert len(table.splitlines()) == 4 + len(made["runs"]) // (2 if section == "overhead" else 1)
    assert "nan" not in table
    assert "is there already" in bench_of(section, "--quick", "--repeats", 1, "--out", out)


def test_sides_train_the_same(tmp_path):
    out = tmp_path / "cpu.json"
    bench_of("train", "--quick", "--repeats", 1, "--out", out)
    runs = read_results(out).runs("train", model="tiny")
    assert [run["side"] for run in runs] == ["stock", "ours", "tuned", "tuned, keeping"]
    assert len({run["real"] for run in runs}) == 1  # the same rows
    stock, ours, tuned, keeping = (run["settled"] for run in runs)
    assert stock["activation_checkpointing"] is True
    for setting in ("padding_free", "packing", "activation_checkpointing", "dataloader_num_workers", "optim"):
        assert keeping[setting] == tuned[setting] == ours[setting], setting


def test_a_gpu_at_toy_scale_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    said = bench_of("gpu", "--toy", "--minutes", 8, "--only", "toy full 64", "toy LoRA 64 ours", "--out", out)
    runs = read_results(out).sections["gpu"]["runs"]
    assert [run["side"] for run in runs] == ["ours", "stock", "tuned", "ours"]
    for run in runs:
        assert run["outcome"] == "done", said
        assert run["steps"] == bench_gpu.STEPS - bench_gpu.SKIPPED
        assert run["tokens_per_second"] > 0
        assert run["mfu"] is None
        assert 0.9 < run["filled"] <= 1
        assert run["losses"][0] == pytest.approx(6.24, abs=0.1)  # ln 512, of a model that knows nothing
    assert "| toy, LoRA | 64 | " in bench_tables.gpu(read_results(out).sections["gpu"])
    assert f"{runs[0]['tokens_per_second']:,.0f} tokens/s" in said
    assert bench_of("gpu", "--toy", "--only", "toy full 64", "--out", out).count("tokens/s") == 0  # all there
