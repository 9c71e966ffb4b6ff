"""Dtype, attention, vocabulary and adapters: what is decided before weights are loaded, and what is done to them."""

import itertools

import pytest
import torch
from make_docstrings import write_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from open_r1.chat import get_tokenizer
from open_r1.configs import ModelConfig, SFTConfig
from open_r1.errors import UserError
from open_r1.memory import size_of
from open_r1.model import adapter_config, adapters_cast, check_model, fit_vocabulary, get_model, weights_dtype


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


@pytest.fixture
def adapted(tiny_model):
    """A bfloat16 model with float32 adapters that say something, and token ids for it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False))
    return model.train(), torch.arange(5, 45)[None]


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
