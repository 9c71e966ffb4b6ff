"""What a run measures of itself: token counts to the token, losses by source, seconds that add up, evaluations."""

import itertools
import json
import posixpath
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import settings, write_jsonl
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from open_r1 import metrics
from open_r1.chat import get_tokenizer
from open_r1.flops import Work
from open_r1.metrics import Clock, Collator, Meter, cut_back_metrics, evened, metric_names
from open_r1.order import order_of
from open_r1.preparation import prepare
from open_r1.recipe import load_recipe
from open_r1.sft import build_configs, main
from open_r1.trackers import without_folders

LAYOUTS = {
    "padded": {"padding_free": False},
    "padding_free": {"padding_free": True},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 48},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 96},
}
TIMED = ("seconds", "per_second", "tflops", "runtime", "memory_bytes", "time")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, conversations, pairs):
    """Three sources: 24 conversations, 16 more of which each comes twice, and 20 plain texts."""
    folder = tmp_path_factory.mktemp("sources")
    write_jsonl(folder / "a.jsonl", conversations[:24])
    write_jsonl(folder / "b (new).jsonl", conversations[24:40])
    write_jsonl(folder / "c.jsonl", [{"text": text[:300]} for _, text in pairs[40:60]])
    write_jsonl(folder / "d.jsonl", conversations[60:81])
    return folder


@pytest.fixture(scope="module")
def argv(tiny_model, sources):
    """Settings of a run on the three sources, two epochs of them."""

    def argv(out, **values):
        mixture = [
            {"id": str(sources / "a.jsonl"), "name": "talk/a"},
            {"id": str(sources / "b (new).jsonl"), "weight": 2.0, "name": "b (new)"},
            {"id": str(sources / "c.jsonl"), "name": "texts"},
        ]
        usual = {"model_name_or_path": tiny_model, "dataset_mixture": {"datasets": mixture}, "output_dir": out}
        return settings(**{**usual, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no", **values})

    return argv


def lines_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def trained(lines):
    return [line for line in lines if "loss" in line]


def prepared(argv):
    script_args, args, model_args = build_configs(load_recipe(argv))
    return prepare(script_args, args, get_tokenizer(model_args, args)), args


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request, argv, tmp_path_factory):
    """A run of two epochs in each layout: its lines, ledger, data, arguments and directory."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    values = LAYOUTS[request.param]
    rows = len(prepared(argv(out, **values))[0].train.rows)
    batch = next(size for size in (4, 3, 2, 1) if rows % size == 0)  # so that epochs are all rows
    words = argv(out, **values, per_device_train_batch_size=batch, gradient_accumulation_steps=1)
    data, args = prepared(words)
    assert main(words) == 0
    ledger = json.loads((out / "ledger.json").read_text())["train"]
    return SimpleNamespace(layout=request.param, out=out, lines=lines_of(out), ledger=ledger, data=data, args=args)


class TestTokens:
    def test_totals_are_those_of_the_ledger(self, run):
        total, [last] = run.ledger["total"], [line for line in run.lines if "train_runtime" in line]
        supervised = total["packed_supervised"] if run.args.packing else total["supervised"]
        assert last["train_real_tokens"] == 2 * total["tokens"]
        assert last["train_supervised_tokens"] == 2 * supervised
        assert trained(run.lines)[-1]["supervised_tokens"] == 2 * supervised
        assert sum(line["loss_tokens"] for line in trained(run.lines)) == 2 * supervised
        if run.layout in ("bfd_split", "wrapped"):
            assert supervised < total["supervised"]
        else:
            names = metric_names([entry["source"] for entry in run.ledger["sources"]])
            assert names == ["talk/a", "b _new_", "texts"]
            for name, entry in zip(names, run.ledger["sources"], strict=True):
                assert last[f"train_loss_tokens/{name}"] == 2 * entry["supervised"]

    def test_padded_tokens_are_the_positions_of_the_batches(self, run):
        order = order_of(run.data.train, run.args)
        steps = [order.lengths[order.batches_of(step)] for step in range(1, 2 * order.steps + 1)]
        flat = run.args.padding_free or (run.args.packing and run.layout != "wrapped")
        padded = [each.sum() if flat else each.max(axis=1).sum() * each.shape[1] for each in steps]
        expected = np.cumsum(padded)
        assert [line["padded_tokens"] for line in trained(run.lines)] == expected.tolist()
        real = np.cumsum([each.sum() for each in steps])
        assert [line["real_tokens"] for line in trained(run.lines)] == real.tolist()
        for line, each, positions in zip(trained(run.lines), steps, padded, strict=True):
            share = 1 - each.sum() / positions
            assert line["padding_share"] == pytest.approx(share)
        assert flat or any(line["padding_share"] > 0.1 for line in trained(run.lines)) or run.layout == "wrapped"

    def test_they_are_those_of_the_rows_by_source(self, run):
        """Counted once more, from the prepared rows alone."""
        expected = np.zeros(3, dtype=int)
        for row in run.data.train.rows:
            of = np.repeat(row["source"], row["lengths"] if run.args.packing else len(row["labels"]))
            counted = np.array(row["labels"]) != -100
            starts = np.cumsum([0, *row.get("seq_lengths", [])[:-1]])
            counted[starts] = False
            expected += np.bincount(of[counted], minlength=3)
        last = run.lines[-1]
        found = [last[f"train_loss_tokens/{name}"] for name in metric_names(run.data.train.sources)]
        assert found == (2 * expected).tolist()


class TestLosses:
    def test_those_of_the_sources_come_to_the_loss_that_is_learnt_from(self, run):
        assert len(trained(run.lines)) > 10
        for line in trained(run.lines):
            names = [key.removeprefix("loss/") for key in line if key.startswith("loss/")]
            tokens = [line[f"loss_tokens/{name}"] for name in names]
            assert sum(tokens) == line["loss_tokens"]
            total = sum(line[f"loss/{name}"] * count for name, count in zip(names, tokens, strict=True))
            assert total / line["loss_tokens"] == pytest.approx(line["loss"], rel=1e-6)  # float32

    def test_the_last_line_has_means_over_the_run(self, run):
        for name in metric_names(run.data.train.sources):
            lines = [line for line in trained(run.lines) if f"loss/{name}" in line]
            total = sum(line[f"loss/{name}"] * line[f"loss_tokens/{name}"] for line in lines)
            last = run.lines[-1]
            assert last[f"train_loss/{name}"] * last[f"train_loss_tokens/{name}"] == pytest.approx(total, rel=1e-9)

    def test_they_are_what_each_source_alone_would_have(self, argv, tiny_model, tmp_path):
        """In the first step, on weights that anybody can load."""
        out = tmp_path / "run"
        words = argv(out, packing=True, max_steps=1, per_device_train_batch_size=3)
        data, args = prepared(words)
        assert main(words) == 0
        [line] = trained(lines_of(out))
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        sums, counts = np.zeros(3), np.zeros(3, dtype=int)
        for number in order_of(data.train, args).of_step(1).tolist():
            row = data.train.rows[number]
            bounds = np.cumsum([0, *row["seq_lengths"]])
            for source, start, stop in zip(row["source"], bounds[:-1], bounds[1:], strict=True):
                loss, labels = alone(model, row["input_ids"][start:stop], row["labels"][start:stop])
                sums[source] += loss
                counts[source] += labels
        names = metric_names(data.train.sources)
        found = {name: line[f"loss_tokens/{name}"] for name in names if f"loss/{name}" in line}
        assert found == {name: count for name, count in zip(names, counts, strict=True) if count}
        assert len(found) > 1
        for number, name in enumerate(names):
            if name in found:
                assert line[f"loss/{name}"] == pytest.approx(sums[number] / counts[number], abs=1e-5)

    @pytest.mark.parametrize(
        "values", [{"loss_type": "dft"}, {"use_peft": True, "lora_target_modules": "all-linear"}], ids=["dft", "lora"]
    )
    def test_they_are_log_likelihoods_whatever_is_learnt_from(self, argv, tmp_path, values):
        common = {"max_steps": 1, "gradient_accumulation_steps": 3, "save_strategy": "no"}
        for name, more in (("plain", {}), ("other", values)):
            assert main(argv(tmp_path / name, **common, **more)) == 0
        plain, other = (trained(lines_of(tmp_path / name))[0] for name in ("plain", "other"))
        keys = [key for key in plain if key.startswith(("loss/", "loss_tokens"))]
        assert len(keys) > 3
        for key in keys:
            assert other[key] == pytest.approx(plain[key], abs=1e-6), key
        assert (other["loss"] == pytest.approx(plain["loss"], abs=1e-3)) == ("loss_type" not in values)


def alone(model, ids, labels):
    """Negative log-likelihood and number of the labels of one document."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    labels = torch.tensor(labels[1:])
    return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")), int((labels != -100).sum())


class TestTime:
    def test_a_step_is_waiting_computing_and_the_rest(self, run):
        for line in trained(run.lines):
            parts = [line[f"{kind}_seconds"] for kind in ("data", "compute", "other")]
            assert line["step_seconds"] == pytest.approx(sum(parts))
            assert min(parts) > 0
            for key in ("padded_tokens", "real_tokens"):
                before = next((each for each in trained(run.lines)[::-1] if each["step"] == line["step"] - 1), {})
                rate = (line[key] - before.get(key, 0)) / line["step_seconds"]
                assert line[f"{key}_per_second"] == pytest.approx(rate)

    def test_all_kinds_come_to_the_time_of_the_run(self, argv, tmp_path, monkeypatch):
        """With evaluations and saves, which are no part of a step, and slow batches, which are one of its parts."""
        call = Collator.torch_call

        def slow(self, examples):
            time.sleep(0.02)
            return call(self, examples)

        monkeypatch.setattr(Collator, "torch_call", slow)
        words = argv(tmp_path / "run", max_steps=8, save_strategy="steps", save_steps=4, eval_strategy="steps")
        words += ["--eval_steps", "4", "--eval_datasets", json.dumps({"id": str(sources_of(words) / "d.jsonl")})]
        assert main(words) == 0
        last = next(line for line in lines_of(tmp_path / "run") if "train_runtime" in line)
        kinds = {kind: last[f"train_{kind}_seconds"] for kind in metrics.KINDS}
        assert sum(kinds.values()) == pytest.approx(last["train_runtime"], rel=0.05, abs=0.05)
        assert kinds["data"] > 8 * 0.02
        assert kinds["evaluation"] > 2 * 11 * 0.02 and kinds["saving"] > 0
        steps = sum(line["step_seconds"] for line in trained(lines_of(tmp_path / "run")))
        in_all = sum(kinds[kind] for kind in metrics.STEP)
        assert steps <= in_all < steps + 1
        speed = last["train_real_tokens"] / in_all
        assert last["train_real_tokens_per_second"] == pytest.approx(speed)

    def test_on_cuda_a_step_ends_when_the_device_has_done_it(self, monkeypatch):
        """The host is ahead: what it waits for behind the step was still computing."""

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = time.perf_counter()

            def elapsed_time(self, other):
                return 1000 * (other.at - self.at) + 40  # the kernels took 40 ms more

        monkeypatch.setattr(torch.cuda, "Event", Event)
        clock = Clock(torch.device("cuda"))
        clock.lap()
        begun = time.perf_counter()
        clock.begin()
        clock.end()
        time.sleep(0.06)  # a sum over processes, which the device must come to
        clock.settle()
        lap = clock.lap()
        whole = time.perf_counter() - begun
        assert lap["compute"] == pytest.approx(0.04, abs=0.005)
        assert lap["other"] == pytest.approx(whole - 0.04, abs=0.005)


def sources_of(words):
    """The folder of the sources of a command line."""
    mixture = json.loads(words[words.index("--dataset_mixture") + 1])
    return Path(mixture["datasets"][0]["id"]).parent


class TestFlops:
    def test_of_a_run(self, run, tiny_model, monkeypatch):
        """Of documents, by their lengths, and of labels; against a device of a known peak."""
        work = Work(token=7.0, label=3.0, pair={None: 2.0})
        lengths = [row.get("seq_lengths", [len(row["input_ids"])]) for row in run.data.train.rows]
        expected = [sum(7 * n + 2 * n * (n + 1) / 2 for n in each) for each in lengths]
        device = torch.device("cpu")
        meter = Meter(run.data.train, None, work, 1e12, device, lambda mine: mine.repeat(2, 1))
        assert meter.flops.tolist() == pytest.approx(expected)
        rows = np.array([0, 1])
        meter.read([{"input_ids": torch.zeros(2, 5)}], rows)
        meter.sums[1, 0] = 10
        found = meter.of_window()
        total = 2 * (sum(expected[:2]) + 3 * 10)  # two processes that did the same
        assert found["tflops"] * 1e12 * 2 * found["step_seconds"] == pytest.approx(total)
        assert found["mfu"] == pytest.approx(found["tflops"])
        assert found["padded_tokens"] == 20

    def test_a_cpu_has_no_peak_and_trackers_are_not_told(self, run):
        state = json.loads((run.out / "trainer_state.json").read_text())
        assert all(line["mfu"] is None for line in trained(run.lines))
        assert not [key for entry in state["log_history"] for key in entry if key.endswith("mfu")]
        assert all(line["tflops"] > 0 and line["peak_memory_bytes"] > 2**20 for line in trained(run.lines))


class TestTheFile:
    def test_it_is_what_was_logged(self, run):
        state = json.loads((run.out / "trainer_state.json").read_text())
        assert len(state["log_history"]) == len(run.lines)
        for entry, line in zip(state["log_history"], run.lines, strict=True):
            assert {key: line[key] for key in entry} == entry
            assert set(line) - set(entry) <= {"time", "mfu", "train_mfu"}
        times = [line["time"] for line in run.lines]
        assert times == sorted(times)

    def test_results_and_manifest_have_the_end_of_the_run(self, run):
        results = json.loads((run.out / "train_results.json").read_text())
        manifest = json.loads((run.out / "manifest.json").read_text())["results"]
        for key in ("train_real_tokens", "train_data_seconds", "train_loss/texts", "train_padding_share"):
            assert results[key] == manifest[key] == run.lines[-1][key]

    def test_it_is_cut_back_to_the_logs_that_a_checkpoint_knows(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        history = [{"loss": 1.0, "step": 1}, {"eval_loss": float("nan"), "step": 1}, {"loss": 2.0, "step": 2}]
        lines = [{**entry, "time": 5.0 + number, "mfu": None} for number, entry in enumerate(history)]
        lines[1]["eval_loss"] = None
        more = [{"eval_loss": 3.0, "step": 2, "time": 9.0}, {"loss": 4.0, "step": 3, "time": 10.0}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines + more) + '{"loss": 5')
        cut_back_metrics(path, 2, history)
        assert [json.loads(line) for line in path.read_text().splitlines()] == lines
        path.write_text("")
        cut_back_metrics(path, 2, history)  # as in another output_dir
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1, 2]
        cut_back_metrics(path, 0, [])
        assert path.read_text() == ""


def untimed(lines):
    return [{key: value for key, value in line.items() if not key.endswith(TIMED)} for line in lines]


class TestGoingOn:
    @pytest.mark.parametrize("layout", ["padded", "bfd"])
    @pytest.mark.parametrize(
        ("died", "evaluates"), [(5, False), (8, True)], ids=["in a window", "behind an evaluation"]
    )
    def test_a_window_that_was_broken_off(self, argv, sources, tmp_path, stop_at, layout, died, evaluates):
        values = {**LAYOUTS[layout], "max_steps": 10, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
        values["gradient_accumulation_steps"] = 2
        if evaluates:
            values |= {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "do_eval": True}
            values["eval_datasets"] = {"id": str(sources / "d.jsonl")}
        assert main(argv(tmp_path / "whole", **values)) == 0
        stop_at(died)
        with pytest.raises(KeyboardInterrupt):
            main(argv(tmp_path / "torn", **values))
        stop_at(None)
        assert main(argv(tmp_path / "torn", **values)) == 0
        whole, torn = (untimed(lines_of(tmp_path / name)) for name in ("whole", "torn"))
        assert torn == whole
        assert len(trained(whole)) == 2

    def test_with_other_processes_and_other_sources(self, run):
        """What a checkpoint's processes counted is counted once; what is of no source any more stays in the sum."""
        device, work = torch.device("cpu"), Work(1.0, 1.0, {})
        meters = [Meter(run.data.train, None, work, None, device, lambda mine: mine) for _ in range(3)]
        for number, meter in enumerate(meters[:2]):
            meter.counts += (number + 1, number + 1, 0)
            meter.sums += number + 1
            meter.names = ["gone", "b _new_", "talk/a"]
        saved = [json.loads(json.dumps(meter.state())) for meter in meters[:2]]
        meters[2].clock.seconds["evaluation"] = 5.0  # the trial of the model, which comes before
        meters[2].restore(saved, 0, 1)
        assert meters[2].clock.seconds["evaluation"] == 5.0 + saved[0]["seconds"]["evaluation"]
        assert meters[2].counts.tolist() == [3, 3, 0]
        assert meters[2].sums.tolist() == [[3, 3, 0, 6]] * 2  # talk/a, b, texts, and what is gone
        meters[2].restore(saved, 1, 3)
        assert meters[2].counts.sum() == 0 and meters[2].sums.sum() == 0
        meters[0].restore(saved, 0, 2)
        assert meters[0].counts.tolist() == [1, 1, 0]


class TestEvaluation:
    @pytest.fixture(scope="class")
    def sets(self, sources, tmp_path_factory, conversations, pairs):
        """Two sets of rows of very different length, 21 and 12 of them."""
        texts = [{"text": text[:600]} for _, text in pairs[100:112]]
        path = write_jsonl(tmp_path_factory.mktemp("sets") / "long texts.jsonl", texts)
        return [{"id": str(sources / "d.jsonl"), "name": "talk"}, {"id": path}]

    @pytest.fixture(scope="class")
    def values(self, sets):
        return {"eval_datasets": [json.dumps(each) for each in sets], "eval_on_start": True, "eval_strategy": "epoch"}

    @pytest.fixture(scope="class")
    def expected(self, argv, values, tiny_model, tmp_path_factory):
        """Loss and tokens of each set, computed document by document with the model as it is at first."""
        data, _ = prepared(argv(tmp_path_factory.mktemp("none"), **values))
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        sums, counts = np.zeros(2), np.zeros(2, dtype=int)
        for row in data.eval.unpacked:
            loss, labels = alone(model, row["input_ids"], row["labels"])
            sums[row["source"]] += loss
            counts[row["source"]] += labels
        return metric_names(data.eval.sources), sums, counts

    @pytest.mark.parametrize("layout", ["padded", "padding_free", "bfd"])
    @pytest.mark.parametrize("batch", [1, 3, 8])
    def test_the_loss_is_that_of_all_tokens_for_any_batch(self, argv, values, expected, tmp_path, layout, batch):
        names, sums, counts = expected
        words = argv(tmp_path / "run", **values, **LAYOUTS[layout], max_steps=1, per_device_eval_batch_size=batch)
        assert main(words) == 0
        first = next(line for line in lines_of(tmp_path / "run") if "eval_loss" in line)
        assert first["eval_loss"] == pytest.approx(sums.sum() / counts.sum(), abs=1e-5)
        assert first["eval_loss_tokens"] == counts.sum()
        for name, loss, count in zip(names, sums, counts, strict=True):
            assert first[f"eval_loss/{name}"] == pytest.approx(loss / count, abs=1e-5)
            assert first[f"eval_loss_tokens/{name}"] == count
        ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["eval"]
        assert [entry["supervised"] for entry in ledger["sources"]] == counts.tolist()
        results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
        assert results[f"eval_loss/{names[0]}"] == lines_of(tmp_path / "run")[-1][f"eval_loss/{names[0]}"]

    @pytest.mark.parametrize("ranks", [2, 3])
    @pytest.mark.parametrize("batch", [1, 4])
    def test_no_row_is_dealt_out_twice(self, argv, values, tmp_path, ranks, batch):
        part = prepared(argv(tmp_path, **values, packing=True, max_length=128))[0].eval
        rows = evened(part, ranks * batch)
        batches = BatchSampler(SequentialSampler(range(len(rows))), batch, drop_last=False)
        dealt = [list(BatchSamplerShard(batches, ranks, rank)) for rank in range(ranks)]
        assert len({len(each) for each in dealt}) == 1
        numbers = sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(dealt)))
        assert numbers == list(range(len(rows)))
        assert rows[: len(part.rows)] == part.rows[:]
        filling = rows[len(part.rows) :]
        assert {source for each in filling["source"] for source in each} <= {2}
        assert set(map(len, filling["input_ids"])) <= {int(part.lengths.min())}

    def test_rows_that_fill_a_batch_are_not_counted(self, argv, values, expected, tmp_path, monkeypatch):
        """As with several processes: 33 rows and 7 more, in batches of 8."""
        monkeypatch.setattr("open_r1.trainer.evened", lambda part, batch: evened(part, 8))
        names, sums, counts = expected
        assert main(argv(tmp_path / "run", **values, max_steps=1, per_device_eval_batch_size=8)) == 0
        first, *_ = lines_of(tmp_path / "run")
        assert first["eval_samples_per_second"] / first["eval_steps_per_second"] == pytest.approx(8, rel=0.01)
        assert first["eval_loss_tokens"] == counts.sum()
        assert first["eval_loss"] == pytest.approx(sums.sum() / counts.sum(), abs=1e-5)
        assert first[f"eval_loss/{names[1]}"] == pytest.approx(sums[1] / counts[1], abs=1e-5)

    def test_nothing_is_left_out_where_training_drops_the_last_batch(self, argv, values, expected, tmp_path):
        names, sums, counts = expected
        words = argv(tmp_path / "run", **values, max_steps=1, per_device_eval_batch_size=8, dataloader_drop_last=True)
        assert main(words) == 0
        assert lines_of(tmp_path / "run")[0]["eval_loss_tokens"] == counts.sum()

    @pytest.mark.parametrize("metric", ["eval_loss", "eval_loss/talk", "loss/talk"])
    def test_the_best_model_is_told_by_it(self, argv, values, tmp_path, metric):
        more = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        best = {"metric_for_best_model": metric, "load_best_model_at_end": True, "learning_rate": 0.3}
        best |= {"early_stopping_patience": 1, "max_grad_norm": 1e9, "optim": "sgd"}
        assert main(argv(tmp_path / "run", **{**values, **more, **best})) == 0
        state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
        key = f"eval_{metric.removeprefix('eval_')}"
        found = {line["step"]: line[key] for line in lines_of(tmp_path / "run") if key in line and line["step"]}
        assert state["best_metric"] == min(found.values())
        assert found[state["best_global_step"]] == min(found.values())
        last = [line for line in lines_of(tmp_path / "run") if key in line][-1]
        assert (last["step"], last[key]) == (state["best_global_step"], state["best_metric"])
        epochs = {line["step"]: line["epoch"] for line in trained(lines_of(tmp_path / "run"))}
        assert last["epoch"] == pytest.approx(epochs[last["step"]])

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"metric_for_best_model": "loss/talks"}, "loss/talks is not measured; what is evaluated is eval_loss, "),
            ({"eval_dataset_name": "x.jsonl"}, "eval_datasets is set too; make this one of its datasets"),
            ({"eval_strategy": "no", "eval_on_start": None}, "nothing evaluates on it"),
            ({"eval_datasets": '{"id": "x.jsonl", "weight": 2}'}, "x.jsonl: weight says nothing here"),
            ({"eval_datasets": '{"id": "x.jsonl", "test_split": "t"}'}, "the split to evaluate on is split"),
            ({"eval_datasets": '{"id": "x.jsonl", "splitt": "t"}'}, "did you mean split"),
            ({"eval_datasets": '{"split": "t"}'}, "a source needs an id"),
            ({"eval_datasets": '{"id": "/no/where.jsonl"}'}, "/no/where.jsonl: no such file or directory"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, argv, values, tmp_path, monkeypatch, capsys, more, says):
        monkeypatch.setattr("open_r1.model.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("load"))
        assert main(argv(tmp_path / "run", **{**values, **more})) == 2
        assert says in capsys.readouterr().err

    def test_test_split_size_beside_it_is_refused(self, tiny_model, sources, sets, tmp_path, capsys):
        values = {"dataset_name": str(sources / "a.jsonl"), "test_split_size": 4, "eval_strategy": "epoch"}
        words = settings(model_name_or_path=tiny_model, output_dir=tmp_path / "run", **values, eval_datasets=sets[0])
        assert main(words) == 2
        assert "evaluation data is given twice: by eval_datasets and by test_split_size" in capsys.readouterr().err

    def test_rows_that_ask_what_any_of_them_asks_are_dropped(self, argv, sources, tmp_path):
        sets = [json.dumps({"id": str(sources / name)}) for name in ("d.jsonl", "a.jsonl", "c.jsonl")]
        values = {"eval_datasets": sets, "eval_strategy": "epoch"}
        ledger = prepared(argv(tmp_path, **values))[0].train.ledger
        assert ledger["asked_in_eval"] >= 24 + 20
        ledger = prepared(argv(tmp_path, **values, dedup=True))[0].train.ledger
        assert ledger["asked_in_eval"] == 0
        assert [entry["dropped"].get("asked in the evaluation data") for entry in ledger["sources"][::2]] == [24, 20]
        assert ledger["sources"][1]["trained"] > 0


class TestNames:
    def test_they_are_taken_by_every_tracker_and_told_apart(self):
        sources = [
            *(
                "data/x.jsonl:train",
                "/abs/../x.jsonl:train",
                "a//b",
                "a.b",
                "A/b",
                "",
                "..",
                "x #1",
                "x #2",
                "größe|1",
            ),
            *("größe?1", "n" * 300, "n" * 301),
        ]
        names = metric_names(sources)
        assert names[:4] == ["data/x.jsonl:train", "abs/x.jsonl:train", "a/b", "a.b 2"]
        assert len({name.lower() for name in names}) == len(sources)
        assert len({name.replace("/", ".").lower() for name in names}) == len(sources)
        for name in names:
            key = f"eval_loss_tokens/{name}"
            assert re.fullmatch(r"[/\w.\- :]*", key, re.ASCII), key  # what MLflow takes
            assert posixpath.normpath(key) == key and len(key) <= 250

    def test_one_name_is_one_source_in_all_parts_and_another_is_another(self, argv, sources, tmp_path):
        assert metric_names(["物理", "same", "数学", "same"]) == ["__", "same", "__ 2", "same"]
        sets = [json.dumps({"id": str(sources / "d.jsonl"), "name": name}) for name in ("b [new]", "texts")]
        data, _ = prepared(argv(tmp_path, eval_datasets=sets, eval_strategy="epoch"))
        keys = [{entry["source"]: entry["metric"] for entry in part.ledger["sources"]} for part in data.parts.values()]
        assert keys[0] == {"talk/a": "talk/a", "b (new)": "b _new_", "texts": "texts"}
        assert keys[1] == {"b [new]": "b _new_ 2", "texts": "texts"}

    def test_a_tracker_that_keeps_files_gets_no_folders(self, tmp_path):
        class DVCLiveCallback(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                for key, value in logs.items():
                    (tmp_path / key).write_text(str(value))

        class Other(DVCLiveCallback):
            pass

        logs = {"loss": 1.0, "loss/a/b": 2.0, "loss/a": 3.0}
        tracker, other = DVCLiveCallback(), Other()
        without_folders([tracker, other])
        tracker.on_log(None, None, None, model=None, logs=logs)
        assert {path.name for path in tmp_path.iterdir()} == {"loss", "loss.a", "loss.a.b"}
        with pytest.raises(OSError):
            other.on_log(None, None, None, logs=logs)

    def test_a_tracker_is_told_all_that_is_in_the_file(self, argv, sources, tmp_path, monkeypatch):
        told = []

        class Tracker(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                told.append(dict(logs))

        monkeypatch.setattr("open_r1.callbacks.get_callbacks", lambda args: [Tracker()])
        values = {"eval_datasets": {"id": str(sources / "d.jsonl")}, "eval_strategy": "steps", "eval_steps": 2}
        assert main(argv(tmp_path / "run", **values, max_steps=2)) == 0
        lines = lines_of(tmp_path / "run")
        assert len(told) == len(lines) == 5
        for logs, line in zip(told, lines, strict=True):
            assert None not in logs.values()
            assert logs == {key: line[key] for key in logs}
            assert {key for key, value in line.items() if value is not None} - logs.keys() == {"step", "time"}


class TestCollator:
    def test_it_is_trls_and_says_where_tokens_are_from(self):
        rows = [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "source": 1},
            {"input_ids": [4, 5], "labels": [-100, 5], "source": 0},
        ]
        stock = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=4)
        ours = Collator(**vars(stock))
        expected, found = stock(rows), ours(rows)
        assert found.pop("sources").tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
        assert all(torch.equal(found[key], expected[key]) for key in expected) and found.keys() == expected.keys()
        assert "sources" not in ours([{key: row[key] for key in ("input_ids", "labels")} for row in rows])

    @pytest.mark.parametrize("flat", [True, False])
    def test_documents_of_packs(self, flat):
        rows = [
            {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "source": [2, 0], "lengths": [1, 2]},
            {"input_ids": [4, 5], "labels": [4, 5], "source": [1], "lengths": [2]},
        ]
        if flat:
            rows = [{**row, "seq_lengths": row["lengths"]} for row in rows]
        found = Collator(pad_token_id=0, padding_free=flat)(rows)["sources"]
        assert found.tolist() == ([[2, 0, 0, 1, 1]] if flat else [[2, 0, 0], [1, 1, 0]])
        assert found.dtype == torch.int32


def test_two_sources_of_one_name(tiny_model, sources, tmp_path):
    part = {"id": str(sources / "a.jsonl"), "name": "a"}
    values = {"dataset_mixture": {"datasets": [{**part, "max_samples": 4}, part]}, "max_steps": 7}
    assert main(settings(model_name_or_path=tiny_model, output_dir=tmp_path / "run", **values)) == 0
    last = lines_of(tmp_path / "run")[-1]
    entries = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]["sources"]
    found = {key: value for key, value in last.items() if key.startswith("train_loss_tokens/")}
    assert set(found) == {"train_loss_tokens/a 1", "train_loss_tokens/a 2"}
    assert sum(found.values()) < sum(entry["supervised"] for entry in entries)
    assert shutil.disk_usage(tmp_path).free > 0
