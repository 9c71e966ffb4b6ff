"""The benchmarks: what they note, compare and write down. tests/slow/test_bench.py runs them at toy scale."""

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import time
from types import SimpleNamespace

import bench
import bench_device
import bench_gpu
import bench_runs
import bench_tables
import pytest
import torch
from bench_results import Results, read_results
from conftest import ROOT, write_jsonl
from torch.utils.flop_counter import FlopCounterMode

from open_r1.flops import work_of

TOLD = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "packing": False,
    "packing_strategy": "bfd",
    "padding_free": True,
    "gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": None,
    "optim": "adamw_torch_fused",
}
BEGIN = {"told": TOLD, "attn_implementation": "by_document"}
FACTS = {
    "device": "2 cores of a machine",
    "memory_gib": 24,
    "threads": 1,
    "versions": {"python": "3.11", "trl": "1.16.0"},
    "commit": "abc1234",
    "command": "python scripts/bench.py train",
    "scale": {"cold_rows": 85000, "prepared": [30000, 200]},
}


def stamps_module():
    """`stamps/sitecustomize.py`, under another name than Python looks for."""
    spec = importlib.util.spec_from_file_location("stamps", ROOT / "scripts/stamps/sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps_of(*costs):
    """Stamps of steps with 50 of 100 tokens real, which take so many CPU seconds each, and twice the wall time."""
    at, lines = 0.0, []
    for number, cost in enumerate(costs, 1):
        at += cost
        lines.append({"step": number, "cpu": at, "wall": 2 * at, "loss": 1 / number, "real": 50, "padded": 100})
    return lines


class TestStamps:
    def test_a_run_of_ours_is_noted_and_ended(self, tmp_path, tiny_model, chat_file):
        settings = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "use_cpu": True, "max_steps": 50}
        settings |= {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
        made = bench_runs.run("ours, python sft.py", settings, tmp_path, 3, tmp_path / "cache")
        assert made["begin"]["told"]["per_device_train_batch_size"] == 4
        assert [step["step"] for step in made["steps"]] == [1, 2, 3]
        assert not (tmp_path / "run/model.safetensors").exists()  # what follows training is not waited for
        first = bench_runs.first_step(made)
        assert 0 < first["cpu_before_training"] < first["cpu"] < first["wall"] * 16
        for step in made["steps"]:
            assert 0 < step["supervised"] < step["real"] <= step["padded"] <= 4 * 1024
        assert made["steps"][0]["loss"] == pytest.approx(6.4, abs=0.3)  # ln 600, of a model that knows nothing
        assert not list((tmp_path / "run").glob("checkpoint-*"))

    def test_a_run_that_fails_says_why(self, tmp_path):
        settings = {"model_name_or_path": str(tmp_path), "dataset_nam": "x"}
        with pytest.raises(bench_runs.Failed, match=r"0 of 3 steps(.|\n)*dataset_name"):
            bench_runs.run("ours, python sft.py", settings, tmp_path / "out", 3, tmp_path / "cache")

    def test_steps_are_written_as_they_end(self, tmp_path, monkeypatch):
        stamps = stamps_module()
        monkeypatch.setenv("STAMPS", str(tmp_path / "stamps.jsonl"))
        monkeypatch.setenv("STAMPS_STEPS", "2")
        left = []
        monkeypatch.setattr(os, "_exit", left.append)
        trainer = SimpleNamespace(
            Trainer=type("Trainer", (), {"training_step": lambda self, model, inputs: torch.tensor(0.5)}),
            TrainerCallback=object,
            DEFAULT_CALLBACKS=[],
        )
        stamps.fit(trainer)
        callback, state = trainer.DEFAULT_CALLBACKS[0](), SimpleNamespace(global_step=1)
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        padded = {"input_ids": mask, "labels": mask * 101 - 100, "attention_mask": mask}
        laid = {"input_ids": torch.ones(1, 5), "labels": torch.ones(1, 5), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
        for inputs in (padded, laid):
            trainer.Trainer().training_step(None, inputs)
        callback.on_step_end(None, state, None)
        assert left == []
        callback.on_step_end(None, SimpleNamespace(global_step=2), None)
        assert left == [0]  # the process ends with the step that it was asked for
        line, last = map(json.loads, (tmp_path / "stamps.jsonl").read_text().splitlines())
        assert last["real"] == 0
        assert (line["real"], line["padded"], line["supervised"], line["squares"]) == (10, 11, 10, 26)
        assert line["loss"] == 1.0
        assert line["session_cpu"] > 0

    def notes_of_a_gpu(self, tmp_path, monkeypatch, behind):
        """Notes in a process whose device, a fake, is done with all but the last `behind` marks that it was given."""
        stamps, clock, left, waits, marks = stamps_module(), itertools.count(), [], [], []

        class Event:
            def record(self):
                marks.append(self)

            def elapsed_time(self, other):
                return 1000.0 * (marks.index(other) - marks.index(self))

            def query(self):
                return bool(waits[1:]) or self in marks[: len(marks) - behind]

        cuda = {"Event": lambda **_: Event(), "synchronize": lambda: waits.append(1), "is_available": lambda: True}
        cuda |= {"max_memory_allocated": lambda: 7, "max_memory_reserved": lambda: 8}
        cuda |= {"Stream": lambda: "aside", "stream": lambda stream: contextlib.nullcontext(stream)}
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(**cuda)))
        monkeypatch.setattr(os, "_exit", left.append)
        monkeypatch.setattr(stamps, "time", SimpleNamespace(**{**vars(time), "perf_counter": lambda: next(clock)}))
        monkeypatch.setattr(stamps, "atexit", SimpleNamespace(register=lambda *args, **kwargs: None))
        values = {"": tmp_path / "stamps", "_SECONDS": 1.5, "_SKIPPED": 2, "_STEPS": 9, "_LEAST": 3}
        for name, value in values.items():
            monkeypatch.setenv(f"STAMPS{name}", str(value))
        notes = stamps.Notes()
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation="sdpa"))
        model = SimpleNamespace(config=config, dtype="torch.bfloat16", parameters=list)
        notes.on_train_begin(SimpleNamespace(), None, None, model=model)

        def step(number):
            notes.batches = [(torch.tensor([2, 3]), 5, torch.tensor(4), torch.tensor(0.5))]
            notes.on_step_end(None, SimpleNamespace(global_step=number), None)

        return step, lambda: bench_runs.read(tmp_path / "stamps"), left, waits

    def test_on_a_gpu_steps_are_written_when_it_is_done_with_them(self, tmp_path, monkeypatch):
        step, lines, left, waits = self.notes_of_a_gpu(tmp_path, monkeypatch, behind=2)
        for number in (1, 2, 3, 4, 5):
            assert left == [] and len(lines()[1]) == max(0, number - 3) and len(waits) == 1
            step(number)
        assert left == [0] and len(waits) == 2  # the third behind those that are skipped, and after more than 1.5 s
        begin, steps = lines()
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
        assert [line["wall"] - begin["wall"] for line in steps] == [1, 2, 3, 4, 5]  # by the device's clock
        assert (steps[0]["real"], steps[0]["supervised"], steps[0]["allocated"]) == (5, 4, 7)

    def test_an_epoch_ends_with_training(self, tmp_path, tiny_model, conversations):
        rows = write_jsonl(tmp_path / "rows.jsonl", conversations[:12])
        settings = {"model_name_or_path": tiny_model, "dataset_name": rows, "use_cpu": True, "num_train_epochs": 1}
        settings |= {"per_device_train_batch_size": 4}
        made = bench_runs.run("ours, python sft.py", settings, tmp_path, 0, tmp_path / "cache")
        assert [step["step"] for step in made["steps"]] == [1, 2, 3]
        assert not (tmp_path / "run/model.safetensors").exists()

    def test_only_a_process_that_is_asked_to_waits_for_the_trainer(self, monkeypatch):
        monkeypatch.delenv("STAMPS", raising=False)
        before = list(sys.meta_path)
        stamps_module()
        assert sys.meta_path == before


class TestComparison:
    def test_unequal_losses_cannot_be_compared(self):
        bench_runs.require_parity([1.0, 2.0], [1.00009, 2.0], "tiny, ours")
        for others in ([1.0, 2.0002], [1.0], [1.0, float("nan")]):
            with pytest.raises(bench_runs.Unequal, match=r"tiny, ours: step 2 has a loss of 2\.0"):
                bench_runs.require_parity([1.0, 2.0], others, "tiny, ours")

    def test_the_first_steps_are_not_counted(self):
        made = {"begin": {"cpu": 0.0, "wall": 0.0}, "steps": steps_of(9.0, 5.0, 1.0, 2.0)}
        assert bench_runs.steady(made, 0)["cpu"] == [9.0, 5.0, 1.0, 2.0]
        figures = bench_runs.steady(made, 2)
        assert figures["cpu"] == [1.0, 2.0]
        assert figures["wall"] == [2.0, 4.0]
        assert (figures["real"], figures["padded"]) == (100, 200)
        assert len(figures["losses"]) == 4  # all of them are compared

    def test_tuned_is_told_what_ours_settled(self):
        theirs, ours = bench_runs.settled(BEGIN), bench_runs.settled(BEGIN, ours=True)
        assert theirs == {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "packing": False,
            "padding_free": True,
            "activation_checkpointing": False,
            "optim": "adamw_torch_fused",
            "max_length": None,
            "attn_implementation": "sdpa",
        }
        assert ours["attn_implementation"] == "by_document"
        assert "max_length" not in ours

    def test_other_losses_stop_the_bench(self, tmp_path, monkeypatch, capsys):
        costs = iter([steps_of(1, 1, 1, 1), [{**step, "loss": 7.0} for step in steps_of(1, 1, 1, 1)]])
        monkeypatch.setattr(bench, "write_inputs", lambda *args: 80)
        monkeypatch.setattr(
            bench, "run", lambda *args: {"begin": {**BEGIN, "cpu": 0, "wall": 0}, "steps": next(costs)}
        )
        assert bench.main(["train", "--quick", "--repeats", "1", "--out", str(tmp_path / "cpu.json")]) == 1
        assert "step 1 has a loss of 7.0 where it was 1.0: nothing can be compared" in capsys.readouterr().err
        assert len(read_results(tmp_path / "cpu.json").sections["train"]["runs"]) == 1


class TestResults:
    def cells(self, calls):
        def measured(name):
            calls.append(name)
            if name == "b":
                raise bench_runs.Failed("b: 0 of 4 steps: no space\nlog")
            return {"cpu": 1.0}

        return [bench.Cell({"side": name}, lambda name=name: measured(name)) for name in "ab"]

    def test_what_is_there_is_not_measured_again(self, tmp_path, capsys):
        results, calls = Results(tmp_path / "x.json", {}), []
        results.begin("startup", FACTS, again=False)
        here = bench.Bench("startup", tmp_path, bench.QUICK, results)
        bench.measure(here, self.cells(calls), 1)
        assert calls == ["a", "b"]
        assert "startup 1, b: b: 0 of 4 steps: no space" in capsys.readouterr().out
        again = read_results(tmp_path / "x.json")
        again.begin("startup", FACTS, again=False)
        here = bench.Bench("startup", tmp_path, bench.QUICK, again)
        bench.measure(here, self.cells(calls), 2)
        assert calls == ["a", "b", "b", "a"]  # the second repeat alone, in the other direction
        assert [run["repeat"] for run in again.runs("startup", side="a")] == [1, 2]
        assert again.runs("startup", side="b")[0]["failed"] == "b: 0 of 4 steps: no space"

    def test_figures_of_other_circumstances_are_not_mixed(self, tmp_path, capsys):
        results = Results(tmp_path / "x.json", {"train": {**FACTS, "runs": [{"repeat": 1}]}})
        results.begin("train", FACTS, again=False)
        assert results.runs("train")
        results.begin("train", {**FACTS, "commit": "def5678"}, again=False)
        assert not results.runs("train")
        assert "train: measured anew, since commit changed" in capsys.readouterr().out

    def test_a_section_that_is_done_stays(self, tmp_path, capsys, monkeypatch):
        results = Results(tmp_path / "x.json", {"train": {**FACTS, "commit": "older", "runs": []}})
        results.finish("train", 3)
        monkeypatch.setitem(bench.SECTIONS, "train", lambda here: pytest.fail("measured again"))
        assert bench.main(["train", "--repeats", "2", "--out", str(tmp_path / "x.json")]) == 0
        assert "train: is there already" in capsys.readouterr().out
        monkeypatch.setitem(bench.SECTIONS, "train", lambda here: [])
        assert bench.main(["train", "--quick", "--repeats", "2", "--out", str(tmp_path / "x.json")]) == 0
        assert "train: measured anew" in capsys.readouterr().out  # toy figures do not stand in for others

    def test_at_most_so_many_repeats(self, tmp_path):
        results = Results(tmp_path / "x.json", {})
        results.begin("startup", FACTS, again=False)
        cells = [bench.Cell({"side": "a"}, lambda: {"cpu": 1.0}, 1), bench.Cell({"side": "b"}, lambda: {"cpu": 1.0})]
        bench.measure(bench.Bench("startup", tmp_path, bench.QUICK, results), cells, 3)
        assert [len(results.runs("startup", side=side)) for side in "ab"] == [1, 3]

    def test_an_unknown_section_is_named(self, capsys):
        with pytest.raises(SystemExit):
            bench.main(["trian"])
        assert "no such section: trian" in capsys.readouterr().err


class TestTables:
    def run_of(self, side, cpu, padded=100, **more):
        return {
            "repeat": 1,
            "model": "1M",
            "side": side,
            "real": 40,
            "padded": padded,
            "cpu": cpu,
            "wall": cpu,
            **more,
        }

    def test_gains_are_held_against_padding(self):
        runs = [
            self.run_of("stock", [4.0]),
            self.run_of("ours", [1.6], padded=40),
            self.run_of("tuned", [1.6], padded=40),
            {**self.run_of("stock", [5.0]), "repeat": 2},
            {**self.run_of("ours", [2.0], padded=40), "repeat": 2},
        ]
        lines = bench_tables.train({**FACTS, "runs": runs}).splitlines()
        assert lines[2] == "| 1M | `trl sft` | 9 (8–10) | 9 (8–10) | 60.0% |  |  |  |"
        assert lines[3] == "| 1M | ours | 22 (20–25) | 22 (20–25) | 0.0% | 2.50 (2.50–2.50) | 1.00 of 2.50 | 1.00 |"
        assert "2 repeats, on 2 cores of a machine with 24 GiB, 1 thread; python 3.11, trl 1.16.0" in lines[-1]

    def test_overhead_is_that_of_undisturbed_steps(self):
        ours, tuned = ([1.02, 9.0, 1.02], [9.0, 1.02, 1.02]), ([1.0, 1.0, 7.0], [1.0, 1.0, 1.0])
        runs = [{**self.run_of("ours", cpu), "repeat": repeat} for repeat, cpu in enumerate(ours)]
        runs += [{**self.run_of("tuned, keeping", cpu), "repeat": repeat} for repeat, cpu in enumerate(tuned)]
        table = bench_tables.overhead({**FACTS, "runs": [{**run, "logging_steps": 1} for run in runs]})
        assert "| 1M | 1 | 1000.0 | 1020.0 | 2.0% | 145.3% (22.7%–268.0%) | 3 % |" in table

    def test_startup_is_held_against_stock(self):
        each = {"repeat": 1, "cache": "cold", "learns": "answers", "cpu_before_training": 5.0}
        times = {"stock": {"cpu": 90.0, "wall": 45.0}, "ours": {"cpu": 27.0, "wall": 9.0}}
        runs = [{**each, "side": side, **spent} for side, spent in times.items()]
        table = bench_tables.startup({**FACTS, "runs": runs})
        assert "| cold, 85,000 rows | answers | ours | 27.0 | 9.0 | 5.0 | 0.30 | 0.20 | 0.35 |" in table

    def test_a_failure_is_a_result(self):
        runs = [self.run_of("ours", [1.0]), {"repeat": 1, "model": "1M", "failed": "0 of 4 steps: not more in 60 s"}]
        runs = [{**run, "variant": name} for run, name in zip(runs, ("our defaults", "torch_compile"), strict=True)]
        table = bench_tables.ablation({**FACTS, "settled": {"padding_free": True}, "runs": runs})
        assert "| torch_compile | failed | failed | failed | 0 of 4 steps: not more in 60 s |" in table
        assert "Our defaults that are not stock's here: `padding_free: true`." in table

    def test_what_no_gpu_has_measured_is_said(self):
        lines = bench_tables.gpu(None).splitlines()
        assert len(lines) == 4 + len(bench_gpu.WANTED)
        assert lines[2] == (
            "| 8B, full, bf16 weights | 8,192 | not measured | not measured | not measured | MFU of 45 % on one H200 |"
        )
        assert lines[-1] == "Not measured: no GPU was at hand."

    def test_cells_of_a_gpu(self):
        done = {
            "outcome": "done",
            "tokens_per_second": 12600.4,
            "mfu": 0.46,
            "allocated_gib": 71.2,
            "step_seconds": 1.3,
            "steps": 8,
        }
        key = {"shape": "8B", "method": "LoRA, 2 rows", "context": 4096}
        runs = [{**key, "side": "ours", **done}, {**key, "side": "stock", "outcome": "out of memory"}]
        ceilings = {"TFLOP/s of bfloat16 products": 801.5}
        table = bench_tables.gpu({**FACTS, "ceilings": ceilings, "peak_flops": 989.5e12, "runs": runs})
        figures = "12,600 tokens/s, MFU 46.0%, 71 GiB, 8 x 1.30 s"
        line = f"| 8B, LoRA, 2 rows | 4,096 | {figures} | out of memory | not measured |"
        assert f"{line} 12,500 tokens/s |" in table
        assert "801.5 TFLOP/s of bfloat16 products; MFU is of 989.5 TFLOP/s" in table

    def test_the_document_says_what_the_figures_say(self):
        text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
        assert set(bench_tables.names_in(text)) == set(bench_tables.TABLES)
        assert text == bench_tables.filled(text, ROOT / "docs/performance"), "run `python scripts/bench.py table`"


class TestGpu:
    def test_flops_are_those_that_are_computed(self, tmp_path):
        bench_gpu.write_shape(tmp_path, "toy")
        model = bench_device.with_random_weights(str(tmp_path / "toy"), "float32", "eager")
        tokens = 24
        ids = torch.arange(tokens)[None]
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids, use_cache=False).loss.backward()
        # Eager attention computes all pairs: squares are given such that as many are counted.
        step = {"real": tokens, "supervised": tokens, "squares": 2 * tokens**2 - tokens}
        assert counter.get_total_flops() == bench_gpu.flops_of("toy", "full", step)
        total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
        assert bench_gpu.parameters("toy", "full") == (total, 0)
        work = work_of(model)
        assert work.token * tokens + work.label * tokens + work.pair[None] * tokens**2 == counter.get_total_flops()

    def test_lora_has_a_count_of_its_own(self):
        step = {"real": 4096, "supervised": 4096, "squares": 0}
        full, lora = (bench_gpu.flops_of("8B", method, step) for method in ("full", "LoRA"))
        assert 4 / 6 < lora / full < 4 / 6 * 1.02  # frozen weights have no gradients, adapters are small
        weights, adapters = bench_gpu.parameters("8B", "LoRA")
        assert weights == pytest.approx(8.19e9, rel=0.001)  # as its card says
        assert adapters == 43_646_976

    def test_shapes_are_those_of_the_models(self):
        assert bench_gpu.parameters("0.6B", "full")[0] == pytest.approx(0.596e9, rel=0.002)
        assert bench_gpu.parameters("1.7B", "full")[0] == pytest.approx(1.72e9, rel=0.002)

    def test_what_cannot_fit_is_not_tried(self):
        cell = bench_gpu.Cell("8B", "full", 8192, "stock")
        assert bench_gpu.too_large(cell, 80 * 2**30) == {
            "outcome": "skipped",
            "why": "takes 122 GiB of 80 without activations",
        }
        assert bench_gpu.too_large(bench_gpu.Cell("8B", "full, bf16 weights", 8192, "ours"), 80 * 2**30) is None
        assert bench_gpu.too_large(cell, None) is None

    def test_the_most_wanted_come_first_and_ours_before_tuned(self):
        assert [cell.name for cell in bench_gpu.CELLS[:2]] == [
            "8B full, bf16 weights 8k ours",
            "8B full, bf16 weights 8k stock",
        ]
        assert set(bench_tables.TARGETS) == {tuple(wanted[:3]) for wanted in bench_gpu.WANTED[:3]}
        assert {each[2] for each in bench_gpu.WANTED} >= {4096, 16384, 32768}
        for *wanted, sides in bench_gpu.WANTED:
            assert "tuned" not in sides or sides.index("ours") < sides.index("tuned"), wanted

    @pytest.mark.parametrize(
        ("said", "figures"),
        [
            ("torch.OutOfMemoryError: CUDA out of memory. Tried", {"outcome": "out of memory"}),
            ("Traceback\nValueError: no", {"outcome": "failed", "why": "0 of 2 steps: ValueError: no"}),
        ],
    )
    def test_a_cell_that_does_not_train(self, tmp_path, monkeypatch, said, figures):
        process = SimpleNamespace(stamps=tmp_path / "none")
        monkeypatch.setattr(bench_gpu, "finish", lambda *args: (None, said))
        assert bench_gpu.measured(bench_gpu.TOY[0], process, {}, 9, None) == figures

    def test_figures_of_a_cell(self, tmp_path, monkeypatch):
        begin = {"event": "begin", **BEGIN, "dtype": "bfloat16"}
        steps = [
            {**step, "supervised": 50, "squares": 2500, "allocated": 2**31} for step in steps_of(9, 5, 7, 1, 4, 1)
        ]
        stamps = tmp_path / "stamps"
        stamps.write_text("".join(json.dumps(line) + "\n" for line in (begin, *steps)))
        monkeypatch.setattr(bench_gpu, "finish", lambda *args: (None, ""))
        found = bench_gpu.measured(bench_gpu.TOY[0], SimpleNamespace(stamps=stamps), {}, 9, 1e9)
        assert found["tokens_per_second"] == 50 / 2
        assert (found["steps"], found["step_seconds"], found["seconds"]) == (3, 2.0, [2.0, 8.0, 2.0])
        assert found["mfu"] == round(bench_gpu.flops_of("toy", "full", steps[0]) / 2 / 1e9, 4) > 0
        assert (found["filled"], found["allocated_gib"]) == (round(50 / (2 * 64), 4), 2.0)
        assert "no peak" not in bench_gpu.in_words(found)
        assert found["settled"]["attn_implementation"] == "sdpa"

    def cells_of(self, tmp_path, monkeypatch, cells, outcomes, minutes=9):
        """Cells that are left, and what was written of the others, where processes give these outcomes."""
        started, ended = [], []
        monkeypatch.setattr(bench_gpu, "start", lambda work, number: started.append(number) or number)
        monkeypatch.setattr(bench_gpu, "end", ended.append)
        given = iter(outcomes)
        monkeypatch.setattr(bench_gpu, "measured", lambda *args: next(given))
        results = Results(tmp_path / "gpu.json", {"gpu": {"memory_bytes": 80 * 2**30, "runs": []}})
        left = bench_gpu.measure_cells(cells, results, tmp_path, bench_gpu.time.monotonic() + 60 * minutes, toy=False)
        assert ended == started[-1:]  # the one that waits for a cell that does not come
        return left, read_results(results.path).runs("gpu") if results.path.exists() else []

    def test_what_runs_out_of_memory_is_written_and_the_next_goes_on(self, tmp_path, monkeypatch):
        large = bench_gpu.Cell("8B", "full", 4096, "ours")
        outcomes = [{"outcome": "out of memory"}, {"outcome": "failed", "why": "no"}]
        left, runs = self.cells_of(tmp_path, monkeypatch, [large, *bench_gpu.TOY[:2]], outcomes)
        assert left == []
        assert [run["outcome"] for run in runs] == ["skipped", "out of memory", "failed"]
        assert runs[1]["side"] == "ours"

    def test_what_there_is_no_time_for_is_left_for_the_next_start(self, tmp_path, monkeypatch):
        assert self.cells_of(tmp_path, monkeypatch, bench_gpu.TOY, [], minutes=0.1) == (bench_gpu.TOY, [])

    def test_a_cell_that_is_cut_short_is_left_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bench_gpu, "SHORTEST", -1)
        cut = [{"outcome": "failed", "why": "not done in 0 s"}]
        assert self.cells_of(tmp_path, monkeypatch, bench_gpu.TOY[:1], cut, minutes=0) == (bench_gpu.TOY[:1], [])

    def test_there_must_be_a_gpu_or_a_toy(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="there is no GPU here; --toy"):
            bench_device.ceilings(toy=False)
