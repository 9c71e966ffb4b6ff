"""Two runs compared: that they are the same, in which step their data or losses part, and what cannot be read."""

import json
import math
import os
import shutil
import subprocess
import sys

import compare_runs
import pytest
from conftest import ROOT, settings

from open_r1.sft import main


@pytest.fixture(scope="module")
def train(tiny_model, chat_file, tmp_path_factory):
    """Train under settings, once for each; a run stopped in a step is left as it is. Returns the output directory."""
    from transformers.trainer_callback import CallbackHandler

    folder, made = tmp_path_factory.mktemp("runs"), {}
    on_step_end = CallbackHandler.on_step_end

    def once(name, stop_in=None, again=False, **values):
        def die(self, args, state, control):
            if state.global_step == stop_in:
                raise KeyboardInterrupt
            return on_step_end(self, args, state, control)

        out = folder / name
        if name in made and not again:
            assert made[name] == (stop_in, values)
            return out
        made[name] = (stop_in, values)
        quick = {"max_steps": 6, "save_steps": 2, "test_split_size": 0.1, "eval_strategy": "steps", "eval_steps": 3}
        argv = settings(
            **{"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": out, **quick, **values}
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CallbackHandler, "on_step_end", die)
            if stop_in:
                with pytest.raises(KeyboardInterrupt):
                    main(argv)
            else:
                assert main(argv) == 0
        return out

    return once


@pytest.fixture
def one(train):
    return train("one")


@pytest.fixture
def copied(one, tmp_path):
    """A copy of a run, times kept, that a test may break."""
    return shutil.copytree(one, tmp_path / "copied")


@pytest.fixture
def compare(capsys):
    """Compare two directories: exit code, lines of stdout, stderr."""

    def both(a, b, *argv):
        capsys.readouterr()
        code = compare_runs.main([str(a), str(b), *argv])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.strip()

    return both


def rewrite(path, change):
    """Change what a JSON file holds, keeping its times."""
    times, held = path.stat(), json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def line_of(lines, name):
    return next(line for line in lines if line.startswith(f"{name}: "))


class TestSameData:
    def test_the_same_run_twice(self, train, one, compare):
        code, lines, _ = compare(one, train("twin"))
        assert (code, lines[-1]) == (0, "the same run")
        assert "data: the same rows in all of 6 common steps" in lines
        assert "loss: identical in 6 logged steps" in lines
        assert "eval_loss: identical in 2 logged steps" in lines
        assert "settings: the same" in lines  # output_dir apart
        assert not [line for line in lines if "->" in line]

    def test_another_learning_rate(self, train, one, compare):
        code, lines, _ = compare(one, train("faster", learning_rate=2e-3))
        assert (code, lines[-1]) == (1, "the same data, other losses from step 2")
        assert "data: the same rows in all of 6 common steps" in lines
        assert line_of(lines, "loss").startswith("loss: differs first in step 2, 6.")
        assert "; in 5 of 6 logged steps" in line_of(lines, "loss")
        assert line_of(lines, "learning_rate").startswith("learning_rate: differs first in step 1, 0.001 and 0.002; ")
        assert "  learning_rate: 0.001 -> 0.002" in lines

    def test_a_tolerance(self, train, one, compare):
        faster = train("faster", learning_rate=2e-3)
        code, lines, _ = compare(one, faster, "--tolerance", "1")
        assert code == 0
        assert lines[-1] == "the same data and losses, other learning_rate from step 1"
        assert "by more than 1 nowhere" in line_of(lines, "loss")
        logged = [compare_runs.read_run(run).logged for run in (one, faster)]
        gaps, tested = (
            {step: abs(logged[0][key][step] - loss) for step, loss in logged[1][key].items()}
            for key in ("loss", "eval_loss")
        )
        most = max(gaps, key=gaps.get)
        assert gaps[most] > 2 * gaps[2] > 0
        code, lines, _ = compare(one, faster, "--tolerance", str(2 * gaps[2]))
        beyond = min(step for each in (gaps, tested) for step, gap in each.items() if gap > 2 * gaps[2])
        assert (code, lines[-1]) == (1, f"the same data, other losses from step {beyond}")
        assert f"most in step {most}, by {gaps[most]:.3g}" in line_of(lines, "loss")

    def test_the_last_bit_of_one_loss(self, one, copied, compare):
        def change(state):
            entry = next(entry for entry in state["log_history"] if entry["step"] == 4)
            entry["loss"] = math.nextafter(entry["loss"], 9)

        rewrite(copied / "trainer_state.json", change)
        code, lines, _ = compare(one, copied)
        assert (code, lines[-1]) == (1, "the same data, other losses from step 4")
        code, lines, _ = compare(one, copied, "--tolerance", "1e-9")
        assert (code, lines[-1]) == (0, "the same run, within 1e-09")

    @pytest.mark.parametrize(("both", "code"), [(True, 0), (False, 1)])
    def test_a_loss_that_is_no_number(self, one, copied, tmp_path, compare, both, code):
        rewrite(copied / "trainer_state.json", lambda state: state["log_history"][1].update(loss=math.nan))
        other = shutil.copytree(copied, tmp_path / "other") if both else one
        found, lines, _ = compare(other, copied, "--tolerance", "5")
        assert found == code
        assert ("by inf" in line_of(lines, "loss")) != both

    def test_only_the_evaluation_differs(self, one, copied, compare):
        rewrite(copied / "trainer_state.json", lambda state: state["log_history"][3].update(eval_loss=1.0))
        code, lines, _ = compare(one, copied)
        assert (code, lines[-1]) == (1, "the same data, other losses from step 3 (of the evaluation only)")

    def test_other_versions_and_code(self, one, copied, compare):
        def change(manifest):
            manifest["versions"]["torch"] = "1.0"
            manifest["code"] = {"commit": "abc", "changed": False}
            manifest["hardware"]["processes"] = 8

        rewrite(copied / "manifest.json", change)
        code, lines, _ = compare(one, copied)
        assert (code, lines[-1]) == (0, "the same run")
        changed = [line.strip().partition(":")[0] for line in lines if "->" in line and line.startswith(" ")]
        assert (
            {"torch", "commit", "processes"} <= set(changed) <= {"torch", "commit", "processes", "changed", "digest"}
        )
        assert "  processes: 1 -> 8" in lines


class TestOtherData:
    def test_another_seed(self, train, one, compare):
        code, lines, _ = compare(one, train("seed", seed=7))
        assert (code, lines[-1]) == (1, "other data from step 1")
        assert line_of(lines, "data").startswith("data: differs first in step 1, in 6 of 6 common steps")
        assert "  seed: 42 -> 7" in lines  # 42 is in no recipe

    def test_only_another_order(self, train, one, compare):
        code, lines, _ = compare(one, train("order", data_seed=7))
        assert (code, lines[-1]) == (1, "other data from step 1")
        assert "(the same prepared rows in another order)" in line_of(lines, "data")

    def test_other_prepared_rows_in_the_same_order(self, train, compare):
        same = {"train_sampling_strategy": "sequential"}
        code, lines, _ = compare(train("long", **same), train("short", max_length=64, **same))
        assert (code, lines[-1]) == (1, "other data from step 1")
        assert "(other prepared rows: " in line_of(lines, "data")
        assert "drawn in the same order)" in line_of(lines, "data")
        assert [line for line in lines if line.startswith("  train.0.tokens: ")]

    def test_from_a_step_on(self, one, copied, compare):
        lines = (copied / "order.jsonl").read_text().splitlines(keepends=True)
        lines[3] = lines[3].replace('"rows": "', '"rows": "0')
        (copied / "order.jsonl").write_text("".join(lines))
        code, lines, _ = compare(one, copied)
        assert (code, lines[-1]) == (1, "other data from step 4")
        assert line_of(lines, "data").startswith("data: differs first in step 4, in 1 of 6 common steps")
        assert "manifest.json is of other steps and passed over" in line_of(lines, "B")

    def test_losses_that_part_before(self, train, tmp_path, compare):
        faster = shutil.copytree(train("faster", learning_rate=2e-3), tmp_path / "faster")
        text = (faster / "order.jsonl").read_text().splitlines(keepends=True)
        (faster / "order.jsonl").write_text("".join(text[:4]) + text[5].replace("6,", "5,") + text[5])
        code, lines, _ = compare(train("one"), faster)
        assert (code, lines[-1]) == (1, "other data from step 5, other losses from step 2")


class TestUnfinished:
    def test_killed(self, train, one, compare):
        killed = train("killed", stop_in=6)
        assert not (killed / "trainer_state.json").exists()
        code, lines, _ = compare(one, killed)
        assert (code, lines[-1]) == (0, "the same run, as far as both go: step 4")
        assert "data: 1 step only in A, 6 to 6" in lines
        assert "loss: identical in 4 logged steps" in lines
        assert line_of(lines, "B").endswith("5 steps; losses up to step 4; from checkpoint-4")
        assert "settings: the same" in lines  # of run_state.json
        assert "versions: the same" in lines

    def test_a_last_line_that_was_not_written_to_its_end(self, one, copied, compare):
        text = (copied / "order.jsonl").read_text()
        (copied / "order.jsonl").write_text(text[:-20])
        shutil.rmtree(copied / "checkpoint-6")
        (copied / "trainer_state.json").unlink()
        code, lines, _ = compare(one, copied)
        assert (code, lines[-1]) == (0, "the same run, as far as both go: step 4")
        assert "the last line of order.jsonl was not written to its end" in line_of(lines, "B")
        assert "data: the same rows in all of 5 common steps" in lines

    def test_before_the_first_checkpoint(self, train, one, compare):
        early = train("early", stop_in=3, save_steps=5)
        code, lines, err = compare(one, early)
        assert code == 2
        assert "data: the same rows in all of 2 common steps" in lines
        assert err == "the same data so far, but no loss that both logged: nothing more can be said"
        assert compare(train("seed", seed=7), early)[0] == 1

    def test_a_newer_checkpoint(self, one, copied, compare):
        """A run that goes on under the final state of an earlier one."""
        rewrite(copied / "trainer_state.json", lambda state: state["log_history"][0].update(loss=1.0))
        assert compare(one, copied)[0] == 1
        os.utime(copied / "trainer_state.json", ns=(0, 0))
        code, lines, _ = compare(one, copied)
        assert code == 0
        assert "from checkpoint-6" in line_of(lines, "B")

    def test_a_state_of_later_steps_is_that_of_an_earlier_run(self, one, copied, compare):
        text = (copied / "order.jsonl").read_text().splitlines(keepends=True)
        (copied / "order.jsonl").write_text("".join(text[:3]))
        code, lines, _ = compare(one, copied)
        assert (code, lines[-1]) == (0, "the same run, as far as both go: step 2")
        assert "trainer_state.json is of an earlier run (step 6) and passed over" in line_of(lines, "B")

    def test_a_checkpoint_broken_while_it_was_saved(self, train, one, tmp_path, compare):
        killed = shutil.copytree(train("killed", stop_in=6), tmp_path / "killed")
        (killed / "checkpoint-4" / "trainer_state.json").write_text('{"log_his')
        code, lines, _ = compare(one, killed)
        assert (code, lines[-1]) == (0, "the same run, as far as both go: step 2")
        assert "checkpoint-4/trainer_state.json is broken and passed over" in line_of(lines, "B").replace("\\", "/")


class TestOtherLogging:
    def test_means_over_the_same_steps(self, train, one, compare):
        code, lines, _ = compare(one, train("thirds", logging_steps=3))
        assert (code, lines[-1]) == (0, "the same run")
        assert line_of(lines, "loss") == (
            "loss: equal up to rounding in 2 logged steps; logged in other steps: only means over the same steps count"
        )
        assert line_of(lines, "grad_norm").startswith("grad_norm: identical in 2 logged steps; logged in other steps")

    def test_neither_divides_the_other(self, train, compare):
        code, lines, _ = compare(train("halves", logging_steps=2), train("thirds", logging_steps=3))
        assert (code, lines[-1]) == (0, "the same run")
        assert line_of(lines, "loss").startswith("loss: equal up to rounding in 1 logged step; ")

    def test_a_mean_counts_by_its_steps(self, train, compare):
        uneven = train("uneven", logging_steps=3, logging_first_step=True)
        assert list(compare_runs.read_run(uneven).logged["loss"]) == [1, 3, 6]
        code, lines, _ = compare(train("thirds", logging_steps=3), uneven)
        assert (code, lines[-1]) == (0, "the same run")
        assert line_of(lines, "loss").startswith("loss: equal up to rounding in 2 logged steps; ")

    def test_other_losses(self, train, compare):
        code, lines, _ = compare(train("thirds", logging_steps=3), train("faster", learning_rate=2e-3))
        assert (code, lines[-1]) == (1, "the same data, other losses from step 3")

    def test_the_first_mean_of_a_resumed_run_is_over_as_many_steps(self, train, compare):
        train("torn", stop_in=5, logging_steps=3)
        torn = train("torn", again=True, logging_steps=3)
        whole = train("thirds", logging_steps=3)
        means = [compare_runs.read_run(run).logged["loss"] for run in (torn, whole)]
        assert means[0] == means[1]
        for pair in ((torn, whole), (whole, torn)):
            code, lines, _ = compare(*pair)
            assert (code, lines[-1]) == (0, "the same run")

    def test_every_step_of_a_resumed_run_counts(self, train, one, compare):
        train("resumed", stop_in=6)
        code, lines, _ = compare(one, train("resumed", again=True))
        assert (code, lines[-1]) == (0, "the same run")
        assert "loss: identical in 6 logged steps" in lines


class TestUnreadable:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("order.jsonl", None, "order.jsonl: there is no such file; name the output directory of a run"),
            ("order.jsonl", "", "order.jsonl: no step is in it: the run has taken none yet"),
            ("order.jsonl", '{"step": 1}\n', "order.jsonl:1: is no line with step, rows and data: '{\"step\": 1}'"),
            ("order.jsonl", "nothing\n{}\n", "order.jsonl:1: is no line with step, rows and data: 'nothing'"),
            ("trainer_state.json", '{\n"a": 1,\n', "trainer_state.json:3: is no JSON: "),
            ("trainer_state.json", "[]", "trainer_state.json: holds no JSON object"),
            (
                "trainer_state.json",
                "{}",
                "trainer_state.json: has no log_history with steps, as the trainer writes it",
            ),
            ("manifest.json", "{\n,", "manifest.json:2: is no JSON: "),
            ("manifest.json", "{}", "manifest.json: is not what a run writes: KeyError('order')"),
        ],
    )
    def test_broken_files(self, one, copied, compare, name, content, said):
        (copied / name).unlink()
        if content is not None:
            (copied / name).write_text(content)
        for pair in ((one, copied), (copied, one)):
            code, lines, err = compare(*pair)
            assert (code, lines) == (2, [])
            assert err.startswith(f"{copied / ''}{os.sep}{said}")
            assert len(err.splitlines()) == 1

    def test_no_directory(self, one, tmp_path, compare):
        code, _, err = compare(one, tmp_path / "none")
        assert (code, err) == (2, f"{tmp_path / 'none'}: there is no such directory")

    def test_a_tolerance_that_is_none(self, one, capsys):
        for value in ("-1", "nan", "x"):
            with pytest.raises(SystemExit) as stopped:
                compare_runs.main([str(one), str(one), "--tolerance", value])
            assert stopped.value.code == 2


def test_as_a_command_it_imports_nothing_heavy(one):
    heavy = "torch|transformers|trl|datasets|accelerate|numpy"
    code = f"""
import runpy, sys
sys.argv[1:] = [{str(one)!r}, {str(one)!r}]
try:
    runpy.run_path({str(ROOT / "scripts" / "compare_runs.py")!r}, run_name="__main__")
finally:
    assert not set({heavy!r}.split("|")) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "src")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same run"
