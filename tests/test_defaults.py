"""What a recipe leaves open: settled by model, data and machine, said with its reason; what it says stands."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import losses, settings
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3nTextConfig, GPT2Config, Qwen3Config
from trl.kernels import chunked_logprob

from open_r1 import defaults
from open_r1.attention import keeps_documents
from open_r1.configs import ModelConfig, SFTConfig
from open_r1.defaults import SELECTIVE, bound, capacity_of, checkpointing, liger, settle, workers
from open_r1.finish import out_of_memory
from open_r1.memory import DEPTHS, IN_PLACE, device_memory, keep_less, plan_memory
from open_r1.sft import main
from open_r1.trainer import OrderedTrainer

OPEN = {"padding_free", "activation_checkpointing", "dataloader_num_workers", "use_liger_kernel"}
LARGE = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)


def arguments(**values):
    return SFTConfig(**{"output_dir": "unused", "use_cpu": True, **values})


def part(longest=64, batch=8):
    total = {"padding_share": 0.6, "batch": batch}
    return SimpleNamespace(lengths=np.array([longest, 3]), ledger={"total": total})


@pytest.fixture
def config(tiny_model):
    return AutoConfig.from_pretrained(tiny_model)


@pytest.fixture
def start(tiny_model, chat_file, tmp_path):
    """Run a recipe; returns the settings of its manifest and its losses."""

    def start(name, **values):
        out = tmp_path / name
        common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "dataset_max_samples": 60}
        common |= {"output_dir": out, "activation_checkpointing": None, "max_steps": 5}
        assert main(settings(**{**common, **values})) == 0
        return json.loads((out / "manifest.json").read_text())["settings"], losses(out)

    return start


def test_a_recipe_leaves_open_what_it_does_not_say():
    assert arguments().unsettled == OPEN
    said = arguments(padding_free=False, activation_checkpointing=True, dataloader_num_workers=0)
    assert said.unsettled == {"use_liger_kernel"}
    assert arguments(use_liger_kernel=False).unsettled == OPEN - {"use_liger_kernel"}
    assert arguments(gradient_checkpointing=False).unsettled == OPEN - {"activation_checkpointing"}


def test_what_is_settled_is_said_with_its_reason(config, caplog):
    args = arguments()
    with caplog.at_level(logging.INFO):
        settle(args, ModelConfig(), config, part(), 512, why_not="")
    assert (args.padding_free, args.activation_checkpointing, args.dataloader_num_workers) == (True, False, 0)
    assert args.gradient_checkpointing is False and args.use_liger_kernel is False
    said = [record.message.partition(":")[0] for record in caplog.records]
    assert said == sorted(OPEN - {"use_liger_kernel"})  # of which nothing is to be said on a CPU
    assert "padding_free: true by default: without it 60.0% of a batch of 8 rows would be padding" in caplog.text


def test_what_a_recipe_says_stands(config, caplog):
    args = arguments(padding_free=False, activation_checkpointing=True, dataloader_num_workers=3)
    with caplog.at_level(logging.INFO):
        settle(args, ModelConfig(), config, part(), 512, why_not="")
    assert (args.padding_free, args.activation_checkpointing, args.dataloader_num_workers) == (False, True, 3)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("values", "why_not", "why"),
    [
        ({"packing": True}, "", "rows are packed"),
        ({"per_device_train_batch_size": 1}, "", "a batch is one row"),
        ({}, "sdpa would compare all pairs", "sdpa would compare all pairs"),
    ],
)
def test_rows_are_padded_where_nothing_is_gained(config, caplog, values, why_not, why):
    args = arguments(**values)
    with caplog.at_level(logging.INFO):
        settle(args, ModelConfig(), config, part(), 512, why_not)
    assert args.padding_free is False
    assert f"padding_free: false by default: {why}" in caplog.text


@pytest.mark.parametrize(
    ("more", "config", "on", "why"),
    [
        ({}, {}, True, "take less time and memory"),
        ({"torch_compile": True}, {}, False, "torch_compile fuses the same"),
        ({"plan_processes": 8}, {}, False, "is not known; the run settles it"),
        ({"dry_run": True, "plan_gpu": "H100"}, {}, False, "is not known; the run settles it"),
        ({"lora_target_parameters": ["mlp.experts.gate_up_proj"]}, {}, False, "tried with the dense models of llama"),
        ({}, {"model_type": "qwen3_moe"}, False, "tried with the dense models of llama"),
        ({}, {"auto_map": {"AutoModelForCausalLM": "model.Mine"}}, False, "tried with the dense models of llama"),
        ({"installed": False}, {}, False, "liger-kernel is not installed, which would make it faster"),
        ({"loads": False}, {}, False, "does not load here (ImportError: 'no triton')"),
        ({"device": torch.device("cpu")}, {}, False, ""),
    ],
)
def test_ligers_kernels_where_they_are_to_be_had(monkeypatch, more, config, on, why):
    def load(name):
        if not more.get("loads", True):
            raise ImportError("no triton")

    monkeypatch.setattr(defaults.importlib, "import_module", load)
    monkeypatch.setattr(defaults, "is_liger_kernel_available", lambda: more.get("installed", True))
    usual = {"torch_compile": False, "plan_processes": None, "dry_run": False, "plan_gpu": None}
    args = SimpleNamespace(**{**usual, "device": torch.device("cuda"), "lora_target_parameters": None, **more})
    found, reason = liger(args, args, SimpleNamespace(**{"model_type": "qwen3", **config}))
    assert found == on and why in reason
    assert bool(why) == bool(reason)


class TestCheckpointing:
    """By plans of a model of six layers, 8 rows of 512 tokens, against the memory that a device is said to have."""

    @pytest.fixture
    def settled(self, monkeypatch):
        def settled(capacity, **values):
            monkeypatch.setattr(defaults, "capacity_of", lambda args: capacity)
            return checkpointing(arguments(**values), ModelConfig(), LARGE, part(512), LARGE.vocab_size)

        return settled

    @pytest.fixture(scope="class")
    def plans(self):
        """Bytes of a step by how many layers are computed again: none, one in 6, one in 3, one in 2, all."""

        def total(every):
            args = arguments(activation_checkpointing=bool(every))
            args.activation_checkpointing_kwargs = {"every_n_layers": every}
            return plan_memory(LARGE, "float32", ModelConfig(), args, 512, LARGE.vocab_size)["total"]

        return [total(every) for every in (None, 6, 3, 2, 1)]

    def test_fewer_layers_kept_take_less(self, plans):
        assert plans == sorted(plans, reverse=True) and plans[-1] < 0.8 * plans[0]

    def test_off_where_all_fits(self, settled, plans):
        on, how, why = settled(int(plans[0] / 0.79))
        assert (on, how) == (False, None) and "keeping them takes" in why

    def test_of_some_layers_where_it_nearly_fits(self, settled, plans):
        for place, every in ((1, 6), (2, 3), (3, 2)):
            on, how, why = settled(int(plans[place] / 0.79))
            assert (on, how) == (True, {"every_n_layers": every}) and f"one layer in {every}" in why

    def test_plans_of_deep_models_tell_them_apart(self):
        assert all(depth % every == 0 for depth in DEPTHS for every in SELECTIVE)

    def test_on_where_it_does_not(self, settled, plans):
        assert settled(int(plans[4] / 0.79))[:2] == (True, None)
        assert settled(2**20)[:2] == (True, None)

    def test_on_where_the_device_is_not_known(self, settled):
        on, how, why = settled(None)
        assert (on, how) == (True, None) and "plan_gpu" in why

    def test_a_padded_batch_is_planned_as_one(self, config, monkeypatch):
        """Where `padding_free` is settled to false first, a row of all of them is none that is to be planned."""
        flat = []
        monkeypatch.setattr(defaults, "capacity_of", lambda args: 2**20)
        monkeypatch.setattr(
            defaults,
            "plan_memory",
            lambda _, __, ___, args, *_____: flat.append(keeps_documents(args)) or {"total": 1},
        )
        settle(arguments(), ModelConfig(), config, part(), 512, "sdpa would")
        settle(arguments(), ModelConfig(), config, part(), 512, "")
        assert flat == [False, True]

    def test_a_cpu_that_nobody_named_is_known(self, monkeypatch):
        monkeypatch.setattr(defaults, "main_memory", lambda: 2**34)
        said = {"use_cpu": False, "device": torch.device("cpu"), "plan_processes": None, "plan_gpu": None}
        assert capacity_of(SimpleNamespace(**said, dry_run=False)) == 2**34
        assert capacity_of(SimpleNamespace(**said, dry_run="text")) == device_memory(None)  # for GPUs elsewhere

    def test_arguments_that_are_given_ask_for_it(self, settled):
        given = {"use_reentrant": False}
        assert settled(2**60, activation_checkpointing_kwargs=given)[:2] == (True, given)

    def test_nothing_is_planned_for_what_fits_in_any_case(self, settled, monkeypatch):
        monkeypatch.setattr(defaults, "plan_memory", lambda *_: pytest.fail("planned"))
        assert settled(2**50)[:2] == (False, None)

    def test_a_model_that_cannot_be_planned_keeps_it(self, settled, monkeypatch):
        monkeypatch.setattr(defaults, "plan_memory", lambda *_: 1 / 0)
        on, _, why = settled(2**30)
        assert on and "ZeroDivisionError" in why

    def test_the_bound_is_one(self, plans):
        assert bound(arguments(), LARGE, 512, LARGE.vocab_size) > 1.5 * plans[0]

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("values", [{}, {"padding_free": True}, {"label_smoothing_factor": 0.1}])
    @pytest.mark.parametrize("shape", [(8, 128), (2, 1024)])
    @pytest.mark.parametrize("kind", [Qwen3Config, GPT2Config])
    def test_the_bound_is_one_for_small_models(self, kind, shape, values, attention):
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 1000}
        config = kind(
            **sizes,
            **({"head_dim": 128, "num_key_value_heads": 4, "intermediate_size": 256} if kind is Qwen3Config else {}),
        )
        args = arguments(activation_checkpointing=False, per_device_train_batch_size=shape[0], **values)
        model_args = ModelConfig(attn_implementation=attention)
        found = plan_memory(config, "float32", model_args, args, shape[1], config.vocab_size)["total"]
        assert bound(args, config, shape[1], config.vocab_size) > 1.5 * found

    def test_on_a_gpu_the_loss_holds_one_tile_of_logits(self):
        """In PyTorch's operations some seven float32 copies of it, of 4,096 tokens and 32,768 words each."""
        before = {name: getattr(chunked_logprob, name) for name in IN_PLACE}
        here, there = (
            plan_memory(LARGE, "float32", ModelConfig(), arguments(**where), 512, LARGE.vocab_size)["total"]
            for where in ({}, {"plan_processes": 1, "plan_gpu": "H200"})
        )
        assert 2 < (here - there) / 2**30 < 4
        assert {name: getattr(chunked_logprob, name) for name in IN_PLACE} == before

    def test_layers_on_ligers_kernels_keep_less_and_compute_the_same(self, config, plans):
        args = arguments(activation_checkpointing=False, use_liger_kernel=True)
        assert plan_memory(LARGE, "float32", ModelConfig(), args, 512, LARGE.vocab_size)["total"] < 0.95 * plans[0]
        torch.manual_seed(0)
        model, ids = AutoModelForCausalLM.from_config(config).train(), torch.arange(3, 40)[None]

        def learnt():
            loss = model(input_ids=ids, labels=ids).loss
            model.zero_grad()
            loss.backward()
            return [loss.detach(), *(weight.grad.clone() for weight in model.parameters())]

        before = learnt()
        keep_less(model)
        assert all(torch.equal(one, other) for one, other in zip(before, learnt(), strict=True))

    def test_the_bound_takes_layers_of_different_widths(self):
        config = Gemma3nTextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
        assert bound(arguments(), config, 128, config.vocab_size) > 0

    def test_weights_as_they_are_stored_are_planned(self, monkeypatch, plans):
        monkeypatch.setattr(defaults, "capacity_of", lambda args: int(plans[0] / 0.79))
        on, _, why = checkpointing(arguments(), ModelConfig(dtype="auto"), LARGE, part(512), LARGE.vocab_size)
        assert not on and "keeping them takes" in why

    def test_a_model_that_has_no_bound_keeps_it(self, monkeypatch):
        monkeypatch.setattr(defaults, "bound", lambda *_: 1 / 0)
        on, _, why = checkpointing(arguments(), ModelConfig(), LARGE, part(512), LARGE.vocab_size)
        assert on and "ZeroDivisionError" in why

    def test_some_layers_reach_the_model(self, start, monkeypatch):
        monkeypatch.setattr(
            defaults, "checkpointing", lambda *_: (True, {"every_n_layers": 2, "use_reentrant": False}, "said")
        )
        kept, step = [], OrderedTrainer.training_step

        def spy(self, model, *args, **kwargs):
            kept.append([layer.gradient_checkpointing for layer in model.model.layers])
            return step(self, model, *args, **kwargs)

        monkeypatch.setattr(OrderedTrainer, "training_step", spy)
        found, _ = start("some", max_steps=1)
        assert found["activation_checkpointing"] is True
        assert kept and kept[0] == [number % 2 == 0 for number in range(len(kept[0]))]


class TestMemory:
    def test_of_a_cpu_each_process_has_its_share(self, monkeypatch):
        whole = capacity_of(arguments())
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert capacity_of(arguments()) == whole // 4

    def test_of_machines_elsewhere_it_is_that_of_the_gpu_named(self):
        assert capacity_of(arguments(plan_processes=8, plan_gpu="H100")) == 80 * 2**30
        assert capacity_of(arguments(plan_processes=8, plan_gpu="nothing")) is None

    def test_when_it_is_full_the_run_says_what_to_do(self, start, monkeypatch, capsys):
        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

        monkeypatch.setattr(OrderedTrainer, "training_step", full)
        with pytest.raises(AssertionError, match="assert 1 == 0"):
            start("full", per_device_train_batch_size=4)
        said = capsys.readouterr().err
        assert "step 1: the device's memory is full (CUDA out of memory); set activation_checkpointing: true" in said
        assert "per_device_train_batch_size: 2 with global_batch_size: 4, the same steps" in said

    @pytest.mark.parametrize(
        ("method", "error", "said"),
        [
            (
                "prediction_step",
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
                "evaluation at step 3: the device's memory is full (CUDA out of memory); set "
                "per_device_eval_batch_size: 2, the same losses",
            ),
            (
                "training_step",
                RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                "step 1: the device's memory is full (CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
            ),
            (
                "_move_model_to_device",
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
                "the model does not fit into the device's memory (CUDA out of memory); see with nvidia-smi",
            ),
        ],
        ids=["evaluation", "library", "placing"],
    )
    def test_wherever_it_is_full(self, start, monkeypatch, capsys, method, error, said):
        def full(*args, **kwargs):
            raise error

        monkeypatch.setattr(OrderedTrainer, method, full)
        if method == "_move_model_to_device":
            monkeypatch.setattr(OrderedTrainer, "place_model_on_device", True, raising=False)
        evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
        with pytest.raises(AssertionError, match="assert 1 == 0"):
            start("full", **evaluation, test_split_size=0.2)
        assert said in capsys.readouterr().err

    def test_in_the_last_evaluation_too_and_the_model_is_saved(self, start, monkeypatch, caplog, tmp_path):
        whole = OrderedTrainer.evaluation_loop

        def full(self, *args, **kwargs):
            if not self.is_in_train:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(OrderedTrainer, "evaluation_loop", full)
        with pytest.raises(AssertionError, match="assert 1 == 0"):
            start("full", test_split_size=0.2, do_eval=True, per_device_eval_batch_size=8)
        [said] = [record for record in caplog.records if record.message.startswith("evaluation failed")]
        assert "set per_device_eval_batch_size: 4, the same losses" in said.message and said.exc_info is None
        assert list(tmp_path.rglob("full/model.safetensors"))

    def test_what_is_another_error_stays_one(self, start, monkeypatch):
        def broken(*args, **kwargs):
            raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

        monkeypatch.setattr(OrderedTrainer, "training_step", broken)
        with pytest.raises(RuntimeError, match="size of tensor a"):
            start("broken")

    @pytest.mark.parametrize(("how", "offered"), [(None, False), ({"every_n_layers": 3}, True)])
    def test_where_only_some_layers_are_computed_again_all_of_them_are_a_way(self, how, offered):
        args = arguments(activation_checkpointing=True, activation_checkpointing_kwargs=how)
        trainer = SimpleNamespace(args=args, order=SimpleNamespace(batch=8), state=SimpleNamespace(global_step=0))
        assert ("activation_checkpointing: true" in out_of_memory(trainer, MemoryError("full"))) is offered


class TestWorkers:
    @pytest.mark.parametrize(
        ("device", "shares", "count"),
        [
            ("cpu", [("a", range(64))], 0),
            ("cuda", [("a", range(16))], 2),
            ("cuda", [("a", range(16))] * 4, 2),
            ("cuda", [("a", range(16))] * 5, 0),
            ("cuda", [("a", range(16))] * 4 + [("b", range(16))] * 4, 2),
            ("cuda", [("a", range(16))] * 4 + [("b", range(8))] * 4, 0),  # all are told the same
            ("cuda", [("a", range(4 * rank, 4 * rank + 4)) for rank in range(4)], 2),  # a scheduler dealt them out
            ("cuda", [("a", range(4 * rank, 4 * rank + 3)) for rank in range(4)], 0),
        ],
    )
    def test_they_are_for_gpus_with_cores_to_spare(self, device, shares, count):
        args = SimpleNamespace(device=torch.device(device), plan_processes=None)
        assert workers(args, [(host, set(cores)) for host, cores in shares])[0] == count

    def test_the_cores_are_those_that_this_process_may_use(self, monkeypatch):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
        assert defaults.cores_here() == {3, 5}

    def test_of_machines_elsewhere_nothing_is_said(self):
        count, why = workers(arguments(plan_processes=8, plan_gpu="H100"), [])
        assert count == 0 and "elsewhere" in why


def test_without_padding_the_same_is_learnt(start):
    settled, without = start("default")
    assert (settled["padding_free"], settled["activation_checkpointing"]) == (True, False)
    padded, with_it = start("padded", padding_free=False)
    assert padded["padding_free"] is False
    assert np.abs(np.subtract(without, with_it)).max() < 1e-5
    assert len(without) == 5
