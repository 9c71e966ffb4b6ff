"""Dtype, attention, vocabulary and adapters: what is decided before weights are loaded, and what is done to them."""

import contextlib
import itertools

import pytest
import torch
from make_docstrings import write_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl import SFTTrainer

from open_r1.chat import get_tokenizer
from open_r1.configs import ModelConfig, SFTConfig
from open_r1.errors import UserError
from open_r1.memory import size_of
from open_r1.model import (
    adapter_config,
    adapters_cast,
    adapters_fused,
    check_model,
    fit_vocabulary,
    get_model,
    weights_dtype,
)


def arguments(**values):
    return SFTConfig(**{"output_dir": "unused", "use_cpu": True, **values})


@pytest.fixture
def small_vocabulary(tmp_path, pairs):
    """A tied model whose vocabulary lacks the ChatML tokens."""
    write_model(tmp_path / "small", itertools.chain.from_iterable(pairs[:50]), 400, 32, 1, special=["<|endoftext|>"])
    return str(tmp_path / "small")


@pytest.mark.parametrize(
    ("model", "training", "deepspeed", "expected"),
    [
        ({}, {"bf16": True}, False, "float32"),
        ({}, {"bf16": True}, True, "bfloat16"),
        ({"use_peft": True}, {"bf16": True}, False, "bfloat16"),
        ({"use_peft": True}, {"bf16": False}, False, "float32"),
        ({}, {}, False, "float32"),
        ({"use_peft": True}, {"fp16": True, "use_cpu": True}, False, "float16"),
        ({"dtype": "float16"}, {"bf16": True}, True, "float16"),
    ],
)
def test_dtype_follows_how_the_model_is_trained(model, training, deepspeed, expected):
    args = arguments(**training)
    args.deepspeed_plugin = object() if deepspeed else None
    assert weights_dtype(ModelConfig(**model), args) == expected


def test_bfloat16_weights_trained_in_full_are_warned_of(caplog):
    assert weights_dtype(ModelConfig(dtype="bfloat16"), arguments(bf16=True)) == "bfloat16"
    assert "AdamW leaves most of them unchanged" in caplog.text


def test_precision_is_said_once(monkeypatch):
    assert arguments().bf16 is False  # float32 on a CPU unless asked
    assert arguments(bf16=True).bf16 is True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments().bf16 is True
    with pytest.raises(ValueError, match="launch config says mixed_precision: bf16, the recipe says no"):
        arguments(bf16=False)


def test_a_single_lora_target_stays_a_module_name():
    assert ModelConfig(lora_target_modules=["q_proj"]).lora_target_modules == ["q_proj"]
    assert ModelConfig(lora_target_modules=["all-linear"]).lora_target_modules == "all-linear"


def test_our_defaults():
    args = arguments()
    assert (args.activation_checkpointing, args.report_to, args.push_to_hub) == (True, [], False)
    assert args.ddp_timeout >= 3600
    assert args.log_on_each_node is False
    assert arguments(gradient_checkpointing=False).activation_checkpointing is False


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ({"attn_implementation": "flash_attention_2"}, {}, "flash_attention_2 is not installed or finds no GPU here"),
        (
            {},
            {"model_init_kwargs": {"attn_implementation": "flash_attention_3"}},
            "flash_attention_3 is not installed",
        ),
        ({}, {"model_init_kwargs": {"attn_implementation": "flex_attention"}}, "flex_attention has no gradients"),
        ({"load_in_4bit": True, "use_peft": True}, {}, "need bitsandbytes"),
        ({}, {"report_to": "wandb"}, "report_to: wandb is not installed"),
        ({"model_name_or_path": "./nowhere"}, {}, "no such directory: ./nowhere"),
        ({"model_name_or_path": "nobody/nothing"}, {}, "'nobody/nothing' cannot be read"),
    ],
)
def test_what_cannot_work_is_found_without_weights(tiny_model, model, training, message, monkeypatch):
    monkeypatch.setattr("open_r1.model.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        check_model(ModelConfig(**{"model_name_or_path": tiny_model, **model}), arguments(**training))


def test_embeddings_grow_around_the_old_mean_and_never_shrink(small_vocabulary):
    model_args = ModelConfig(model_name_or_path=small_vocabulary)
    args = arguments()
    tokenizer, model = get_tokenizer(model_args, args), get_model(model_args, args)
    before = model.get_input_embeddings().weight.clone()
    fit_vocabulary(model, tokenizer)
    after = model.get_input_embeddings().weight
    assert after.shape[0] == len(tokenizer) == before.shape[0] + 2
    assert torch.equal(after[:-2], before)
    assert (after[-2:] - before.mean(0)).norm(dim=1).max() < before.norm(dim=1).max()
    assert model.get_output_embeddings().weight.data_ptr() == after.data_ptr()  # still tied
    model.resize_token_embeddings(len(tokenizer) + 60)
    fit_vocabulary(model, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 60


def test_lora_trains_and_saves_the_tokens_that_were_added(small_vocabulary, tmp_path):
    from peft import PeftModel

    model_args = ModelConfig(model_name_or_path=small_vocabulary, use_peft=True, lora_target_modules=["q_proj"])
    args = arguments(output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, disable_tqdm=True)
    tokenizer, model = get_tokenizer(model_args, args), get_model(model_args, args)
    fit_vocabulary(model, tokenizer)
    config = adapter_config(model_args, model, tokenizer)
    assert config.modules_to_save == ["embed_tokens", "lm_head"]
    start = model.get_input_embeddings().weight.clone()
    rows = [{"input_ids": [401, 400, 5, 401], "labels": [401, 400, 5, 401]}] * 8
    from datasets import Dataset

    trainer = SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))

    base = AutoModelForCausalLM.from_pretrained(small_vocabulary, dtype="float32")
    base.resize_token_embeddings(len(tokenizer))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for matrix in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        assert not torch.allclose(matrix.weight[400:402].cpu(), start[400:402], atol=1e-4)
    ids = torch.tensor([[401, 400, 5]])
    trainer.model.eval()
    with torch.no_grad():
        here, there = trainer.model(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits
    assert torch.allclose(here.cpu(), there, atol=1e-5)


def test_no_adapter_config_without_peft_or_on_an_adapter(tiny_model):
    model_args = ModelConfig(model_name_or_path=tiny_model)
    tokenizer, model = get_tokenizer(model_args, arguments()), get_model(model_args, arguments())
    assert adapter_config(model_args, model, tokenizer) is None
    config = adapter_config(ModelConfig(model_name_or_path=tiny_model, use_peft=True), model, tokenizer)
    assert config.modules_to_save is None


def learnt_by(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.item(), grads


def with_adapters(tiny_model, dtype=torch.float32, **settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 12, "init_lora_weights": False, **settings}
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**settings))


def require_alike(made, expected):
    for name in expected:
        torch.testing.assert_close(made[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.fixture
def adapted(tiny_model):
    """A bfloat16 model with float32 adapters that say something, and token ids for it."""
    return with_adapters(tiny_model, torch.bfloat16).train(), torch.arange(5, 45)[None]


def test_adapters_need_no_casts_under_autocast(adapted):
    model, ids = adapted

    def learnt(cast):
        kept = []  # for the backward pass
        with adapters_cast(model, cast), torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda kept_one: kept.append(kept_one) or kept_one, lambda x: x
            ):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        grads = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
        model.zero_grad()
        return loss, grads, size_of(kept)

    (loss, grads, more), (same, equal, less) = learnt(True), learnt(False)
    assert loss == same and grads[0].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(grads, equal, strict=True))
    assert less < more


def test_adapters_cast_again_where_there_is_no_autocast(adapted):
    model, ids = adapted
    with adapters_cast(model, False):
        with pytest.raises(RuntimeError, match="dtype"):
            model(input_ids=ids)
        with adapters_cast(model, True):
            inside = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, inside)


def test_doras_adapters_cast(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", use_dora=True))
    ids = torch.arange(5, 45)[None]
    with adapters_cast(model, False):
        assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_fused_adapters_learn_what_pefts_do(tiny_model, settings, again):
    model, ids = with_adapters(tiny_model, **settings), torch.arange(5, 65).reshape(2, 30)
    if again:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss, grads = learnt_by(model, ids)
    with adapters_fused(model):
        made = next(each for name, each in model.named_modules() if name.endswith("q_proj"))
        assert "forward" in vars(made)
        same, equal = learnt_by(model, ids)
    assert not [each for each in model.modules() if "forward" in vars(each)]
    assert same == pytest.approx(loss, abs=1e-5)
    assert grads.keys() == equal.keys() and any("lora_B" in name for name in grads)
    require_alike(equal, grads)


def test_fused_adapters_drop_what_pefts_do(tiny_model):
    model, ids = with_adapters(tiny_model, lora_dropout=0.3).train(), torch.arange(5, 65)[None]
    torch.manual_seed(1)
    loss, grads = learnt_by(model, ids)
    torch.manual_seed(1)
    with adapters_fused(model):
        same, equal = learnt_by(model, ids)
    assert same == pytest.approx(loss, abs=1e-5)
    require_alike(equal, grads)


def test_fused_adapters_round_once_under_autocast(tiny_model):
    """In bfloat16 they are as near to float32 as PEFT's."""
    ids = torch.arange(5, 65)[None]
    _, exact = learnt_by(with_adapters(tiny_model), ids)
    model = with_adapters(tiny_model, torch.bfloat16).train()

    def far(fuse):
        lean = adapters_fused(model) if fuse else contextlib.nullcontext()
        with adapters_cast(model, False), torch.autocast("cpu", torch.bfloat16), lean:
            _, grads = learnt_by(model, ids)
        assert grads.keys() == exact.keys()
        return sum(float((grads[name] - exact[name]).norm()) for name in exact)

    assert far(True) < 1.1 * far(False)
    assert far(True) < 0.2 * sum(float(each.norm()) for each in exact.values())


@pytest.mark.parametrize(
    "told",
    [{"use_dora": True}, {"lora_bias": True}, {"dtype": torch.bfloat16}],
    ids=str,
)
def test_other_adapters_stay_pefts(tiny_model, told):
    bias = told.pop("lora_bias", False)
    model = with_adapters(tiny_model, lora_bias=bias, **told)
    layer = next(each for name, each in model.named_modules() if name.endswith("gate_proj"))
    states = torch.ones(1, 3, layer.in_features, dtype=layer.weight.dtype)
    plain = layer(states)
    with adapters_fused(model):
        assert torch.equal(layer(states), plain)
        assert layer(states).grad_fn.name() == plain.grad_fn.name()


def test_fused_adapters_can_be_off_merged_or_several(tiny_model):
    model = with_adapters(tiny_model)
    layer = next(each for name, each in model.named_modules() if name.endswith("gate_proj"))
    states = torch.ones(1, 3, layer.in_features)
    with adapters_fused(model):
        with model.disable_adapter():
            assert torch.equal(layer(states), layer.base_layer(states))
        learnt = layer(states)
        assert not torch.allclose(learnt, layer.base_layer(states))
        model.merge_adapter()
        torch.testing.assert_close(layer(states), learnt)
        model.unmerge_adapter()
        model.add_adapter("other", LoraConfig(target_modules="all-linear", init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
        assert not torch.allclose(layer(states), learnt)
        model.set_adapter("default")
        torch.testing.assert_close(layer(states), learnt)


def test_fused_adapters_go_by_pefts_where_they_must(tiny_model):
    model = with_adapters(tiny_model)
    layer = next(each for name, each in model.named_modules() if name.endswith("gate_proj"))
    one, states = torch.ones(layer.in_features), torch.ones(1, 3, layer.in_features)
    plain, learnt = layer(one), layer(states)
    with adapters_fused(model):
        assert torch.equal(layer(one), plain)
        with pytest.raises(ZeroDivisionError), adapters_fused(model):  # as the one inside, it leaves all as it was
            raise ZeroDivisionError
        torch.testing.assert_close(layer(x=states), learnt)
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    layer.base_layer.register_forward_hook(lambda module, given, made: None)  # it may keep what is added to
    with adapters_fused(model):
        assert "forward" not in vars(layer)


def test_fused_adapters_on_layers_with_biases(tiny_model):
    ids = torch.arange(5, 65)[None]
    config = AutoConfig.from_pretrained(tiny_model)
    config.attention_bias = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert any(name.endswith("q_proj.base_layer.bias") for name, _ in model.named_parameters())
    loss, grads = learnt_by(model, ids)
    with adapters_fused(model):
        same, equal = learnt_by(model, ids)
    assert same == pytest.approx(loss, abs=1e-5)
    require_alike(equal, grads)
