"""What a model computes, against torch's counter of what it did; and what devices are said to reach."""

import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV2Config,
    DeepseekV32Config,
    FalconH1Config,
    Gemma3Config,
    Gemma4Config,
    Gemma4TextConfig,
    GitConfig,
    HunYuanMoEV1Config,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from open_r1.flops import KINDS, PEAKS, Work, attention, experts_of, pairs, peak_flops, peak_here, work_of

LENGTH = 48
SHAPE = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


def counted(model, length=LENGTH):
    """FLOPs of products that torch sees in one forward and backward pass; eager attention makes all pairs."""
    ids = torch.randint(0, 300, (1, length))
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def expected(work, length=LENGTH):
    """The same by our count, but for what eager attention and the head without labels do in vain."""
    return (work.token + work.label) * length + sum(work.pair.values()) * length**2


def made(config, **values):
    return AutoModelForCausalLM.from_config(config(**{**SHAPE, **values}), attn_implementation="eager")


def lora(model, targets="all-linear", **values):
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **values))


MOE = {"num_experts": 8, "moe_intermediate_size": 32, "experts_implementation": "eager"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


class TestAgainstTorch:
    def test_full_training_to_the_flop(self):
        model = made(Qwen3Config)
        assert counted(model) == expected(work_of(model))

    def test_tied_embeddings_are_a_head_and_a_look_up(self):
        model = made(Qwen3Config, tie_word_embeddings=True)
        assert counted(model) == expected(work_of(model))
        assert work_of(model).label == 6 * 300 * 64

    def test_an_adapter(self):
        """To the FLOP where inputs have gradients, as activation checkpointing makes them.

        Else torch leaves out the gradients of what goes into the first layer, which nothing needs.
        """
        model = lora(made(Qwen3Config))
        without = counted(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.enable_input_require_grads()
        assert counted(model) == expected(work_of(model))
        first = 2 * LENGTH * (64 * (64 + 32 + 32) + 3 * 64 * 4)  # of q, k, v and their adapters
        assert without == expected(work_of(model)) - first
        assert work_of(model).token < 0.8 * work_of(made(Qwen3Config)).token

    def test_modules_that_are_trained_in_full_beside_an_adapter(self):
        lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(made(Qwen3Config), lora)
        assert work_of(model).label == 6 * 300 * 64

    def test_an_adapter_on_the_last_layers(self):
        """Below it there is no gradient, of weights nor of attention."""
        model = lora(made(Qwen3Config, num_hidden_layers=8), LINEAR, layers_to_transform=[6, 7])
        first = 2 * LENGTH * (64 * (64 + 32 + 32) + 3 * 64 * 4)  # of q, k, v and their adapters in the layer
        assert counted(model) == expected(work_of(model)) - first

    def test_a_norm_behind_the_layers_needs_none_of_theirs_and_embeddings_need_all(self):
        model = lora(made(Qwen3Config), LINEAR, layers_to_transform=[2])
        without = work_of(model)
        model.get_decoder().norm.weight.requires_grad_(True)
        assert work_of(model) == without
        model.get_decoder().embed_tokens.weight.requires_grad_(True)
        assert work_of(model).token > without.token
        assert work_of(model).pair == {None: 3 * 12 * 64} != without.pair

    def test_a_head_alone(self):
        model = made(Qwen3Config)
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        full = work_of(made(Qwen3Config))
        assert work_of(model) == Work(full.token / 3, full.label, {None: full.pair[None] / 3})

    @pytest.mark.parametrize(
        ("config", "more"),
        [
            (Qwen3MoeConfig, {"num_experts_per_tok": 2}),
            (Qwen2MoeConfig, {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 48}),
            (AriaTextConfig, {"moe_num_experts": 8, "moe_topk": 2, "pad_token_id": 0}),
            (
                Gemma4TextConfig,
                {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 16, "sliding_window": LENGTH}
                | {"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
            ),
        ],
    )
    def test_experts_that_are_active(self, config, more):
        model = made(config, **{**MOE, **more})
        assert counted(model) == expected(work_of(model))

    @pytest.mark.parametrize("config", [Gemma3Config, Gemma4Config])
    @pytest.mark.parametrize("adapter", [False, True])
    def test_towers_see_no_text(self, config, adapter):
        text = {**SHAPE, "sliding_window": LENGTH, "pad_token_id": 0}
        if config is Gemma4Config:
            text |= {"global_head_dim": 16, "hidden_size_per_layer_input": 0}
            text["layer_types"] = ["sliding_attention"] * 2 + ["full_attention"]
        whole = config(text_config=text, vision_config=VISION)
        model = AutoModelForCausalLM.from_config(whole, attn_implementation="eager")
        if adapter:
            model = lora(model)
            model.enable_input_require_grads()
        assert counted(model) == expected(work_of(model))

    def test_a_trainer_scores_labels_alone_and_documents_apart(self):
        work = Work(token=10.0, label=100.0, pair={None: 1.0})
        assert work.of(np.array([3, 4])).tolist() == [30 + 6, 40 + 10]


class TestUnknown:
    """What is not known is not a number, and null where it is logged."""

    def test_how_many_experts(self):
        with torch.device("meta"):
            model = made(DeepseekV2Config, n_routed_experts=4, num_experts_per_tok=None)
        assert np.isnan(work_of(model).token) and not np.isnan(work_of(model).label)

    def test_experts_by_all_their_names(self):
        assert experts_of(DbrxConfig(ffn_config={"moe_num_experts": 16, "moe_top_k": 4})) == (16, 4)
        assert experts_of(HunYuanMoEV1Config(num_experts=8, moe_topk=[2, 2])) == (8, 2)
        assert np.isnan(experts_of(HunYuanMoEV1Config(num_experts=8, moe_topk=[2, 1]))[1])
        assert np.isnan(experts_of(Qwen3Config())).all()

    @pytest.mark.parametrize("config", [FalconH1Config, DeepseekV32Config])
    def test_layers_that_attend_in_some_other_way(self, config):
        assert np.isnan(attention(config(num_hidden_layers=2))[None])

    def test_towers_in_a_text_model(self):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(GitConfig(num_hidden_layers=2))
        assert np.isnan(work_of(model).token)

    def test_layers_that_are_not_gone_through_once_each(self):
        model = made(Qwen3Config)
        model.config.num_hidden_layers = 6
        assert np.isnan([work_of(model).token, work_of(model).label]).all()


class TestAttention:
    def test_pairs(self):
        assert pairs(np.array([1, 4])).tolist() == [1, 10]
        square = [[q - k < 3 and q >= k for k in range(7)] for q in range(7)]
        assert pairs(np.array([7]), 3).tolist() == [np.sum(square)]

    def test_windows_by_layer(self):
        types = ["full_attention", "sliding_attention", "sliding_attention"]
        found = attention(Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=8, layer_types=types))
        assert found == {None: 12 * 64, 8: 2 * 12 * 64}
        assert attention(MistralConfig(**SHAPE, sliding_window=8)) == {8: 3 * 12 * 64}
        assert attention(Qwen3Config(**SHAPE)) == {None: 3 * 12 * 64}

    def test_heads_that_are_wider_in_some_layers(self):
        types = ["sliding_attention", "sliding_attention", "full_attention"]
        config = Gemma4TextConfig(**SHAPE, global_head_dim=32, sliding_window=8, layer_types=types)
        assert attention(config) == {8: 2 * 12 * 4 * 16, None: 12 * 4 * 32}

    def test_of_a_model_that_says_no_heads_it_is_not_known(self):
        assert attention(MambaConfig()) == {}
        assert np.isnan(attention(PretrainedConfig(num_hidden_layers=2))[None])

    def test_layers_without_it_and_values_of_another_size(self):
        config = PretrainedConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, v_head_dim=8)
        config.layer_types, config.qk_head_dim = ["linear_attention", "full_attention"], 24
        assert attention(config) == {None: 3 * 2 * 4 * (24 + 8)}


class TestPeaks:
    @pytest.mark.parametrize(
        ("name", "kind", "tera"),
        [
            ("NVIDIA A100-SXM4-80GB", "bf16", 312),
            ("A100-SXM4-40GB", "tf32", 156),
            ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
            ("NVIDIA H100 PCIe", "bf16", 756),
            ("NVIDIA H100 NVL", "fp16", 835.5),
            ("NVIDIA H200", "fp32", 67),
            ("NVIDIA GH200 480GB", "bf16", 989.5),
            ("NVIDIA L4", "bf16", 121),
            ("NVIDIA L40S", "bf16", 362.05),
            ("NVIDIA A10", "bf16", 125),
            ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
            ("Tesla T4", "fp16", 65),
            ("Tesla T4", "bf16", None),
            ("Tesla V100-SXM2-16GB", "fp16", 125),
            ("AMD Instinct MI300X", "bf16", 1307.4),
            *((other, "bf16", None) for other in ("NVIDIA A10G", "NVIDIA GeForce RTX 4090 D", "Radeon", "cpu")),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ],
    )
    def test_by_the_name_of_a_device(self, name, kind, tera):
        found = peak_flops(name, kind)
        assert (found and found / 1e12) == (tera and pytest.approx(tera))

    def test_every_device_says_all_kinds(self):
        assert all(len(peaks) == len(KINDS) for peaks in PEAKS.values())

    def test_the_kind_follows_from_what_is_computed_in(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
        cuda = torch.device("cuda")
        assert peak_here(cuda, "bf16", torch.float32) == 312e12
        assert peak_here(cuda, None, torch.bfloat16) == 312e12
        assert peak_here(cuda, None, torch.float32) == 19.5e12
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            assert peak_here(cuda, None, torch.float32) == 156e12
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        assert peak_here(torch.device("cpu"), "bf16", torch.float32) is None
