"""The report shows what the files of a run say and nothing else; data cannot change the page; it never stops a run."""

import ast
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import report as script
from conftest import ROOT, losses, settings, write_jsonl
from huggingface_hub.utils import filter_repo_objects

from open_r1 import figures, report, run_files, run_tables
from open_r1.callbacks import PUSHED, Report
from open_r1.errors import UserError
from open_r1.ledger import histogram_of, last_in_bin
from open_r1.recipe import load_recipe, read_back, written_out
from open_r1.sft import main
from open_r1.views import Token, stretches

HOSTILE = "</script><img src=x onerror=alert(1)><!--"
SECRET = "w4ndb" + "0123456789abcdef" * 2
FILES = ("metrics.jsonl", "ledger.json", "run_state.json", "samples.jsonl", "loss_spikes.jsonl")


class Page(HTMLParser):
    """What a browser makes of a page: tags, attributes, numbers as (text, value, source), figures, headings, text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.numbers, self.inside, self.texts, self.data = [], [], [], [], [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        self.figures = json.loads(self.data or "[]")
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in ("meta", "img", "wbr"):
            self.inside.append((tag, dict(attributes)))
        if tag == "data":
            found = dict(attributes)
            self.numbers.append([float(found["value"]), found["data-from"], ""])

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, text):
        tag, attributes = self.inside[-1] if self.inside else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data += text
        elif tag == "data":
            self.numbers[-1][2] += text
        if tag not in ("script", "style"):
            self.texts.append(text)


def at(folder, source):
    """The number that a source like `metrics.jsonl:3#loss` or `ledger.json#train/total/tokens` names."""
    file, _, path = source.partition("#")
    name, _, line = file.partition(":")
    assert name in FILES
    text = (folder / name).read_text(encoding="utf-8")
    value = json.loads(text.splitlines()[int(line) - 1] if line else text)
    for key in path.split("/") if not line else [path]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return sum(value.values()) if isinstance(value, dict) else value


def read(text):
    """A number as the page writes it, and half of its last digit."""
    scale = 1.0
    words = text.replace(",", "")
    for unit, size in ((" GiB", 2**30), ("%", 0.01), (" h", 3600), (" s", 1)):
        if words.endswith(unit):
            words, scale = words.removesuffix(unit), size
            break
    if " min" in text:
        minutes, _, rest = words.partition(" min")
        hours, _, minutes = minutes.rpartition("h")
        return 3600 * float(hours or 0) + 60 * float(minutes) + float(rest or 0), 60 if hours else 1
    mantissa, _, power = words.partition("e")
    digits = len(mantissa.partition(".")[2])
    exact = scale * 10 ** (int(power or 0) - digits)
    return float(words) * scale, exact if "." in words or len(mantissa) < 4 else max(exact, abs(float(words)) * 1e-3)


def metrics_of(out):
    """Lines as `metrics.jsonl` has them, for a run that was logged: what is not measured here is made up."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    sources = [entry["source"] for entry in json.loads((out / "ledger.json").read_text())["train"]["sources"]]
    draw, tokens, lines = random.Random(0), 0, []
    for entry in history:
        line = {**entry, "time": 1.7e9 + entry["step"]}
        if "loss" in entry:
            tokens += draw.randrange(300, 500)
            seconds = 0.2 + draw.random()
            line |= {"padded_tokens": tokens * 2, "real_tokens": tokens, "supervised_tokens": tokens // 2}
            line |= {f"{kind}_tokens_per_second": tokens * draw.random() for kind in ("padded", "real", "supervised")}
            line |= {"padding_share": draw.random(), "step_seconds": seconds, "data_seconds": seconds / 8}
            line |= {"compute_seconds": seconds / 2, "other_seconds": 3 * seconds / 8, "mfu": None, "tflops": 0.01}
            line |= {"peak_memory_bytes": draw.randrange(10**9, 2 * 10**9), "loss_tokens": 100}
            line |= {f"loss/{name}": entry["loss"] + draw.random() for name in sources}
        elif "eval_loss" in entry:
            line |= {f"eval_loss/{name}": entry["eval_loss"] + draw.random() for name in sources}
        elif "train_runtime" in entry:
            line |= {f"train_{kind}_seconds": draw.random() for kind in run_tables.TIMES}
            line |= {"train_real_tokens": tokens, "train_supervised_tokens": tokens // 2, "train_mfu": None}
            line |= {f"train_loss/{name}": draw.random() for name in sources}
            line |= {f"train_loss_tokens/{name}": draw.randrange(1000) for name in sources}
        lines.append(line)
    return lines


def write_metrics(out):
    """Write them where the run has written none."""
    if not (out / "metrics.jsonl").exists():
        write_jsonl(out / "metrics.jsonl", metrics_of(out))


@pytest.fixture(scope="module")
def argv(tmp_path_factory, tiny_model, conversations):
    """The command line of two sources whose names, rows and settings try to be markup, a secret among the rows."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{HOSTILE} {n}"},
                {"role": "assistant", "content": f"{HOSTILE}{n}"},
            ]
        }
        for n in range(40)
    ]
    empty = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": ""}]}
    first = write_jsonl(folder / "first.jsonl", [*rows, empty])
    second = write_jsonl(folder / "second.jsonl", conversations[:60])

    def argv(out, **values):
        quick = {
            "model_name_or_path": tiny_model,
            "dataset_mixture": {
                "datasets": [{"id": first, "name": f"a/{HOSTILE}"}, {"id": second, "name": "b"}],
                "test_split_size": 0.2,
            },
            "on_bad_row": "drop",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "max_steps": 4,
            "output_dir": out,
            "run_name": HOSTILE,
            "sample_prompts": ["Who are you?", {"messages": [{"role": "user", "content": HOSTILE}]}],
            "sample_tokens": 5,
        }
        given = settings(**{**quick, **values})
        at = given.index("--sample_prompts") if "--sample_prompts" in given else None
        if at is not None:
            given[at + 2] = json.dumps(quick["sample_prompts"][1])
        return given

    return argv


@pytest.fixture(scope="module")
def run(argv, tmp_path_factory):
    """A finished run with its report, a spike and a secret in its files."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(argv(out)) == 0
    write_metrics(out)
    spike = {"step": 3, "loss": 9.87654, "median": 1.5, "place": HOSTILE, "excerpt": f"{SECRET} \x1b[2J"}
    write_jsonl(out / "loss_spikes.jsonl", [spike])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        report.write(out)
    return out


@pytest.fixture
def page(run):
    return Page(run / "report.html")


def test_every_number_is_where_the_page_says(run, page):
    assert len(page.numbers) > 80
    for value, source, text in page.numbers:
        assert value == at(run, source), source
        shown, exact = read(text)
        assert shown == pytest.approx(value, abs=exact), (source, text, value)
    sources = {source.partition("#")[0].partition(":")[0] for _, source, _ in page.numbers}
    assert sources == {*FILES}
    assert "Where the time went" in page.text and "of tokens" in page.text


def test_every_plotted_number_is_in_its_file(run, page):
    titles = [figure["title"] for figure in page.figures]
    assert {"Loss", "Loss by source", "Learning rate", "Gradient norm", "Peak memory"} <= {*titles}
    assert {"Row lengths, train", "Row lengths, eval", "Seconds of a step", "Padding"} <= {*titles}
    assert "Model FLOPs utilisation" not in titles  # null on a CPU
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for series in (series for figure in page.figures for series in figure["series"]):
        assert len(series["x"]) == len(series["y"]) > 0
        if series["file"] == "metrics.jsonl":
            logged = [(line["step"], line[series["key"]]) for line in lines if series["key"] in line]
            assert list(zip(series["x"], series["y"], strict=True)) == logged
        else:
            counts = json.loads((run / "ledger.json").read_text())
            for key in series["key"].split("/"):
                counts = counts[int(key)] if isinstance(counts, list) else counts[key]
            bars = dict(zip(map(str, series["x"]), series["y"], strict=True))
            assert {first: rows for first, rows in bars.items() if rows} == counts
    assert len(page.figures) == page.tags.count("figure")


def test_losses_are_those_of_the_run(run, page):
    loss, evaluated = next(figure for figure in page.figures if figure["title"] == "Loss")["series"]
    assert loss["y"] == losses(run) and evaluated["y"] == losses(run, "eval_loss")


def test_data_cannot_become_markup_or_script(run, page):
    assert "img" not in page.tags and page.tags.count("script") == 3
    assert not [each for each in page.attributes if each[1].startswith("on") or each[1] in ("src", "srcdoc", "action")]
    assert {value[0] for tag, name, value in page.attributes if name == "href"} == {"#"}
    nonces = {value for tag, name, value in page.attributes if name == "nonce"}
    policy = next(
        value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "src" in value
    )
    assert len(nonces) == 1 and f"script-src 'nonce-{nonces.pop()}'" in policy and "default-src 'none'" in policy
    assert page.text.count(HOSTILE) >= 8  # rows, source names, settings, prompts, places: all as text
    assert "<U+001B>[2J" in page.text and "\x1b" not in page.text


def test_two_pages_have_other_nonces(run, tmp_path):
    texts = [report.write(run, tmp_path / name).read_text() for name in ("one.html", "two.html")]
    assert texts[0] != texts[1] and len(texts[0]) == len(texts[1])


def test_secrets_are_masked(run, page):
    assert SECRET in (run / "loss_spikes.jsonl").read_text()
    assert SECRET not in (run / "report.html").read_text() and "*** <U+001B>" in page.text


def test_what_is_learnt_is_coloured(run, page):
    rows = json.loads((run / "train_samples.json").read_text())
    assert [source["source"] for source in rows] == [f"a/{HOSTILE}", "b"]
    said = [text for source in rows for sample in source["samples"] for text, said in sample["stretches"] if said]
    assert len(said) == 4 and said[0].startswith(HOSTILE) and said[0].endswith("<|im_end|>")
    assert all(text in page.text for text in said)


def test_stretches_are_the_tokens():
    tokens = [
        Token(0, "a", False),
        Token(1, "", False),
        Token(2, "b", True),
        Token(3, "c", True),
        Token(4, "d", False),
    ]
    assert stretches(tokens) == [("a", False), ("bc", True), ("d", False)]
    assert stretches([]) == []


def test_recipe_with_origins_and_defaults(run, page):
    text = (run / "recipe.yaml").read_text()
    values, origin, left = read_back(text)
    assert values["max_steps"] == 4 and origin["max_steps"] == "command line" and left["weight_decay"] == 0.0
    assert {*values} == {*origin}
    for words in ("max_steps", "weight_decay", "command line"):
        assert words in page.text


def test_a_recipe_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        'model_name_or_path: "a  # b"\ndataset_name: x.jsonl\nsystem_prompt: |\n  two: lines\n  # Defaults\n'
        "learning_rate: 1e-5\n"
    )
    recipe = load_recipe(["--config", str(path), "--max_steps", "3"])
    values, origin, left = read_back(written_out(recipe))
    assert values == recipe.values and origin == recipe.origin
    assert left["adam_beta1"] == 0.9


def test_hardware_versions_and_cost(run, page):
    state = json.loads((run / "run_state.json").read_text())
    [(device, spent)] = state["device_seconds"].items()
    assert device.startswith("CPU") and spent > 0
    assert [value for value, source, _ in page.numbers if source.startswith("run_state.json#device_seconds")] == [
        spent
    ]
    assert state["versions"]["torch"] in page.text and "Hardware" in page.text


def test_rejected_rows_and_what_is_dropped(run, page):
    [rejected] = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert rejected["reason"] in page.text and "dropped rows" in page.text


def test_answers_in_the_page(run, page):
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("Who are you?", HOSTILE)
    ]
    steps = [
        value for value, source, _ in page.numbers if source.startswith("samples.jsonl") and source.endswith("#step")
    ]
    assert sorted(steps) == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("file", [*FILES[:2], *FILES[3:], "manifest.json", "recipe.yaml", "train_samples.json"])
def test_what_is_not_there_is_not_shown(run, tmp_path, file):
    part = shutil.copytree(
        run, tmp_path / "part", ignore=shutil.ignore_patterns(file, "checkpoint-*", "*.safetensors")
    )
    page = Page(report.write(part))
    assert not [source for _, source, _ in page.numbers if source.startswith(file)]
    assert not [series for figure in page.figures for series in figure["series"] if series["file"] == file]
    assert "complete" in page.text


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "run_state.json").write_text('{"status": "running", "global_step": 0, "updated": "now"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    page = Page(report.write(tmp_path))
    assert "running" in page.text
    [figure] = page.figures
    assert (figure["series"][0]["x"], figure["series"][0]["y"]) == ([1], [2.5])


def made_up(folder, lines=(), **files):
    """The directory of a run that holds these lines of metrics.jsonl and, by name, JSON values or texts."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", lines)
    for name, said in {"run_state.json": {"status": "running"}, **files}.items():
        (folder / name).write_text(said if isinstance(said, str) else json.dumps(said))
    return folder


def entry_of(source, **more):
    """A source as ledger.json has it."""
    return {"source": source, "lengths": {"max": 9}, "dropped": {}, "histogram": {"8": 1}, **more}


def part_of(*entries):
    """A part of the data as ledger.json has it."""
    return {"sources": [*entries], "total": entry_of("all"), "in_proportion": False}


class TestLongRuns:
    def test_only_what_is_shown_is_made_fit_to_be_shown(self, tmp_path, monkeypatch):
        for name in ("rejected.jsonl", "loss_spikes.jsonl"):
            write_jsonl(tmp_path / name, [{"place": f"row {n}", "reason": "it is bad"} for n in range(3000)])
        answers = [{"step": n, "prompt": "Who?", "text": "I", "tokens": 1, "stopped": True} for n in range(3000)]
        write_jsonl(tmp_path / "samples.jsonl", answers)
        cleaned, looked = [], []
        visible, held = run_files.visible, run_files.held_secrets
        monkeypatch.setattr(run_files, "visible", lambda text: cleaned.append(text) or visible(text))
        monkeypatch.setattr(run_files, "held_secrets", lambda: looked.append(1) or held())
        page = Page(report.write(made_up(tmp_path)))
        assert page.text.count("the first 8 of 3,000 lines") == 2 and "8 of 3000 steps" in page.text
        assert "row 7" in page.text and "row 8" not in page.text
        assert len(cleaned) < 200 and len(looked) < 20

    def test_lines_are_counted_though_the_last_is_not_whole(self, tmp_path):
        write_jsonl(tmp_path / "some.jsonl", [{"row": n} for n in range(10)])
        assert run_files.first_lines(tmp_path / "some.jsonl") == ([(n + 1, {"row": n}) for n in range(8)], 10)
        (tmp_path / "few.jsonl").write_text('{"row": 0}\nnone\n{"row": 1}\n{"ro')
        assert run_files.first_lines(tmp_path / "few.jsonl") == ([(1, {"row": 0}), (3, {"row": 1})], 2)
        assert run_files.first_lines(tmp_path / "no.jsonl") == ([], 0)

    def test_stacked_series_have_their_points_in_common(self, tmp_path):
        draw, keys = random.Random(0), ("compute_seconds", "data_seconds", "other_seconds")
        lines = [{"step": n, "loss": 9 - n / 1000, **{key: draw.random() for key in keys}} for n in range(3, 5003)]
        lines[1000]["data_seconds"], lines[2000]["other_seconds"] = None, 77.0
        page = Page(report.write(made_up(tmp_path, lines)))
        figure = next(figure for figure in page.figures if figure["title"] == "Seconds of a step")
        x, *others = (series["x"] for series in figure["series"])
        assert others == [x, x] and 600 < len(x) <= 1000 and 1003 not in x and 2003 in x
        for series in figure["series"]:
            assert series["y"] == [lines[step - 3][series["key"]] for step in x]
        for figure in page.figures:
            assert {(series["x"][0], series["x"][-1]) for series in figure["series"]} == {(3, 5002)}
        summary = next(value for tag, name, value in page.attributes if name == "aria-label" and "Loss:" in value)
        assert summary == "Loss: train from 8.997 at step 3 to 3.998 at step 5002"


class TestSources:
    LINES = (
        {"step": 2, "loss": 2.0, "loss/__": 1.25, "loss/same": 4.0},
        {"step": 2, "eval_loss": 3.0, "eval_loss/__ 2": 3.5, "eval_loss/same": 4.5},
        {"step": 2, "train_runtime": 1.0, "train_loss/__": 1.25, "train_loss/same": 4.0},
    )

    def test_they_are_shown_by_their_names(self, tmp_path):
        train = part_of(entry_of("物理", metric="__"), entry_of("same", metric="same"))
        evaluated = part_of(entry_of("数学", metric="__ 2"), entry_of("same", metric="same"))
        out = made_up(tmp_path, self.LINES, **{"ledger.json": {"train": train, "eval": evaluated}})
        losses = next(figure for figure in Page(report.write(out)).figures if figure["title"] == "Loss by source")
        assert {series["name"]: (series["color"], series["y"]) for series in losses["series"]} == {
            "物理": (0, [1.25]),
            "same": (1, [4.0]),
            "数学 (eval)": (2, [3.5]),
            "same (eval)": (1, [4.5]),
        }
        [table] = [table for table in run_tables.totals(report.read_run(out)) if table.title == "Loss by source"]
        assert [[cell.text for cell in line] for line in table.lines] == [
            ["物理", "1.25", "", "", ""],
            ["same", "4", "", "4.5", ""],
            ["数学", "", "", "3.5", ""],
        ]

    @pytest.mark.parametrize("files", [{}, {"ledger.json": {"train": part_of(entry_of("物理"))}}])
    def test_a_run_whose_ledger_has_no_keys_is_shown_by_them(self, tmp_path, files):
        page = Page(report.write(made_up(tmp_path, self.LINES, **files)))
        losses = next(figure for figure in page.figures if figure["title"] == "Loss by source")
        assert [series["name"] for series in losses["series"]] == ["__", "same", "__ 2 (eval)", "same (eval)"]

    def test_a_run_keeps_those_of_train_and_evaluation_apart(self, argv, conversations, tmp_path):
        sources = [write_jsonl(tmp_path / f"{n}.jsonl", conversations[20 * n : 20 * n + 20]) for n in range(2)]
        mixture = {"datasets": [{"id": sources[0], "name": "物理"}]}
        tested = json.dumps({"id": sources[1], "name": "数学"})
        values = {"dataset_mixture": mixture, "eval_datasets": tested, "sample_prompts": None, "max_steps": 2}
        assert main(argv(tmp_path / "run", **values)) == 0
        table = run_tables.totals(report.read_run(tmp_path / "run"))[1]
        assert [[bool(cell.text) for cell in line] for line in table.lines] == [
            [True, True, True, False, False],
            [True, False, False, True, True],
        ]
        assert [line[0].text for line in table.lines] == ["物理", "数学"]


class TestUnfinishedRuns:
    def test_speeds_are_those_of_the_run_so_far(self, run, tmp_path):
        out = shutil.copytree(run, tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        write_jsonl(out / "metrics.jsonl", [line for line in lines if "train_runtime" not in line])
        found, whole = (run_tables.headlines(report.read_run(each)) for each in (out, run))
        last = [line for line in lines if "loss" in line][-1]
        spent = sum(line["step_seconds"] for line in lines if "step_seconds" in line)  # of one step each
        assert found["tokens/s per device"].raw == pytest.approx(last["real_tokens"] / spent)
        assert found["supervised tokens/s per device"].raw == pytest.approx(last["supervised_tokens"] / spent)
        assert found["padding"].raw == pytest.approx(whole["padding"].raw)
        assert found["padding"].source == "metrics.jsonl: mean of padding_share"

    def test_windows_weigh_what_they_took(self, tmp_path):
        first = {"step": 1, "step_seconds": 4.0, "real_tokens_per_second": 100.0, "padded_tokens": 10}
        second = {"step": 11, "step_seconds": 0.6, "real_tokens_per_second": 200.0, "padded_tokens": 100}
        windows = [{**first, "padding_share": 0.5}, {"step": 1, "eval_loss": 2.0}, {**second, "padding_share": 0.1}]
        found = run_tables.headlines(report.read_run(made_up(tmp_path, windows)))
        assert found["tokens/s per device"].raw == pytest.approx((100 * 4 + 200 * 6) / 10)
        assert found["padding"].raw == pytest.approx((0.5 * 10 + 0.1 * 90) / 100)

    def test_the_last_window_is_called_so_where_they_cannot_be_weighed(self, tmp_path):
        lines = [{"step": n, "real_tokens_per_second": 100.0 * n, "padding_share": 0.1 * n} for n in (1, 2)]
        found = run_tables.headlines(report.read_run(made_up(tmp_path, lines)))
        assert found["tokens/s per device"].text == "200 in the last window"
        assert found["padding"].text == "20.0% in the last window"
        assert found["padding"].source == "metrics.jsonl:2#padding_share"

    def test_a_number_that_is_none_any_more_is_not_passed_over(self, tmp_path):
        lines = [
            {"step": 1, "loss": 2.5, "mfu": None},
            {"step": 1, "eval_loss": 2.0, "eval_loss/a": 2.0},
            {"step": 2, "loss": None, "mfu": None},
            {"step": 2, "eval_loss": None, "eval_loss/a": None},
        ]
        run = report.read_run(made_up(tmp_path, lines))
        found = run_tables.headlines(run)
        assert found["loss at last"] == ("not a number", None, "metrics.jsonl:3#loss")
        assert found["evaluation loss at last"] == ("not a number", None, "metrics.jsonl:4#eval_loss")
        assert found["evaluation loss at best"].text == "2" and "MFU" not in found
        assert run_tables.totals(run)[0].lines[0][3].text == "not a number"
        none = report.read_run(made_up(tmp_path / "none", [{"step": 1, "loss": None}]))
        assert run_tables.headlines(none)["loss at last"].text == "not a number"

    def test_what_is_said_of_the_best_model_at_last_stands_at_its_step(self, tmp_path):
        said = [(2, 1.5), (4, 1.0), (6, 2.0), (4, 1.0)]
        lines = [{"step": step, "epoch": step / 2, "eval_loss": loss} for step, loss in said]
        out = made_up(tmp_path, lines)
        [figure] = Page(report.write(out)).figures
        assert (figure["series"][0]["x"], figure["series"][0]["y"]) == ([2, 4, 4, 6], [1.5, 1.0, 1.0, 2.0])
        found = run_tables.headlines(report.read_run(out))
        assert (found["epochs"].text, found["evaluation loss at last"].text) == ("3", "1")

    def test_one_that_goes_on_is_said_to_run_where_it_does(self, tmp_path):
        state = {"hardware": {"gpu": "new"}, "versions": {"torch": "9.9"}, "code": {"digest": "beef"}}
        old = {"hardware": {"gpu": "old"}, "versions": {"torch": "1.0"}, "code": {"digest": "cafe"}}
        runs = {}
        for status in ("running", "failed", "preempted", "complete"):
            files = {"run_state.json": {"status": status, **state}, "manifest.json": old}
            runs[status] = report.read_run(made_up(tmp_path / status, **files))
            said = [(table.source, table.lines[0][1].text) for table in run_tables.about(runs[status])]
            file, words = ("manifest.json", old) if status == "complete" else ("run_state.json", state)
            assert said == [(f"{file}: {title}", next(iter(words[title].values()))) for title in words]
        [hardware] = run_tables.differing({status: runs[status] for status in ("running", "complete")})
        assert [cell.text for cell in hardware.lines[0]] == ["gpu", "new", "old"]


def test_prompts_of_one_text_are_told_apart(tmp_path):
    write_jsonl(
        tmp_path / "samples.jsonl",
        [
            {"step": step, "prompt": prompt, "text": text, "tokens": 1, "stopped": True}
            for step in (0, 2)
            for prompt, text in (("Who?", f"plain {step}"), ("Other?", "x"), ("Who?", f"with tools {step}"))
        ],
    )
    run = report.read_run(made_up(tmp_path))
    shown = [
        (said["prompt"], said["order"], [each["text"] for each in said["said"]])
        for said in run_tables.generations(run)
    ]
    assert shown == [
        ("Who?", 1, ["plain 0", "plain 2"]),
        ("Other?", 1, ["x", "x"]),
        ("Who?", 2, ["with tools 0", "with tools 2"]),
    ]
    assert " (2)" in Page(report.write(tmp_path)).text


BROKEN = [
    ("recipe.yaml", "a: [1", "line 1: not valid YAML: "),
    ("recipe.yaml", "- a", "settings are to be key: value; found ['a']"),
    ("recipe.yaml", "a: 2020-13-45", "not valid YAML: month must be in 1..12"),
    ("recipe.yaml", "a: &a [*a]", "not valid YAML"),
    ("ledger.json", {"train": {}}, "train lacks sources; found {}"),
    ("ledger.json", {"train": []}, "train is to be an object; found []"),
    ("ledger.json", {"eval": part_of(entry_of(3))}, "eval/sources/0/source is to be a text; found 3"),
    ("ledger.json", {"eval": part_of(entry_of("a", histogram={"b": 1}))}, "histogram is to have numbers as keys"),
    ("ledger.json", {"train": part_of(entry_of("a", dropped={"b": "c"}))}, "dropped/b is to be a number; found 'c'"),
    ("run_state.json", [], "it is to be an object; found []"),
    ("run_state.json", {"device_seconds": 3}, "device_seconds is to be an object; found 3"),
    ("manifest.json", "null", "it is to be an object; found None"),
    ("manifest.json", {"versions": []}, "versions is to be an object; found []"),
    ("train_samples.json", {"a": 1}, "it is to be a list; found {'a': 1}"),
    (
        "train_samples.json",
        [{"source": "a", "samples": [{"title": "b", "stretches": [["c"]]}]}],
        "0/samples/0/stretches/0 is to be a list of 2; found ['c']",
    ),
]


@pytest.mark.parametrize(("file", "said", "found"), BROKEN)
def test_a_file_that_no_run_writes_is_named(tmp_path, capsys, caplog, file, said, found):
    out = made_up(tmp_path / "run", **{file: said})
    assert script.main([str(out)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{out / file}: ") and found in line and "bring back the file as the run wrote it" in line
    assert ("move it away" in line) == (file != "run_state.json")
    report.try_to_write(str(out))
    assert found in caplog.text and "Traceback" not in caplog.text


def test_values_that_are_none_of_ours_are_shown_as_they_are(tmp_path):
    entry = entry_of("a", rows_in={"b": "c"}, tokens=None)
    files = {"ledger.json": {"train": part_of(entry), "later": 1}, "run_state.json": {"device_seconds": None}}
    files["samples.jsonl"] = '{"prompt": 1, "text": 2}\n[]\n{"step": {}, "text": null, "prompt": []}'
    files["rejected.jsonl"] = '{"place": null, "reason": 3}'
    assert script.main([str(made_up(tmp_path, [{"step": 1, "loss": "x", "epoch": [1]}], **files))]) == 0


def test_a_page_that_cannot_be_written_is_named(tmp_path, capsys):
    out, page = made_up(tmp_path / "run"), tmp_path / "no" / "x.html"
    said = f"{page}: there is no folder {page.parent}; make it, or name another page with --out"
    for runs in ([out], [out, made_up(tmp_path / "other")]):
        assert script.main([*map(str, runs), "--out", str(page)]) == 2
        assert capsys.readouterr().err.strip() == said
    (out / "report.html").mkdir()
    assert script.main([str(out)]) == 2
    error = capsys.readouterr().err
    assert str(out / "report.html") in error and "partial" not in error


def test_names_of_directories_need_not_be_utf_8(tmp_path):
    runs = [made_up(tmp_path / name, [{"step": 1, "loss": 2.0}]) for name in ("a", os.fsdecode(b"b\xff"))]
    for argv in ([*runs, "--out", tmp_path / "both.html"], runs[1:]):
        command = [sys.executable, ROOT / "scripts" / "report.py", *argv]
        told = subprocess.run(
            command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, timeout=120
        )
        assert told.returncode == 0, told.stderr
        path = os.fsdecode(told.stdout.rstrip(b"\n"))
        assert "b<U+DCFF>" in Page(path).text


def test_no_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path)


class TestDuringTheRun:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch):
        monkeypatch.setattr(Report, "FIRST", 0.0)

    def test_it_is_there_while_the_run_trains(self, argv, tmp_path, monkeypatch):
        seen = []
        write = report.write
        monkeypatch.setattr(report, "write", lambda out: seen.append(report.read_run(Path(out))) or write(out))
        assert main(argv(tmp_path / "run", max_steps=2)) == 0
        assert [run.state["status"] for run in seen] == [
            "running",
            "complete",
        ]  # one write in 30 seconds, and the last
        assert Path(tmp_path / "run" / "report.html").stat().st_size > 4e6

    def test_a_run_that_fails_has_one_that_says_why(self, argv, tmp_path, monkeypatch):
        from open_r1.trainer import OrderedTrainer

        step = OrderedTrainer.training_step

        def fails(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise RuntimeError("the cable fell out")
            return step(self, *args, **kwargs)

        monkeypatch.setattr(OrderedTrainer, "training_step", fails)
        with pytest.raises(RuntimeError):
            main(argv(tmp_path / "run"))
        page = Page(tmp_path / "run" / "report.html")
        assert "failed" in page.text and "the cable fell out" in page.text

    def test_a_full_disk_is_said_and_stops_nothing(self, argv, tmp_path, monkeypatch, caplog):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(report, "write_whole", full)
        assert main(argv(tmp_path / "run", max_steps=2)) == 0
        assert caplog.text.count("report.html was not written: [Errno 28] No space left on device") == 2
        assert not (tmp_path / "run" / "report.html").exists()

    def test_a_mistake_of_ours_is_shown_and_stops_nothing(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(report, "read_run", lambda path: 1 / 0)
        report.try_to_write(str(tmp_path))
        assert "ZeroDivisionError" in caplog.text

    def test_it_takes_one_per_cent_of_the_time_at_most(self, tmp_path, monkeypatch):
        clock = [1000.0]
        written = []
        monkeypatch.setattr("open_r1.callbacks.time.monotonic", lambda: clock[0])

        def write(out):
            written.append(clock[0])
            clock[0] += 0.7  # a disk that is slow counts as well

        monkeypatch.setattr("open_r1.report.try_to_write", write)
        callback, args = Report(), SimpleNamespace(output_dir=str(tmp_path))
        for _ in range(3000):
            clock[0] += 0.1
            callback.write(args)
        assert np.diff(written) == pytest.approx(70.8, abs=0.11) and len(written) == 5

    def test_what_a_run_cost_is_summed_over_its_starts(self, argv, tmp_path):
        out = tmp_path / "run"
        assert main(argv(out, max_steps=2, lr_scheduler_type="constant", save_steps=2)) == 0
        first = json.loads((out / "run_state.json").read_text())["device_seconds"]
        assert main(argv(out, max_steps=4, lr_scheduler_type="constant", save_steps=2)) == 0
        second = json.loads((out / "run_state.json").read_text())["device_seconds"]
        [device] = first
        assert second[device] > first[device] * 1.5

    def test_a_start_that_failed_or_logged_nothing_is_in_it(self, argv, tmp_path, monkeypatch):
        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("open_r1.finish.save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            main(argv(tmp_path / "run", max_steps=2, logging_strategy="no"))
        [seconds] = json.loads((tmp_path / "run" / "run_state.json").read_text())["device_seconds"].values()
        assert seconds > 0

    def test_it_is_counted_every_ten_seconds(self, tmp_path, monkeypatch):
        clock, counted = [1000.0], []
        monkeypatch.setattr("open_r1.callbacks.time.monotonic", lambda: clock[0])
        monkeypatch.setattr("open_r1.callbacks.record", lambda out, **facts: counted.append(clock[0]))
        args, state = (
            SimpleNamespace(output_dir=str(tmp_path), world_size=1),
            SimpleNamespace(is_world_process_zero=True),
        )
        callback = Report()
        for _ in range(400):
            clock[0] += 0.1
            callback.on_step_end(args, state, None)
        assert np.diff(counted) == pytest.approx(10, abs=0.21) and len(counted) == 4

    def test_nothing_of_it_is_imported_before_it_is_written(self):
        for module in (
            "report",
            "run_files",
            "run_tables",
            "figures",
            "views",
            "callbacks",
            "live",
            "generations",
            "sft",
        ):
            tree = ast.parse((ROOT / "src/open_r1" / f"{module}.py").read_text())
            names = {
                alias.name
                for node in tree.body
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
            }
            assert not [name for name in names if name.startswith(("plotly", "jinja2", "markupsafe"))]


def test_it_is_not_pushed(run):
    names = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    assert {"report.html", "samples.jsonl", "train_samples.json"} <= {*names}
    pushed = {*filter_repo_objects(names, allow_patterns=PUSHED)}
    assert "model.safetensors" in pushed
    assert not pushed & {"report.html", "samples.jsonl", "train_samples.json", "ledger.json"}


@pytest.fixture(scope="module")
def two(run, argv, tmp_path_factory):
    """That run, and one with another learning rate."""
    other = tmp_path_factory.mktemp("other") / "run"
    assert main(argv(other, learning_rate=1e-4, sample_prompts=None)) == 0
    write_metrics(other)
    return [run, other]


class TestSeveralRuns:
    def test_one_page_with_what_differs(self, two, tmp_path, capsys):
        out = tmp_path / "both.html"
        assert script.main([*map(str, two), "--out", str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        page = Page(out)
        names = report.told_apart(two)
        loss = next(figure for figure in page.figures if figure["title"] == "Train loss")
        assert [series["name"] for series in loss["series"]] == names
        assert [series["y"] for series in loss["series"]] == [losses(each) for each in two]
        assert page.text.count("learning_rate") >= 2 and "0.0001" in page.text and "0.001" in page.text
        assert "per_device_train_batch_size" not in page.text  # the same in both
        assert "Versions that differ" not in page.text

    def test_its_numbers_are_those_of_the_runs(self, two, tmp_path):
        page = Page(report.write_comparison(two, tmp_path / "both.html"))
        found = [(value, source) for value, source, _ in page.numbers]
        assert len(found) > 15
        assert all(any(value == at_or_nan(each, source) for each in two) for value, source in found)

    def test_versions_that_differ(self, two, tmp_path):
        other = shutil.copytree(
            two[1], tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors")
        )
        state = json.loads((other / "run_state.json").read_text())
        state["versions"]["trl"] = "0.9.0"
        (other / "run_state.json").write_text(json.dumps(state))
        page = Page(report.write_comparison([two[0], other], tmp_path / "both.html"))
        assert "Versions that differ" in page.text and "0.9.0" in page.text and "accelerate" not in page.text

    def test_settings_are_compared_by_value(self, tmp_path):
        recipes = (
            "logging_steps: 10.0\nlearning_rate: 1.0e-05\nlora: [1, 2.0]\npush: true\nseed: null\nnew: 1",
            "logging_steps: 10\nlearning_rate: 0.00001\nlora: [1.0, 2]\npush: 1\noptim: adamw\nnew: 2",
        )
        runs = [made_up(tmp_path / str(n), **{"recipe.yaml": text}) for n, text in enumerate(recipes)]
        [table] = run_tables.differing({path.name: report.read_run(path) for path in runs})
        found = [[cell.text for cell in line] for line in table.lines]
        assert found == [["push", "true", "1"], ["new", "1", "2"], ["optim", "", "adamw"]]
        assert not run_tables.same(True, 1) and run_tables.same(1, 1.0) and not run_tables.same("1", 1)

    def test_many_are_told_apart(self, tmp_path):
        end = "with-a-long-ending-that-all-of-the-runs-have"
        runs = [made_up(tmp_path / f"lr-{n}e-5-{end}", [{"step": 1, "loss": float(n)}]) for n in range(20)]
        page = Page(report.write_comparison(runs, tmp_path / "all.html"))
        [figure] = page.figures
        drawn = [(series["color"] % 6, series["dash"]) for series in figure["series"]]
        assert len({*drawn[:18]}) == 18
        assert len({series["label"] for series in figure["series"]}) == 20
        assert [tag for tag, name, _ in page.attributes if (tag, name) == ("button", "aria-pressed")] == [
            "button"
        ] * 20
        for path, series in zip(runs, figure["series"], strict=True):
            assert (
                series["name"] == path.name and page.texts.count(path.name) == 2
            )  # in the head of results, and in the key

    def test_one_run_again(self, two, tmp_path, capsys):
        out = shutil.copytree(two[1], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
        (out / "report.html").unlink()
        assert script.main([str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out / "report.html")
        assert len(Page(out / "report.html").figures) > 8

    def test_mistakes(self, two, tmp_path, capsys):
        assert script.main([str(two[0]), str(tmp_path)]) == 2
        assert "holds no run" in capsys.readouterr().err
        assert script.main([str(two[0]), str(two[0])]) == 2
        assert "named more than once" in capsys.readouterr().err


def at_or_nan(folder, source):
    try:
        return at(folder, source)
    except (KeyError, IndexError):
        return math.nan


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 5000, 123_457])
@pytest.mark.parametrize("columns", [1, 3])
def test_thinning_keeps_both_ends_spikes_and_order(size, columns):
    draw = random.Random(size)
    series = [[draw.random() for _ in range(size)] for _ in range(columns)]
    for number, values in enumerate(series):
        values[size // (3 + number)], values[size // (2 + number) - size // 7] = 99.0, -99.0
    kept = figures.thinned(series)
    assert len(kept) <= 1000 and kept == sorted({*kept}) and kept[0] == 0 and kept[-1] == size - 1
    assert len(kept) == size or len(kept) > 300
    for values in series:
        assert {values.index(max(values)), values.index(min(values))} <= {*kept}


def test_long_names_are_cut_where_they_are_alike():
    ends = [f"{n} {'and so on ' * 6}end" for n in ("first", "second")]
    assert figures.labels(["short", *ends]) == [
        "short",
        "first and so on …d so on and so on end"[:16] + "…" + ends[0][-16:],
        ends[1][:16] + "…" + ends[1][-16:],
    ]
    starts = [f"{'the same beginning ' * 4}{n}" for n in ("one", "two")]
    assert figures.labels(starts) == ["…ginning one", "…ginning two"]
    middles = [f"{'x' * n} {'y' * 40}{n % 2}{'z' * 40}" for n in (20, 20, 21)]
    assert len({*figures.labels([middles[0], middles[0][:-50] + "!" + middles[0][-49:], middles[2]])}) == 3
    assert figures.labels(["a", "a"]) == ["a", "a"] and figures.labels([]) == []


def test_bins_of_lengths():
    lengths = np.arange(1, 5000)
    histogram = histogram_of(lengths)
    assert sum(histogram.values()) == len(lengths)
    firsts = [int(first) for first in histogram]
    assert [last_in_bin(first) + 1 for first in firsts[:-1]] == firsts[1:]
    for first, rows in list(histogram.items())[:-1]:
        assert rows == last_in_bin(int(first)) - int(first) + 1
    assert histogram_of(np.array([], dtype=np.int64)) == {}


def test_names_of_sources_are_short_where_they_differ():
    assert figures.short(["x/a.jsonl:train", "y/b.jsonl:train"]) == ["a.jsonl", "b.jsonl"]
    assert figures.short(["x/a.jsonl:train", "y/a.jsonl:train"]) == ["x/a.jsonl:train", "y/a.jsonl:train"]
    assert figures.short(["a:one", "a:two"]) == ["a:one", "a:two"]


FRAME = """<!doctype html><title>frame</title>
<iframe id="f" width="375" height="800" src="{url}"></iframe><pre>none</pre>
<script>
const frame = document.getElementById("f"), told = document.querySelector("pre");
frame.onload = () => setTimeout(() => {{
  const page = frame.contentDocument, root = page.documentElement, plotly = frame.contentWindow.Plotly;
  const plots = [...page.querySelectorAll(".plot")], points = page.querySelectorAll(".plot .point").length;
  for (const plot of plotly ? plots : []) {{
    plotly.Fx.hover(plot, plot.data.map((_, at) => ({{curveNumber: at, pointNumber: 0}})));
  }}
  page.querySelector(".key button")?.click();
  told.textContent = JSON.stringify({{
    room: frame.contentWindow.innerWidth, takes: root.scrollWidth,
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
    plots: [...page.querySelectorAll(".plot")].filter((each) => each.querySelector(".main-svg")).length,
    images: page.images.length, points, links: page.querySelectorAll(".plot a").length,
    hovered: [...page.querySelectorAll(".hoverlayer text")].map((each) => each.textContent),
    hidden: plots.map((plot) => (plot.data || []).filter((each) => each.visible === false).length),
    pressed: [...page.querySelectorAll(".key button")].map((each) => each.ariaPressed),
    ink: getComputedStyle(page.querySelector(".plot text")).fill,
  }});
}}, 500);
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH to open the page with")
class TestInABrowser:
    def open(self, page, folder, dark=False):
        """What headless Chromium says of a page in a frame as wide as a phone, and what it wrote to the console."""
        frame = folder / "frame.html"
        frame.write_text(FRAME.format(url=page.as_uri()))
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        told = subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
            + ["--allow-file-access-from-files", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=8000"]
            + [scheme, "--dump-dom", frame.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(folder)},
        )
        said = told.stdout.partition("<pre>")[2].partition("</pre>")[0]
        return json.loads(unescape(said)), [line for line in told.stderr.splitlines() if "CONSOLE" in line]

    @pytest.mark.parametrize("dark", [False, True])
    def test_no_errors_and_nothing_wider_than_a_phone(self, run, page, tmp_path, dark):
        seen, console = self.open(run / "report.html", tmp_path, dark)
        assert console == []
        assert seen["takes"] <= seen["room"] == 375
        assert seen["plots"] == len(page.figures) and seen["dark"] == dark and seen["images"] == 0
        shade = [int(part) for part in seen["ink"].removeprefix("rgb(").removesuffix(")").split(",")]
        assert (min(shade) > 150) if dark else (max(shade) < 110)

    def test_one_log_is_seen_and_names_are_text(self, tmp_path):
        """Of two sources and three kinds of seconds; the first of the key is put out."""
        names = ["<b>a</b>", '<a href="https://example.com">&amp;<br></b>']
        losses = {f"loss/{n}": 1.0 + n for n in range(2)}
        line = {"step": 1, **losses, "compute_seconds": 1.0, "data_seconds": 0.5, "other_seconds": 0.2}
        train = part_of(*(entry_of(name, metric=str(n), histogram={"8": 5}) for n, name in enumerate(names)))
        out = made_up(tmp_path / "run", [line], **{"ledger.json": {"train": train}})
        seen, console = self.open(report.write(out), tmp_path)
        assert console == [] and seen["plots"] == 3 and seen["links"] == 0
        assert seen["points"] == 2 + 3 + 2  # markers, and bars
        assert all(figures.labels([name])[0] in seen["hovered"] for name in names)
        assert seen["pressed"] == ["false"] + ["true"] * 6 and seen["hidden"] == [1, 0, 0]

    def test_an_error_would_be_seen(self, tmp_path):
        page = tmp_path / "bad.html"
        page.write_text(
            "<p class=plot><svg><text>x</text></svg><div style='width: 900px'>x</div><script>nothing()</script>"
        )
        seen, console = self.open(page, tmp_path)
        assert seen["takes"] > 375 and len(console) == 1 and "nothing is not defined" in console[0]


@pytest.mark.parametrize(
    ("number", "shown"), [(0.448, "44.8%"), (0.00022, "0.022%"), (0.0, "0.0%"), (1.0, "100.0%"), (-0.004, "-0.4%")]
)
def test_a_share_that_is_small_is_not_nothing(number, shown):
    assert run_tables.share(number) == shown
