"""Attention: `varlen` is what `sdpa` is, packed training is unpacked training, and what leaks is found and refused."""

import copy
import functools
import json
import logging
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import losses, settings
from datasets import Dataset
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma4TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    NemotronConfig,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from trl import SFTConfig as StockConfig
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from open_r1 import attention, isolation, preflight
from open_r1.attention import DocumentMask, choose, settle_attention, varlen
from open_r1.configs import ModelConfig, SFTConfig
from open_r1.errors import UserError
from open_r1.isolation import differences, sees
from open_r1.sft import main

TINY = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
KINDS = {
    "causal": Qwen3Config(**{**TINY, "num_key_value_heads": 4}, head_dim=8),
    "grouped": Qwen3Config(**TINY, head_dim=8),
    "window": MistralConfig(**TINY, head_dim=8, sliding_window=5),
    "mixed": Qwen3Config(
        **TINY,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    ),
}
LENGTHS = [7, 13, 13, 1, 20]
CLOSE = 1e-5
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
collate = DataCollatorForLanguageModeling(0, padding_free=True)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def made(kind, name, **more):
    """The same tiny model of a kind with some attention."""
    torch.manual_seed(0)
    config = copy.deepcopy(KINDS[kind])
    config.update(more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32)


def documents(lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 600, (length,), generator=draw).tolist() for length in lengths]


def packed(rows):
    """Documents as TRL's collator lays a packed row out."""
    tokens = [token for row in rows for token in row]
    inputs = collate([{"input_ids": tokens, "seq_lengths": [len(row) for row in rows]}])
    del inputs["labels"]
    return inputs


@pytest.fixture
def alone_calls(monkeypatch):
    """Windows with which documents went one by one, one for each layer of a forward."""
    calls, through = [], attention.one_by_one

    def spy(*args):
        calls.append(args[4])
        return through(*args)

    monkeypatch.setattr(attention, "one_by_one", spy)
    return calls


def gradients(model):
    return torch.cat([each.grad.flatten() for each in model.parameters()])


# What `varlen` computes


@pytest.mark.parametrize(("kind", "windows"), {"causal": 0, "grouped": 0, "window": 2, "mixed": 1}.items())
def test_a_packed_row_is_each_document_alone_on_eager(kind, windows, alone_calls):
    ours, eager, rows = made(kind, "varlen"), made(kind, "eager"), documents()
    weights = torch.randn(sum(LENGTHS), 600, generator=torch.Generator().manual_seed(1)) / 100
    together = ours(**packed(rows), use_cache=False).logits[0]
    assert len(alone_calls) == 2 and sum(window == 5 for window in alone_calls) == windows
    (together * weights).sum().backward()
    alone = torch.cat([eager(torch.tensor([row]), use_cache=False).logits[0] for row in rows])
    (alone * weights).sum().backward()
    assert torch.allclose(together, alone, atol=CLOSE)
    assert gradients(eager).abs().max() > 0.01
    assert torch.allclose(gradients(ours), gradients(eager), atol=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches_are_those_of_sdpa_to_the_bit(kind, alone_calls):
    rows = documents([20, 9, 14])
    ids = torch.tensor([row + [0] * (20 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (20 - len(row)) for row in rows])
    found = {name: made(kind, name)(ids, attention_mask=mask).logits for name in ("varlen", "sdpa", "eager")}
    assert torch.equal(found["varlen"], found["sdpa"]) and not alone_calls
    real = mask.bool()
    assert torch.allclose(found["varlen"][real], found["eager"][real], atol=CLOSE)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["grouped", "window"])
def test_generation_with_a_cache_gives_the_same_tokens(kind, cache):
    rows = documents([20, 9])
    ids = torch.tensor([rows[0], [0] * 11 + rows[1]])
    mask = torch.tensor([[1] * 20, [0] * 11 + [1] * 9])
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    how |= {"cache_implementation": cache, "eos_token_id": None}
    found = [made(kind, name).eval().generate(ids, **how) for name in ("varlen", "eager")]
    assert found[0].shape == (2, 32) and len(found[0][:, 20:].unique()) > 3
    assert torch.equal(*found)


def test_positions_that_begin_anew_keep_documents_apart_without_lengths(alone_calls):
    ours, inputs = made("window", "varlen"), packed(documents())
    bare = {key: inputs[key] for key in ("input_ids", "position_ids")}
    expected = made("window", "eager")(**bare, use_cache=False).logits
    assert torch.allclose(ours(**bare, use_cache=False).logits, expected, atol=CLOSE)
    assert not alone_calls
    assert torch.allclose(ours(**inputs, use_cache=False).logits, expected, atol=CLOSE)
    assert alone_calls


def test_a_prompt_without_mask_fills_a_cache():
    ids = torch.tensor([documents()[4]])
    ours, eager = made("window", "varlen"), made("window", "eager")
    first, second = ours(ids[:, :15], use_cache=True), eager(ids[:, :15], use_cache=True)
    for _ in range(2):
        assert torch.allclose(first.logits, second.logits, atol=CLOSE)
        first = ours(ids[:, 15:16], past_key_values=first.past_key_values)
        second = eager(ids[:, 15:16], past_key_values=second.past_key_values)


@pytest.mark.parametrize("size", [9, 40], ids=["crowded", "not crowded"])
def test_padding_to_a_multiple_and_equal_lengths(size, alone_calls):
    """Tokens of padding are documents of one token each, and go together; a row of little else has a mask."""
    padded = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=32)
    rows = documents([size] * 3)
    pads = -3 * size % 32
    inputs = padded([{"input_ids": row} for row in rows])
    del inputs["labels"]
    assert inputs["input_ids"].shape == (1, 3 * size + pads) and len(inputs["cu_seq_lens_q"]) == 3 + pads + 1
    together = made("grouped", "varlen")(**inputs, use_cache=False).logits[0]
    eager = made("grouped", "eager")
    alone = torch.cat([eager(torch.tensor([row]), use_cache=False).logits[0] for row in [*rows, *[[0]] * pads]])
    assert torch.allclose(together, alone, atol=CLOSE)
    assert bool(alone_calls) == (size == 40)


def states(heads=4, groups=2, tokens=20, width=8, values=8, **how):
    draw = torch.Generator().manual_seed(2)
    shapes = ((heads, width), (groups, width), (groups, values))
    made = [torch.randn(1, number, tokens, size, generator=draw) for number, size in shapes]
    return [each.to(**how).requires_grad_() for each in made]


STARTS = torch.tensor([0, 7, 20], dtype=torch.int32)


def test_values_may_be_narrower_than_keys():
    query, key, value = states(groups=4, values=4)
    found, _ = varlen(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=STARTS)
    seen = (torch.arange(20) >= 7) == (torch.arange(20) >= 7)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen.tril())
    assert found.shape == (1, 20, 4, 4) and torch.allclose(found, expected.transpose(1, 2), atol=CLOSE)


def test_attention_dropout_drops():
    query, key, value = states()
    torch.manual_seed(0)
    dropped, again, none = (
        varlen(torch.nn.Module(), query, key, value, None, dropout=share, cu_seq_lens_q=STARTS)[0]
        for share in (0.5, 0.5, 0.0)
    )
    assert not torch.allclose(dropped, none, atol=0.1) and not torch.equal(dropped, again)
    model, inputs = made("grouped", "varlen", attention_dropout=0.5), packed(documents())
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_would_be_ignored_in_silence_is_refused(name):
    with pytest.raises(ValueError, match=f"varlen attention has no {name}"):
        varlen(torch.nn.Module(), *states(), None, cu_seq_lens_q=STARTS, **{name: torch.ones(4)})


def test_a_mask_that_is_there_is_obeyed(alone_calls):
    query, key, value = states()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    everything = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    found, _ = varlen(module, query, key, value, everything, cu_seq_lens_q=STARTS)
    expected, _ = sdpa_attention_forward(module, query, key, value, everything)
    assert torch.equal(found, expected)
    # Of two windows that differ, that of the mask counts, as it does for sdpa.
    config, embeds = copy.deepcopy(KINDS["window"]), torch.zeros(1, 20, 32)
    positions = torch.tensor([[*range(7), *range(13)]])
    masks = []
    for name in ("varlen", "sdpa"):
        config._attn_implementation = name
        masks.append(create_sliding_window_causal_mask(config, embeds, None, None, positions))
    assert isinstance(masks[0], DocumentMask) and masks[0].window == 5
    assert torch.equal(masks[0].all_pairs, masks[1])
    found, _ = varlen(module, query, key, value, masks[0], sliding_window=4, cu_seq_lens_q=STARTS)
    assert torch.equal(found, sdpa_attention_forward(module, query, key, value, masks[1])[0])
    assert not alone_calls


@pytest.mark.parametrize(
    "more",
    [
        {"or_mask_function": lambda batch, head, q, kv: (q >= 0) & (kv < 3)},
        {"block_sequence_ids": torch.tensor([[0, 0, 0, 0, *[-1] * 16]])},
    ],
    ids=["function", "blocks"],
)
def test_masks_of_a_models_own_are_made(more):
    config, embeds = copy.deepcopy(KINDS["grouped"]), torch.zeros(1, 20, 32)
    positions = torch.tensor([[*range(7), *range(13)]])
    masks = []
    for name in ("varlen", "sdpa"):
        config._attn_implementation = name
        masks.append(create_causal_mask(config, embeds, None, None, positions, **more))
    assert torch.equal(*masks)


def test_it_compiles_with_graph_breaks():
    model, rows = made("window", "varlen"), documents()
    inputs = packed(rows)
    expected = model(**inputs, use_cache=False).logits
    found = torch.compile(model, backend="eager")(**inputs, use_cache=False).logits
    assert torch.allclose(found, expected, atol=CLOSE)


def test_asking_for_the_kernel_breaks_no_graph(monkeypatch):
    """On a machine that pretends to have a GPU: Dynamo cannot trace what is asked there."""

    class Pretended:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **how):
            return torch.empty(shape)

    monkeypatch.setattr(attention, "torch", Pretended())
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: True)
    attention.kernel_runs.cache_clear()

    def asking(x):
        return x + 1 if attention.kernel_runs(torch.device("cuda"), torch.bfloat16, 64) else x

    assert torch.compile(asking, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1
    attention.kernel_runs.cache_clear()


@pytest.mark.parametrize("values", [8, 4])
def test_the_kernel_is_given_values_as_they_are_unless_they_are_narrower(monkeypatch, values):
    """Of equal width they are not copied."""
    given = {}

    def kernel(query, key, value, *_, enable_gqa=False, **__):
        given.update(query=query, value=value)
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    query, key, value = states(groups=4, values=values)
    found = attention.by_kernel(query, key, value, STARTS, 13, None, None)
    assert found.shape == (1, 20, 4, values)
    assert given["value"].shape == given["query"].shape == (20, 4, 8)
    assert (given["value"].data_ptr() == value.data_ptr()) == (values == 8)
    assert torch.equal(given["value"][..., :values], value[0].transpose(0, 1))


def test_the_kernel_is_not_taken_on_rocm(monkeypatch):
    monkeypatch.setattr(attention, "takes", lambda *_: True)
    attention.kernel_runs.cache_clear()
    how = torch.device("cuda"), torch.bfloat16, 64
    assert attention.kernel_runs(*how)
    attention.kernel_runs.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not attention.kernel_runs(*how)
    attention.kernel_runs.cache_clear()


# On a GPU


@gpu
@pytest.mark.parametrize("window", [None, 100], ids=["causal", "window"])
@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_is_sdpa_of_each_document(dtype, groups, window, alone_calls):
    starts = torch.tensor([0, 7, 300, 1024], dtype=torch.int32, device="cuda")
    how = {"device": "cuda", "dtype": dtype}
    here, there = (states(heads=8, groups=groups, tokens=1024, width=64, values=64, **how) for _ in range(2))
    assert attention.kernel_runs(here[0].device, dtype, 64)
    mask = None if window is None else DocumentMask({}, window)
    module = torch.nn.Module()
    found, _ = varlen(module, *here, mask, sliding_window=window, cu_seq_lens_q=starts, max_length_q=724)
    assert not alone_calls
    expected = attention.one_by_one(*there, starts.diff().tolist(), window, None, 0.0)
    weights = torch.randn_like(expected)
    for output in (found, expected):
        (output.float() * weights).sum().backward()
    assert torch.allclose(found.float(), expected.float(), atol=2e-2)
    for ours, theirs in zip(here, there, strict=True):
        assert (ours.grad - theirs.grad).float().norm() < 1e-2 * theirs.grad.float().norm()


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_the_kernel_is_each_document_alone(kind, alone_calls):
    ours, theirs = (made(kind, name).cuda() for name in ("varlen", "sdpa"))
    inputs = {key: value.cuda() if torch.is_tensor(value) else value for key, value in packed(documents()).items()}
    with torch.autocast("cuda", torch.bfloat16):
        found, expected = (model(**inputs, use_cache=False).logits.float() for model in (ours, theirs))
        assert not alone_calls
    assert (found - expected).norm() < 2e-2 * expected.norm()


# Packed and unpacked training


def rows_to_train(lengths=(9, 30, 14, 22, 5, 17, 40, 11)):
    """Tokenised rows, a third of each a prompt that is not learnt."""
    rows = documents(lengths, seed=3)
    return [{"input_ids": row, "labels": [-100] * (len(row) // 3) + row[len(row) // 3 :]} for row in rows]


def trained(kind, name, tmp_path, tiny_model, how):
    """Per-token log-probabilities of each row by its tokens, the loss and the gradients, by TRL's trainer."""
    rows = Dataset.from_list(rows_to_train())
    if how == "packed":
        rows = pack_dataset(rows, 64, "bfd")
    args = StockConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        packing=how == "packed",
        padding_free=how == "padding-free",
        max_length=64 if how == "packed" else None,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = made(kind, name)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    inputs = trainer.data_collator([*rows])
    assert (inputs["input_ids"].shape[0] == 1) == (how != "padded")
    items = (inputs["labels"][:, 1:] != -100).sum()
    learns = name != "flex_attention"
    with torch.set_grad_enabled(learns):
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
    if learns:
        loss.backward()
    with torch.no_grad():
        said = model(**inputs, fused_lm_head=True).log_probs
    return by_row(inputs, said), loss.item(), gradients(model) if learns else None


def by_row(inputs, said):
    """Log-probabilities of the tokens of each row but its first, by the row's tokens."""
    if "attention_mask" in inputs:
        places = [(row, 0, int(length)) for row, length in enumerate(inputs["attention_mask"].sum(1))]
    else:
        starts = inputs["cu_seq_lens_q"].tolist()
        places = [(0, start, end) for start, end in zip(starts, starts[1:], strict=False)]
    return {tuple(inputs["input_ids"][row, a:b].tolist()): said[row, a : b - 1] for row, a, b in places}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory, tiny_model):
    """Training on padded rows with eager attention, by kind of model."""
    return functools.cache(lambda kind: trained(kind, "eager", tmp_path_factory.mktemp("pad"), tiny_model, "padded"))


@pytest.mark.parametrize("how", ["padded", "padding-free", "packed"])
@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "varlen"])  # flex has no backward on a CPU
@pytest.mark.parametrize("kind", ["grouped", "window"])
def test_packed_and_unpacked_training_are_the_same(kind, name, how, unpacked, tmp_path, tiny_model):
    expected, loss, grads = unpacked(kind)
    found, our_loss, our_grads = trained(kind, name, tmp_path, tiny_model, how)
    assert found.keys() == expected.keys() and len(found) == 8
    assert loss > 1 and grads.abs().max() > 0.01
    assert our_loss == pytest.approx(loss, abs=CLOSE)
    for row, said in expected.items():
        assert torch.allclose(found[row], said, atol=CLOSE)
    if our_grads is None:
        assert name == "flex_attention"
    else:
        assert torch.allclose(our_grads, grads, atol=CLOSE)


@pytest.mark.parametrize(
    "more",
    [{"activation_checkpointing": True}, {"use_peft": True, "lora_dropout": 0.0}, {"padding_free": True}],
    ids=["checkpointing", "lora", "padding-free"],
)
def test_a_run_on_varlen_is_one_on_sdpa(tiny_model, chat_file, tmp_path, caplog, more):
    caplog.set_level(logging.INFO, "open_r1")
    packing = {} if "padding_free" in more else {"packing": True}
    for name in ("auto", "sdpa"):
        common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / name}
        assert main(settings(**common, **more, **packing, attn_implementation=name, max_steps=5)) == 0
    assert "attention: varlen, documents of packed rows one by one" in caplog.text
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "sdpa"), abs=CLOSE)


def test_what_is_saved_says_nothing_of_it(tiny_model, chat_file, tmp_path):
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
    assert main(settings(**common, packing=True, attn_implementation="varlen")) == 0
    for path in (tmp_path / "run").glob("**/config.json"):
        assert not re.search("varlen|auto|attn_implementation", path.read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config._attn_implementation == "sdpa"
    assert AutoConfig.from_pretrained(tmp_path / "run")._attn_implementation is None


# The choice


def arguments(**values):
    return SFTConfig(**{"output_dir": "unused", "use_cpu": True, **values})


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU of some capability, with flash attentions by number."""

    def of(capability, flash=()):
        monkeypatch.setattr(SFTConfig, "device", torch.device("cuda" if capability else "cpu"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
        monkeypatch.setattr(attention, "takes", lambda *_: capability >= 8)
        there = {f"flash_attention_{number}": lambda number=number: number in flash for number in (2, 3, 4)}
        monkeypatch.setattr(attention, "FLASH", there)

    return of


QWEN = KINDS["grouped"]
PACKED = {"packing": True, "bf16": True}
SMALL = {"num_hidden_layers": 1, "vocab_size": 600}


@pytest.mark.parametrize(
    ("capability", "flash", "training", "config", "name", "by_document"),
    [
        (9, (2, 3), PACKED, QWEN, "flash_attention_3", True),
        (9, (2, 3, 4), {"bf16": True}, QWEN, "flash_attention_3", True),
        (8, (2, 3), PACKED, QWEN, "flash_attention_2", True),
        (9, (4,), PACKED, QWEN, "varlen", True),
        (9, (), PACKED, QWEN, "varlen", True),
        (9, (2, 3), {"packing": True, "bf16": False}, QWEN, "varlen", True),
        (7, (), {"packing": True, "fp16": True}, QWEN, "varlen", True),
        (7, (2,), {"packing": True, "fp16": True}, QWEN, "varlen", True),  # where FlashAttention 2 raises
        (9, (2, 3), PACKED, Qwen3Config(**TINY, attention_dropout=0.1), "flash_attention_2", True),
        (9, (2, 3), PACKED, GPT2Config(), "flash_attention_2", True),  # its dropout has another name
        (9, (2, 3), PACKED, Qwen3Config(**TINY, head_dim=320), "varlen", True),
        (9, (2,), PACKED, Gemma2Config(**TINY), "flash_attention_2", True),
        (9, (), PACKED, Gemma2Config(**TINY), "eager", False),
        (9, (2,), PACKED, GptOssConfig(**SMALL), "eager", False),
        (9, (2,), {"bf16": True}, JambaConfig(**SMALL), "flash_attention_2", False),
        (9, (2,), {"bf16": True}, Qwen3NextConfig(**SMALL), "flash_attention_2", False),
        (9, (2,), {"bf16": True}, GPTJConfig(n_layer=1), "flash_attention_2", False),
        (9, (2,), PACKED, Gemma4TextConfig(), "varlen", True),  # some of its heads are 512 wide
        (9, (), PACKED, MambaConfig(), "eager", False),
        (9, (), PACKED, NemotronConfig(**SMALL), "sdpa", False),
        (9, (2,), PACKED, NemotronConfig(**SMALL), "flash_attention_2", True),
        (9, (), PACKED, Lfm2Config(**SMALL, layer_types=["conv"]), "sdpa", False),
        (0, (), {"packing": True}, QWEN, "varlen", True),
        (0, (), {"padding_free": True}, KINDS["window"], "varlen", True),
        (0, (), {"packing": True, "packing_strategy": "wrapped"}, QWEN, "sdpa", False),
        (0, (), {"padding_free": False}, QWEN, "sdpa", False),
        (0, (), {}, QWEN, "varlen", True),  # which lets rows go without padding
        (0, (), {"per_device_train_batch_size": 1}, QWEN, "sdpa", False),
        (0, (), {"packing": True, "plan_processes": 8}, QWEN, "varlen", True),
        (0, (), {"packing": True}, Gemma2Config(**TINY), "eager", False),
    ],
)
def test_auto_takes_the_best_that_is_there(machine, capability, flash, training, config, name, by_document):
    args = arguments(**training)
    machine(capability, flash)
    found = choose(ModelConfig(model_name_or_path="any"), args, config)
    assert (found.name, not found.why_not) == (name, by_document) and found.reason


@pytest.mark.parametrize(("flash", "name"), [((2, 3), "flash_attention_2"), ((), "varlen")])
def test_capabilities_are_those_of_nvidia_where_there_is_no_rocm(machine, monkeypatch, flash, name):
    machine(9, flash)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose(ModelConfig(), arguments(**PACKED), QWEN).name == name


KERNEL = "PyTorch's flash kernel for documents of any length"
HALF_16 = {"packing": True, "fp16": True}


@pytest.mark.parametrize(
    ("where", "training", "config", "reason"),
    [
        (9, PACKED, QWEN, KERNEL),
        (9, {"packing": True, "bf16": False}, QWEN, "documents one by one, in float32"),
        (7, HALF_16, QWEN, "documents one by one, on a GPU before Ampere"),
        (9, PACKED, Qwen3Config(**TINY, attention_dropout=0.1), "documents one by one, with attention dropout"),
        (9, PACKED, GPT2Config(), "documents one by one, with attention dropout"),
        (9, PACKED, Qwen3Config(**TINY, head_dim=320), "documents one by one, with heads of 320"),
        (9, PACKED, Gemma4TextConfig(), f"{KERNEL}, and one by one with heads of 512"),
        (0, {**PACKED, "plan_processes": 8}, QWEN, KERNEL),
        (0, {**PACKED, "plan_processes": 8}, Qwen3Config(**TINY, head_dim=320), "documents one by one, with heads of"),
        ("cpu", {"padding_free": False}, QWEN, "no row has documents to keep apart, on a CPU"),
        ("mps", {"padding_free": False}, QWEN, "no row has documents to keep apart, on MPS"),
        ("xpu", {"padding_free": False}, QWEN, "no row has documents to keep apart, on XPU"),
        ("mps", PACKED, QWEN, "documents of packed rows one by one"),
    ],
)
def test_the_reason_is_the_one_there_is(machine, monkeypatch, where, training, config, reason):
    args = arguments(**training)
    machine(where if isinstance(where, int) else 0)
    if isinstance(where, str):
        monkeypatch.setattr(SFTConfig, "device", torch.device(where))
    assert choose(ModelConfig(), args, config).reason.startswith(reason)


def test_of_a_gpu_that_lacks_the_kernel_for_some_heads_the_width_is_said(machine, monkeypatch):
    machine(8)
    monkeypatch.setattr(attention, "takes", lambda device, dtype, width: width <= 192)
    found = choose(ModelConfig(), arguments(**PACKED), Qwen3Config(**TINY, head_dim=256))
    assert found.reason == "documents one by one, with heads of 256 on this GPU"


@pytest.mark.parametrize(
    ("said", "config", "why_not"),
    [
        ("sdpa", QWEN, "sdpa would compare all pairs of tokens"),
        ("auto", Gemma2Config(**TINY), "eager would compare all pairs of tokens"),
        ("flex_attention", QWEN, "flex_attention goes by blocks of tokens"),
        ("owner/kernel", QWEN, "it is not known whether owner/kernel"),
        (
            "auto",
            MambaConfig(),
            "mamba has layers of linear_attention, where attention alone keeps no documents apart",
        ),
        ("sdpa", JambaConfig(**SMALL), "jamba has layers of linear_attention"),
        ("flash_attention_2", JambaConfig(**SMALL), "jamba has layers of linear_attention"),
        ("flash_attention_2", GPTJConfig(n_layer=1), "gptj hands no lengths"),
    ],
)
def test_why_documents_do_not_go_apart_is_handed_on(machine, said, config, why_not):
    machine(0)
    found = choose(ModelConfig(attn_implementation=said), arguments(), config)
    assert found.why_not.startswith(why_not) and found.why_not


def test_what_the_recipe_says_is_kept(machine, caplog):
    machine(0)
    caplog.set_level(logging.INFO, "open_r1")
    for name, by_document in {
        "sdpa": False,
        "flex_attention": False,
        "varlen": True,
        "flash_attention_4": True,
    }.items():
        model_args = ModelConfig(attn_implementation=name)
        found = settle_attention(model_args, arguments(packing=True), QWEN)
        assert found[:2] == (name, "as the recipe says") and model_args.attn_implementation == name
        assert (not found.why_not) == by_document
    kwargs = {"attn_implementation": "eager"}
    assert choose(ModelConfig(), arguments(packing=True, model_init_kwargs=kwargs), QWEN).name == "eager"
    assert caplog.text.count("attention: ") == 4
    model_args = ModelConfig()
    settle_attention(model_args, arguments(packing=True), QWEN)
    assert model_args.attn_implementation == "varlen"
    with pytest.raises(UserError, match="varlen cannot be had: gemma2 has attention .caps, sinks"):
        choose(ModelConfig(attn_implementation="varlen"), arguments(packing=True), Gemma2Config(**TINY))


@pytest.mark.parametrize(
    ("given", "said", "name"),
    [("auto", None, "varlen"), (None, "auto", "varlen"), (None, "sdpa", "sdpa"), ("sdpa", "auto", "sdpa")],
)
def test_what_model_init_kwargs_say_is_settled_there_too(machine, given, said, name):
    """Else it would override what was settled, and transformers knows no `auto`."""
    machine(0)
    kwargs = {"attn_implementation": given, "max_position_embeddings": 64}
    model_args, args = ModelConfig(attn_implementation=said), arguments(packing=True, model_init_kwargs=kwargs)
    settle_attention(model_args, args, QWEN)
    assert model_args.attn_implementation == name and args.model_init_kwargs == {"max_position_embeddings": 64}
    assert kwargs["attn_implementation"] == given  # the recipe is as it was


def test_a_run_starts_with_what_model_init_kwargs_say(tiny_model, chat_file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "open_r1")
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
    kwargs = {"attn_implementation": "auto"}
    assert main(settings(**common, packing=True, max_steps=1, model_init_kwargs=kwargs)) == 0
    assert "attention: varlen, documents of packed rows one by one" in caplog.text


def test_a_model_with_code_of_its_own_is_left_to_transformers(machine):
    class Own(Qwen3Config):
        model_type = "own"

    machine(0)
    assert choose(ModelConfig(), arguments(packing=True), Own(**TINY)).name is None


# The check


@pytest.fixture
def leaky():
    """An attention of somebody who registered no mask for it: transformers then makes none."""
    AttentionInterface.register("leaky", sdpa_attention_forward)
    yield {"attn_implementation": "leaky"}
    AttentionInterface._global_mapping.pop("leaky")


@pytest.fixture
def sharp(tiny_model, tmp_path):
    """The tiny model with weights that make it attend."""
    path = shutil.copytree(tiny_model, tmp_path / "sharp")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(3 if each.dim() > 1 else 1)
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("how", [{"packing": True}, {"padding_free": True}], ids=["packed", "padding-free"])
def test_a_backend_that_leaks_is_found_before_the_first_step(
    sharp, chat_file, tmp_path, leaky, how, monkeypatch, capsys
):
    common = {"model_name_or_path": sharp, "dataset_name": chat_file, "max_steps": 3, **how}
    argv = settings(**common, output_dir=tmp_path / "leaky", model_init_kwargs=leaky)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "documents in one row see each other in qwen3 with attn_implementation: leaky" in said
    assert "packing: false and padding_free: false" in said
    state = json.loads((tmp_path / "leaky" / "run_state.json").read_text())
    assert (state["status"], state["global_step"]) == ("failed", 0)

    # Without the check it trains, and on other losses.
    from open_r1.trainer import OrderedTrainer

    monkeypatch.setattr("open_r1.trainer.OrderedTrainer", functools.partial(OrderedTrainer, try_isolation=False))
    assert main(argv) == 0
    assert main(settings(**common, output_dir=tmp_path / "sound")) == 0
    contaminated, sound = losses(tmp_path / "leaky"), losses(tmp_path / "sound")
    assert len(contaminated) == len(sound) == 3
    assert abs(contaminated[0] - sound[0]) > 1e-3  # at the first step, of the same weights on the same rows


STATES = {
    "mamba": (MambaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, state_size=4), "see each other"),
    "jamba": (
        JambaConfig(**TINY, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4, mamba_d_state=4),
        "see each other",
    ),
    "lfm2": (Lfm2Config(**TINY, layer_types=["conv", "full_attention"]), "refuses several documents in a row: "),
    "qwen3_next": (
        Qwen3NextConfig(
            **TINY,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        "refuses several documents in a row: ",
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_models_that_carry_a_state_are_refused_when_tried(kind, tiny_model, chat_file, tmp_path, monkeypatch, capsys):
    config, message = STATES[kind]
    path = shutil.copytree(tiny_model, tmp_path / "model")
    for weights in path.glob("*.safetensors"):
        weights.unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    common = {"model_name_or_path": path, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
    argv = settings(**common, packing=True)
    assert main(argv) == 2
    assert "packing: the layers of " in capsys.readouterr().err  # without weights
    for name in ("STATEFUL", "CONVOLVED"):
        monkeypatch.setattr(preflight, name, re.compile("none"))
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert main(settings(**common, max_steps=1)) == 0  # without packing it is a model like any other


def test_mode_and_random_numbers_are_left_as_they_were():
    model = made("grouped", "varlen")
    model.train()
    model.lm_head.eval()
    before = torch.get_rng_state()
    with isolation.undisturbed(model, torch.device("cpu")):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert model.training and model.model.training and not model.lm_head.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "leaks"), [("varlen", False), ("sdpa", False), ("eager", False), ("leaky", True)])
def test_rounding_is_told_from_leaking(name, leaks, dtype, leaky):
    model = made("window", name).to(dtype).eval()

    def logits(examples):
        inputs = collate(examples)
        del inputs["labels"]
        return model(**inputs, use_cache=False).logits[0].float()

    for how in (True, False):
        first, others, behind = differences(logits, documents([13, 16, 19, 22]), packed=how)
        assert sees(first, others, behind, exact=dtype == torch.float32) == (leaks, False)
        assert first < 0.1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [("", (False, False)), ("looks ahead", (False, True)), ("no number", (True, False)), ("never", (False, False))],
)
def test_what_else_is_wrong_is_seen(fault, expected, packed):
    """What is said of a token: the sum of those of its document up to it."""

    def logits(examples):
        cut = [
            row.split(each["seq_lengths"]) if packed else [row]
            for each in examples
            for row in [torch.tensor(each["input_ids"]).float()]
        ]
        apart = [part for parts in cut for part in parts]
        said = [part.sum().expand(len(part)) if fault == "looks ahead" else part.cumsum(0) for part in apart]
        broken = fault == "never" or (fault == "no number" and len(apart) > 1)
        return torch.cat(said)[:, None] * (torch.nan if broken else 1.0)

    first, others, behind = differences(logits, documents([13, 16, 19, 22]), packed)
    assert sees(first, others, behind, exact=True) == expected
    assert isolation.in_words(0.25) == "differs by 25.00% from"
    assert isolation.in_words(max(first, others)).startswith(
        "is no number" if fault == "no number" else "differs by 0"
    )


@pytest.mark.parametrize(("precision", "expected"), [("none", True), ("ieee", True), ("tf32", False)])
def test_tf32_is_less_than_float32(monkeypatch, precision, expected):
    """As `tf32: true` sets it (transformers 5.23), which `torch.get_float32_matmul_precision` cannot read."""
    trainer = SimpleNamespace(args=SimpleNamespace(bf16=False, fp16=False), model=None)
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = precision
        assert isolation.exact(trainer) is expected
    finally:
        torch.backends.fp32_precision = before


def test_documents_that_are_tried_differ_and_exceed_small_windows():
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}])
    tried = isolation.documents(rows, KINDS["window"])
    assert [len(each) for each in tried] == [13, 16, 19, 22]
    assert len({tuple(each[:4]) for each in tried}) == 4 and {*sum(tried, [])} <= {*range(5, 11)}
    wide = MistralConfig(**TINY, sliding_window=4096)
    assert [len(each) for each in isolation.documents(rows, wide)] == [24, 27, 30, 33]


def test_wrapped_packs_are_not_tried(tiny_model, chat_file, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "differences", lambda *_, **__: pytest.fail("tried"))
    common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
    assert main(settings(**common, packing=True, packing_strategy="wrapped")) == 0
