"""Template, stop token, padding, and what the assistant says in a rendering."""

import itertools

import pytest
from conftest import ROOT
from make_docstrings import write_model
from transformers import AutoTokenizer, BertTokenizerLegacy
from trl import ModelConfig
from trl.chat_template_utils import qwen2_5_chat_template, qwen3_chat_template

from open_r1.chat import CHATML, get_tokenizer
from open_r1.configs import SFTConfig
from open_r1.errors import UserError
from open_r1.supervision import conversation_rows, probe_template

PLAIN_CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "  Eins. \n"},
    {"role": "user", "content": "Two? Émile 你好"},
    {"role": "assistant", "content": "Zwei."},
]


def load(path, **values):
    arguments = SFTConfig(output_dir="unused", use_cpu=True, **values)
    return get_tokenizer(ModelConfig(model_name_or_path=str(path)), arguments), arguments


@pytest.fixture
def other_model(tmp_path, tiny_model):
    """A copy of the tiny tokenizer with other special tokens and, when given, a template."""

    def write(template=None, added=(), **special):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_special_tokens({"extra_special_tokens": list(added)})
        for name, token in special.items():
            setattr(tokenizer, name, token)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "other")
        return tmp_path / "other"

    return write


class TestTemplate:
    def test_chatml_when_there_is_none(self, tiny_model):
        tokenizer, _ = load(tiny_model)
        assert tokenizer.chat_template == CHATML
        text = tokenizer.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
        assert (
            text
            == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_the_models_own(self, other_model):
        assert load(other_model(PLAIN_CHATML))[0].chat_template == PLAIN_CHATML

    def test_the_recipes_wins_by_name_as_text_or_as_path(self, other_model, tmp_path):
        assert load(other_model(PLAIN_CHATML), chat_template="chatml")[0].chat_template == CHATML
        assert load(other_model(PLAIN_CHATML), chat_template="qwen3")[0].chat_template == qwen3_chat_template
        named = str(other_model(PLAIN_CHATML))
        assert load(named, chat_template=named)[0].chat_template == PLAIN_CHATML
        (tmp_path / "t.jinja").write_text(PLAIN_CHATML)
        assert load(other_model(LLAMA, ["<|eot|>"]), chat_template=PLAIN_CHATML)[0].chat_template == PLAIN_CHATML
        assert load(other_model(LLAMA), chat_template=str(tmp_path / "t.jinja"))[0].chat_template == PLAIN_CHATML
        assert load(other_model(LLAMA), chat_template_path=str(tmp_path / "t.jinja"))[0].chat_template == PLAIN_CHATML

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"chat_template": "no/such.jinja"},
                "'no/such.jinja' is neither chatml",
            ),
            ({"chat_template": "no/such-model"}, "'no/such-model' is neither chatml, nor the name of a template"),
            ({"chat_template": "You are kind. {{ bos_token }}"}, "a system prompt belongs into system_prompt"),
            ({"chat_template": "{% for m in messages %}"}, "cannot render a user and an assistant turn"),
            (
                {"chat_template": "{{ a }}", "chat_template_path": "x"},
                "chat_template and chat_template_path are both set",
            ),
            ({"eos_token": "<nope>"}, "eos_token: '<nope>' is not in the vocabulary"),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, tiny_model, values, message):
        with pytest.raises(UserError, match=message):
            load(tiny_model, **values)

    def test_a_tokenizer_that_cannot_be_loaded(self, tmp_path):
        with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
            load(tmp_path)

    def test_a_tokenizer_without_a_fast_backend(self, tmp_path, monkeypatch):
        (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
        slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
        monkeypatch.setattr("open_r1.chat.AutoTokenizer.from_pretrained", lambda *_, **__: slow)
        with pytest.raises(UserError, match="BertTokenizerLegacy has no fast backend"):
            load("slow")


class TestTokens:
    def test_end_of_turn_becomes_eos_and_the_old_eos_pads(self, tiny_model):
        tokenizer, arguments = load(tiny_model)
        assert tokenizer.eos_token == arguments.eos_token == "<|im_end|>"
        assert tokenizer.pad_token == "<|endoftext|>"
        assert tokenizer.added_for_chat == []

    def test_end_of_turn_of_another_template(self, other_model):
        tokenizer, arguments = load(other_model(LLAMA, ["<|eot|>", "<bos>"], bos_token="<bos>"))
        assert arguments.eos_token == tokenizer.eos_token == "<|eot|>"
        assert tokenizer.bos_token == "<bos>"

    def test_bos_is_never_touched(self, other_model):
        assert load(other_model())[0].bos_token is None
        assert load(other_model(None, ["<s>"], bos_token="<s>"))[0].bos_token == "<s>"

    def test_the_recipes_eos_wins_with_a_warning(self, tiny_model, caplog):
        tokenizer, _ = load(tiny_model, eos_token="<|endoftext|>")
        assert tokenizer.eos_token == "<|endoftext|>"
        assert "but the chat template ends a turn with <|im_end|>" in caplog.text

    def test_a_template_without_end_of_turn_keeps_eos(self, other_model, caplog):
        template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        assert load(other_model(template))[0].eos_token == "<|endoftext|>"
        assert "ends turns with no token of its own" in caplog.text

    def test_padding_is_eos_only_when_nothing_can_be_spared(self, tiny_model, caplog):
        tokenizer, _ = load(
            tiny_model, chat_template="{% for m in messages %}{{ m['content'] + '<|endoftext|>' }}{% endfor %}"
        )
        assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
        assert "padding with EOS" in caplog.text

    def test_chatml_tokens_are_added_where_the_vocabulary_lacks_them(self, tmp_path, pairs):
        write_model(tmp_path, itertools.chain.from_iterable(pairs[:50]), 400, 32, 1, special=["<|endoftext|>"])
        tokenizer, _ = load(tmp_path)
        assert tokenizer.added_for_chat == ["<|im_start|>", "<|im_end|>"]
        assert len(tokenizer) == 402
        assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id] == [401]


def said(tokenizer, messages=TURNS, on_rewritten="error"):
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    how = {"on_rewritten": on_rewritten, "empty_reasoning": "mask"}
    rows, _ = conversation_rows(messages, probe_template(tokenizer), turns=turns, **how)
    return [text[start:end] for text, spans in rows for start, end in spans]


class TestWhatTheModelSays:
    def test_chatml(self, tiny_model):
        assert said(load(tiny_model)[0]) == ["  Eins. \n<|im_end|>", "Zwei.<|im_end|>"]

    def test_plain_chatml(self, other_model):
        assert said(load(other_model(PLAIN_CHATML))[0]) == ["  Eins. \n<|im_end|>", "Zwei.<|im_end|>"]

    def test_another_template(self, other_model):
        tokenizer, _ = load(other_model(LLAMA, ["<|eot|>", "<bos>"], bos_token="<bos>"))
        assert said(tokenizer) == ["  Eins. \n<|eot|>", "Zwei.<|eot|>"]

    def test_templates_that_trl_knows(self, other_model):
        assert said(load(other_model(qwen2_5_chat_template))[0]) == ["  Eins. \n<|im_end|>", "Zwei.<|im_end|>"]
        tokenizer, _ = load(other_model(qwen3_chat_template))
        turns = [TURNS[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nEins."}]
        assert said(tokenizer, turns) == ["<think>\nhm\n</think>\n\nEins.<|im_end|>"]

    def test_a_turn_that_the_template_rewrites_is_learnt_as_at_its_own_inference(self, other_model):
        strips = PLAIN_CHATML.replace(
            "message['content']",
            "(message['content'] if loop.last or message['role'] == 'user' else message['content'][:4])",
        )
        tokenizer, _ = load(other_model(strips))
        assert said(tokenizer, TURNS[1:3]) == ["  Eins. \n<|im_end|>"]
        with pytest.raises(ValueError, match="the chat template rewrites message 1 in the whole conversation"):
            said(tokenizer, TURNS[1:])
        assert said(tokenizer, TURNS[1:], "expand") == ["  Eins. \n<|im_end|>", "Zwei.<|im_end|>"]
        assert said(tokenizer, TURNS[1:], "mask") == ["Zwei.<|im_end|>"]

    @pytest.mark.parametrize("name", ["openr1_distill", "smollm3"])
    def test_our_templates_mark_what_the_model_says(self, tiny_model, name):
        path = ROOT / "recipes" / "chat_templates" / f"{name}.jinja"
        tokenizer, _ = load(tiny_model, chat_template=str(path))
        text, spans = probe_template(tokenizer).render_with_markers(TURNS)
        assert [text[start:end] for start, end in spans] == said(tokenizer)
        assert said(tokenizer)[1] == "Zwei.<|im_end|>"
