"""Answers to `sample_prompts`: what they are, when they come, and that training is the same with and without them."""

import json
import time

import pytest
import torch
from conftest import losses, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from open_r1 import generations
from open_r1.chat import get_tokenizer
from open_r1.errors import UserError
from open_r1.generations import prompts_of
from open_r1.recipe import load_recipe
from open_r1.sft import build_configs, main

PROMPTS = ["What is the Python module abc for?", "Say nothing."]


def lines(out):
    path = out / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(out):
    return [line["step"] for line in lines(out) if line["prompt"] == PROMPTS[0]]


@pytest.fixture
def argv(tiny_model, chat_file, tmp_path):
    def argv(name="run", **values):
        quick = {
            "max_steps": 4,
            "sample_prompts": PROMPTS,
            "sample_tokens": 6,
            "test_split_size": 0.02,
            "save_steps": 2,
        }
        quick |= {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / name}
        return settings(**{**quick, **values})

    return argv


class TestTheSameRun:
    @pytest.mark.parametrize(
        "values", [{}, {"activation_checkpointing": True}, {"use_peft": True, "lora_dropout": 0.5}]
    )
    def test_with_and_without(self, argv, tmp_path, values):
        values = {"max_steps": 6, "sample_steps": 1, "dataloader_num_workers": 0, "test_split_size": None, **values}
        assert main(argv("with", **values)) == 0
        assert main(argv("without", **{**values, "sample_prompts": None})) == 0
        assert losses(tmp_path / "with") == losses(tmp_path / "without")
        assert steps(tmp_path / "with") == [*range(7)] and not steps(tmp_path / "without")
        digests = [
            json.loads((tmp_path / name / "checkpoint-6/checkpoint.json").read_text())["files"]
            for name in ("with", "without")
        ]
        for name in ("model.safetensors", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
            assert digests[0].get(name) == digests[1].get(name)

    def test_the_model_is_left_as_it_was(self, argv, monkeypatch):
        seen = []
        ask = generations.Answers.ask

        def watched(self):
            def state():
                model = self.trainer.model
                modes = [module.training for module in model.modules()]
                checkpointed = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
                return modes, model.config.use_cache, torch.get_rng_state().tolist(), checkpointed

            before = state()
            ask(self)
            seen.append((self.trainer.state.global_step, before == state(), before[0][0]))
            assert before[-1].count(True) == 2  # of the backbone and one of its two layers

        monkeypatch.setattr(generations.Answers, "ask", watched)
        every_second = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
        assert main(argv(sample_steps=2, **every_second)) == 0
        assert [step for step, *_ in seen] == [0, 2, 4, 4] and all(same for _, same, _ in seen)
        assert seen[1][2]  # it was in training

    def test_stopped_and_gone_on(self, argv, tmp_path):
        values = {"lr_scheduler_type": "constant", "sample_steps": 1}
        assert main(argv("whole", **values)) == 0
        assert main(argv("half", **values, max_steps=3)) == 0
        (tmp_path / "half" / "samples.jsonl").open("a").write('{"step": 3, "te')  # killed while it wrote
        assert main(argv("half", **values)) == 0
        assert lines(tmp_path / "half") == lines(tmp_path / "whole")
        assert losses(tmp_path / "half") == losses(tmp_path / "whole")

    def test_a_new_run_in_an_old_directory_starts_over(self, argv, tmp_path):
        out = tmp_path / "run"
        out.mkdir()
        (out / "samples.jsonl").write_text('{"step": 0, "prompt": "old"}\n{"step": 9, "prompt": "old"}\n')
        assert main(argv(sample_steps=4)) == 0
        assert steps(out) == [0, 4] and len(lines(out)) == 4


class TestWhen:
    def test_with_each_evaluation(self, argv, tmp_path):
        assert main(argv(eval_strategy="steps", eval_steps=2)) == 0
        assert steps(tmp_path / "run") == [0, 2, 4]

    def test_before_and_at_the_end_where_nothing_is_evaluated(self, argv, tmp_path):
        assert main(argv(test_split_size=None)) == 0
        assert steps(tmp_path / "run") == [0, 4]

    def test_every_so_many_steps_whatever_is_evaluated(self, argv, tmp_path):
        assert main(argv(sample_steps=3, eval_strategy="steps", eval_steps=2)) == 0
        assert steps(tmp_path / "run") == [0, 3, 4]

    def test_without_prompts_there_is_nothing(self, argv, tmp_path):
        assert main(argv(sample_prompts=None)) == 0
        assert not (tmp_path / "run" / "samples.jsonl").exists()


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2}
BEST |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the first one


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ({"learning_rate": 1e-2, "max_steps": 20}, 20),
        ({**BEST, "max_steps": 6, "sample_steps": 6}, 2),
        ({**BEST, "max_steps": 6}, None),  # asked when it was evaluated already
    ],
)
def test_the_last_answers_are_those_of_the_saved_model(argv, tmp_path, values, step):
    assert main(argv(**values, sample_tokens=12)) == 0
    out = tmp_path / "run"
    if step is None:
        assert steps(out) == [0, 2, 4, 6]
        return
    if "load_best_model_at_end" in values:
        assert json.loads((out / "trainer_state.json").read_text())["best_global_step"] == step
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    for line in lines(out)[-2:]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": line["prompt"]}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        said = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        stopped = said[-1] == tokenizer.eos_token_id
        assert (line["step"], line["tokens"], line["stopped"]) == (step, len(said), stopped)
        assert line["text"] == tokenizer.decode(said[:-1] if stopped else said)


def test_they_are_in_the_log_and_in_tensorboard(argv, tmp_path, caplog, monkeypatch):
    told = []

    class Board(TrainerCallback):
        class tb_writer:
            def add_text(name, text, step):
                told.append((name, text, step))

    monkeypatch.setattr("open_r1.callbacks.get_callbacks", lambda args: [Board()])
    caplog.set_level("INFO", "open_r1")
    assert main(argv()) == 0
    for line in lines(tmp_path / "run"):
        number = PROMPTS.index(line["prompt"])
        assert (f"sample_prompts/{number}", f"{line['prompt']}\n\n{line['text']}", line["step"]) in told
    assert f"step 4, {PROMPTS[1]} -> " in caplog.text


def test_a_failure_is_reported_and_training_goes_on(argv, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(generations, "greedy_answer", lambda *args, **kwargs: 1 / 0)
    assert main(argv()) == 0
    assert "sample_prompts were not answered at step 0; training goes on" in caplog.text
    assert "ZeroDivisionError" in caplog.text and len(losses(tmp_path / "run")) == 4


def test_their_time_is_none_of_a_steps(argv, tmp_path, monkeypatch):
    answer = generations.greedy_answer
    monkeypatch.setattr(generations, "greedy_answer", lambda *args, **more: time.sleep(0.7) or answer(*args, **more))
    assert main(argv(sample_steps=1, test_split_size=None)) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["step_seconds"] < 1.4 for line in logged if "loss" in line)
    assert logged[-1]["train_evaluation_seconds"] > 8 * 0.7


class TestPrompts:
    @pytest.fixture
    def rendered(self, argv, tmp_path):
        def rendered(prompts, **values):
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text(json.dumps({"sample_prompts": prompts}))
            given = [*argv(sample_prompts=None, **values), "--config", str(recipe)]
            _, args, model_args = build_configs(load_recipe(given))
            tokenizer = get_tokenizer(model_args, args)
            return [(prompt.text, tokenizer.decode(prompt.ids)) for prompt in prompts_of(args, tokenizer)]

        return rendered

    def test_texts_and_rows(self, rendered):
        talk = [("user", "Hi"), ("assistant", "Ho"), ("user", "And?")]
        found = rendered(["Hi", {"messages": [{"role": role, "content": text} for role, text in talk]}])
        assert found[0] == ("Hi", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert found[1][0] == "user: Hi\nassistant: Ho\nuser: And?"
        assert found[1][1].endswith("Ho<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")

    def test_the_system_prompt_of_training(self, rendered):
        [(_, text)] = rendered(["Hi"], system_prompt="Be brief.")
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")

    @pytest.mark.parametrize(
        ("prompt", "what"),
        [
            ("", "message 0 (user) is empty"),
            ({"messages": []}, "the last message is to be one that the assistant answers"),
            (
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
                "the last message",
            ),
            ({"messages": [{"role": "user"}]}, "has no content"),
            ({"messages": [{"role": "king", "content": "a"}]}, "has the role 'king'"),
            ("word " * 200, "tokens long, and max_length is 128"),
        ],
    )
    def test_what_cannot_be_asked_is_a_users_mistake(self, rendered, prompt, what):
        with pytest.raises(UserError, match=r"^sample_prompts\.1: cannot be asked: ") as error:
            rendered(["fine", prompt])
        assert what in str(error.value)

    def test_it_is_said_before_data_and_weights(self, argv, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("open_r1.preparation.prepare", lambda *args: 1 / 0)
        assert main(argv(sample_prompts=["  "])) == 2
        assert "sample_prompts.0: cannot be asked: message 0 (user) is empty" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("said", "what"),
        [
            ([{"message": []}], "sample_prompts.0.message is not a setting"),
            ([{"tools": []}], "sample_prompts.0 lacks messages"),
            ([3], "sample_prompts.0 is string or object; found 3"),
        ],
    )
    def test_shapes_are_checked_with_the_recipe(self, rendered, said, what):
        with pytest.raises(UserError, match=what):
            rendered(said)

    @pytest.mark.parametrize(("key", "number"), [("sample_steps", 5), ("sample_tokens", 9)])
    def test_what_has_no_effect_is_said(self, argv, key, number):
        recipe = load_recipe(argv(**{"sample_prompts": None, "sample_tokens": None, key: number}))
        assert f"command line: {key} has no effect without sample_prompts" in recipe.notes

    def test_under_fsdp_they_are_left_out_with_a_warning(self, rendered, monkeypatch, caplog):
        monkeypatch.setattr(generations, "launch_of", lambda args: "fsdp")
        assert rendered(["Hi"]) == []
        assert "sample_prompts: left out: under FSDP" in caplog.text
