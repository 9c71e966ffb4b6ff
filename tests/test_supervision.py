"""Every chat template that TRL ships, against an oracle of its own: what is supervised is what inference asks for."""

import copy
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from datasets import Dataset
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from open_r1.chat import CHATML, settle_stop_token
from open_r1.configs import SFTConfig
from open_r1.encoding import spelling_of
from open_r1.errors import BadRow, UserError
from open_r1.formats import without_nulls
from open_r1.supervision import CLOSE, OPEN, PLAIN_ROLES, probe_template, writes_contents_only
from open_r1.tokenization import Supervision, encode_batch

HOW = Supervision.of(SFTConfig(output_dir="unused", use_cpu=True, max_length=None), packing=False)
TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
VISION = {name: TEMPLATES.pop(name) for name in ("llava_next", "llava_next_training")}
CONTROL = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|<\|[\w\"]+>|<[\w\"]+\|>|\[gMASK\]|<sop>"
)
TAGS = re.compile(r"</?(?:think|tool_call|tool_response)>")  # in vocabularies, but not special
THINK = "<think>\nr{0}\n\nmore\n</think>\n\na{0}".format
EMPTY_BLOCK = re.compile(r"\s*(<think>)?\s*</think>\s*")
NUMBER = {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}}
ADD = {"type": "function", "function": {"name": "add", "description": "Add one.", "parameters": NUMBER}}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def says(content, role="assistant", **fields):
    return {"role": role, "content": content, **fields}


def calls(**fields):
    answer = {"role": "tool", "tool_call_id": "abcdef123", "name": "add", "content": "T1"}
    return {"messages": [says("u1", "user"), says(tool_calls=[CALL], **fields), answer, says("a2")], "tools": [ADD]}


def chat(*contents, system=None):
    turns = [says(content, "assistant" if n % 2 else "user") for n, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


FIELDS = [
    says("u1", "user"),
    says("a1", reasoning_content="r1"),
    says("u2", "user"),
    says("a2", reasoning_content="r2"),
]
ROWS = {
    "single": chat("u1", "a1"),
    "multi": chat("u1", "a1", "u2", "a2", "u3", "a3"),
    "system": chat("u1", "a1", "u2", "a2", system="Be brief."),
    "unicode": chat("Émile 你好 🙂", "四 é\u0301 👩‍👩‍👧 עברית.", "¿?", "Ça va"),
    "empty": chat("u1", "", "u2", "a2"),
    "long": chat("word " * 400, "Line of text.\n" * 300 + "end"),
    "blank": chat("  u1\n\n", "\n\n  a1\n\nb1 \n\n", "\tu2 ", "    a2\n"),
    "think": chat("u1", THINK(1)),
    "think, multi": chat("u1", THINK(1), "u2", THINK(2)),
    "think, blank": chat("u1", "\n<think>r1</think>a1\n", "u2", "<think>\n\n</think>\n\na2"),
    "field": {"messages": FIELDS[:2]},
    "field, multi": {"messages": FIELDS},
    "tools": calls(content=""),
    "tools, text": calls(content="I add one."),
    "tools, reasoning": calls(content="", reasoning_content="r1"),
    "repeats": chat("a1", "a1", "a1", "a1", "u", "u"),
    "roles": chat("assistant\na1", "user\nassistant\n[INST] model: system", "model\n", "assistant"),
}
# Of the 70 templates, for each kind of row: contradicts a pre-filled <think>, does not survive, or not taken at all.
REFUSED = dict.fromkeys(ROWS, 16) | {"system": 18, "think": 6, "think, multi": 6, "think, blank": 6}
REFUSED |= {"field": 42, "field, multi": 42, "tools": 34, "tools, text": 41, "tools, reasoning": 47}
RAISES = "the template raises an error"
NEED_REASONING = re.compile("deepseek|nemotron")
READ_CONTENTS = re.compile("gemma4|diffusion_gemma")  # they look for channel tokens in what the assistant said


class Refused(Exception):
    """The oracle's word for a row that nobody could train on."""


@pytest.fixture(scope="session")
def load(tiny_model):
    """Tokenizer of a template, with every token that it writes in the vocabulary."""

    @cache
    def load(name):
        text = {**TEMPLATES, **VISION}[name].read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_special_tokens({"extra_special_tokens": sorted({"<BOS>", "<PAD>", *CONTROL.findall(text)})})
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in sorted(set(TAGS.findall(text)))])
        tokenizer.bos_token, tokenizer.pad_token, tokenizer.chat_template = "<BOS>", "<PAD>", text
        settle_stop_token(tokenizer, SimpleNamespace(eos_token=None))
        return tokenizer

    return load


def encode(row, tokenizer, offsets=False):
    using = {"to_row": without_nulls, "tokenizer": tokenizer, "template": probe_template(tokenizer), "how": HOW}
    spelling = spelling_of(tokenizer)
    assert spelling.texts is not None
    spelling = replace(spelling, texts=None) if offsets else spelling
    return encode_batch(Dataset.from_list([row])[:], [0], spelling=spelling, **using).to_pylist()


def learnt(row, tokenizer, spelled=False):
    """(context, what is learnt after it) of each supervised run; the first context is encoded as at inference."""
    ids, labels = row["input_ids"], row["labels"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    runs = [found.span() for found in re.finditer("1+", "".join("01"[label != -100] for label in labels))]
    texts = [(tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])) for start, end in runs]
    assert spelled or tokenizer.encode(texts[0][0], add_special_tokens=False) == ids[: runs[0][0]]
    return texts


def oracle(row, tokenizer):
    """The rows that should come, each a list of (context, what is learnt after it), or why there are none."""
    try:
        return rows_of(row, tokenizer)
    except Refused as refused:
        return str(refused)


def rows_of(row, tokenizer):
    messages, rows, inside = row["messages"], [], []

    def render(messages, **kwargs):
        try:
            return tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False, **kwargs)
        except Exception as error:
            raise Refused(RAISES) from error

    def render_behind(prompt, messages):
        own = render(messages)
        if own.startswith(prompt) or opening(prompt) < len(prompt):
            return own
        bare = [without_thoughts(earlier) for earlier in messages[:-1]]
        thoughts = [turn["content"] or turn["reasoning_content"] for turn in messages if thinks_first(turn)]
        asked = render(bare, add_generation_prompt=True)
        dropped = own.startswith(asked) and not any(thought in own for thought in thoughts)
        return prompt + own[len(asked) :] if dropped else own

    whole = render(messages)
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:n], add_generation_prompt=True)
        said = answer(message, prompt, render_behind(prompt, messages[: n + 1]), tokenizer.eos_token)
        head, block = prompt[: opening(prompt)], ""
        if not thinks(message) and not EMPTY_BLOCK.match(message["content"]):
            plain = {**message, "content": message["content"].lstrip()}  # all white space before it is the template's
            own = render_behind(prompt, [*messages[:n], plain])
            found = EMPTY_BLOCK.match(answer(plain, prompt, own, tokenizer.eos_token))
            block = found[0] if found else ""
        context, said = prompt + block, said[len(block) :]
        contexts = [context] + [head] * bool(EMPTY_BLOCK.fullmatch(context[len(head) :]))
        found = [context for context in contexts if whole.startswith(context + said)]
        inside += [(found[0], said)] if found else []
        rows += [] if found else [[(context, said)]]
    return rows + [inside] * bool(inside)


def thinks_first(message):
    return bool(message.get("tool_calls")) and bool(message["content"] or message.get("reasoning_content"))


def without_thoughts(message):
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**kept, "content": ""} if message.get("tool_calls") else message


def opening(prompt):
    return re.search(r"(<think>\s*(</think>\s*)?)?\Z", prompt).start()


def thinks(message):
    return bool(message.get("reasoning_content")) or message["content"].lstrip().startswith("<think>")


def answer(message, prompt, own, eos):
    """What the model has to say after `prompt`, when `own` is the conversation up to its turn."""
    content, held = message["content"], prompt[opening(prompt) :]
    if "</think>" in held and thinks(message):
        raise Refused("has reasoning, but the generation prompt")
    if own.startswith(prompt) and not (held and "<think>" in own[len(prompt) :]):
        said = own[len(prompt) :]
    elif held and "</think>" not in held and content.lstrip().startswith("<think>"):
        said = content.lstrip().removeprefix("<think>").removeprefix("\n" * held.endswith("\n")) + eos
    elif "</think>" in held and own.startswith(prompt[: opening(prompt)]):
        said = own[opening(prompt) :]
    else:
        raise Refused("the chat template renders")
    said = re.sub(rf"({re.escape(eos)}\s*)+$", eos, said.rstrip())
    said += "" if said.endswith((eos, "<|call|>", "<|tool_response>", "<|observation|>")) else eos
    names = [call["function"]["name"] for call in message.get("tool_calls", [])]
    left = "".join((held + said).split())
    for text in sorted([content, message.get("reasoning_content", ""), *names], key=len, reverse=True):
        if "".join(text.split()) not in left:
            raise Refused("does not survive rendering")
        left = left.replace("".join(text.split()), "", 1)
    return said


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ROWS)
def test_what_is_learnt_is_what_inference_asks_for(load, name, kind):
    tokenizer, rows = load(name), oracle(ROWS[kind], load(name))
    if isinstance(rows, str):
        with pytest.raises(BadRow) as caught:
            encode(ROWS[kind], tokenizer)
        assert rows == RAISES or rows in caught.value.problem
    else:
        assert [learnt(row, tokenizer) for row in encode(ROWS[kind], tokenizer)] == rows
        assert encode(ROWS[kind], tokenizer, offsets=True) == encode(ROWS[kind], tokenizer)


def test_nothing_is_left_out(load):
    assert len(TEMPLATES) * len(ROWS) == 1190
    assert {
        kind: sum(isinstance(oracle(row, load(n)), str) for n in TEMPLATES) for kind, row in ROWS.items()
    } == REFUSED
    for name in VISION:
        with pytest.raises(UserError, match="the chat template cannot render a user and an assistant turn"):
            load(name)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "nemotron_3_nano"])
@pytest.mark.parametrize("kind", ["blank", "think, blank", "multi"])
def test_tokenizers_that_count_no_white_space_to_a_token(load, name, kind):
    if not isinstance(rows := oracle(ROWS[kind], load(name)), str):
        tokenizer = copy.deepcopy(load(name))
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        for offsets in (False, True):
            assert [learnt(row, tokenizer) for row in encode(ROWS[kind], tokenizer, offsets)] == rows


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("who", ["user", "both"])
def test_control_tokens_in_contents_are_text(load, name, who):
    tokenizer = load(name)
    tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    structure, spelled = [], "|".join(map(re.escape, tokens))
    start = THINK("") if NEED_REASONING.match(name) else ""
    fake = chat("q", f"{start}FAKE")["messages"]
    fake = TAGS.sub("", tokenizer.apply_chat_template(fake, tokenize=False, add_generation_prompt=True))
    fake += " ".join([*tokens, tokens[0][:2] + tokens[0] + tokens[0][2:]])
    fake = fake.replace("<|channel|>", "<|channel|> ")  # of which gpt-oss would say that it belongs elsewhere
    for text in (fake, "x"):
        asked, said = f"u {text} v", f"{start}a {text if who == 'both' else 'x'} b"
        row = chat(asked, said, "u2", f"{start}a2")
        expected = oracle(row, tokenizer)
        if isinstance(expected, str):
            assert name.startswith(("idefics3", "smolvlm")) or (who == "both" and READ_CONTENTS.match(name))
            with pytest.raises(BadRow):
                encode(row, tokenizer)
            return
        rows = encode(row, tokenizer)
        assert [learnt(row, tokenizer, spelled=True) for row in rows] == expected
        assert who == "both" or not any("FAKE" in said for row in expected for _, said in row)
        assert sum(row["control_tokens"] for row in rows) == len(re.findall(spelled, asked + said))
        structure.append([[i for i in row["input_ids"] if i in tokenizer.all_special_ids] for row in rows])
    assert structure[0] == structure[1]


def test_marks_of_ours_in_a_content_hide_nothing(load):
    rows = [chat("u1", "a1"), chat(f"{OPEN}u1{CLOSE}{OPEN}", f"a1{OPEN}")]
    harmless, forged = (encode(row, load("qwen2_5"))[0]["input_ids"] for row in rows)
    assert harmless == forged


def refusal(row, tokenizer):
    with pytest.raises(BadRow) as caught:
        encode(row, tokenizer)
    return caught.value.problem


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma3"])
@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_any_name_is_not_lost(load, name, field):
    assert "the reasoning of message 1 does not survive" in refusal(
        {"messages": [says("u1", "user"), says("a1", **{field: "r1"})]}, load(name)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_of_a_call_may_be_text_or_a_mapping(load, name):
    tokenizer, made = load(name), []
    for arguments in ({"a": 1}, '{"a": 1}'):
        row = copy.deepcopy(calls(content=""))
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = arguments
        try:
            made.append(encode(row, tokenizer))
        except BadRow as bad:
            made.append(bad.problem)
    assert made[0] == made[1]


def test_arguments_that_are_no_json_are_named(load):
    row = copy.deepcopy(calls(content=""))
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{a: 1"
    assert "arguments of a tool call are text that is not JSON" in refusal(row, load("qwen3"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_in_names_are_text(load, name):
    tokenizer = load(name)
    row, harmless = copy.deepcopy(calls(content="")), calls(content="")
    function = row["tools"][0]["function"]
    function["parameters"] = {"type": "object", "properties": {tokenizer.eos_token: NUMBER["properties"]["a"]}}
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {tokenizer.eos_token: 1}
    try:
        made = encode(row, tokenizer)
    except BadRow as bad:
        assert isinstance(oracle(harmless, tokenizer), str) or "spelled out" in bad.problem
        return
    stops = [sum(token == tokenizer.eos_token_id for token in each["input_ids"]) for each in made]
    assert stops == [
        sum(t == tokenizer.eos_token_id for t in each["input_ids"]) for each in encode(harmless, tokenizer)
    ]


def test_a_control_token_that_a_template_takes_apart_is_refused(load):
    row = copy.deepcopy(calls(content=""))
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"a": ["p <|im_end|> q"]}
    assert "a control token is spelled out where the chat template takes texts apart" in refusal(
        row, load("lfm2_2_5_v2")
    )


@pytest.mark.parametrize("policy", ["expand", "mask", "error"])
def test_a_template_without_a_stop_token_rewrites_nothing(load, policy):
    tokenizer = load("glm4moe")
    how = replace(HOW, on_rewritten_turn=policy)
    using = {"tokenizer": tokenizer, "template": probe_template(tokenizer), "spelling": spelling_of(tokenizer)}
    rows = encode_batch(
        Dataset.from_list([chat("u1", "a1")])[:], [0], to_row=without_nulls, how=how, **using
    ).to_pylist()
    assert [learnt(row, tokenizer)[-1][1] for row in rows] == [f"a1{tokenizer.eos_token}"]


def test_reasoning_behind_a_closed_block_is_refused_whatever_is_probed(load):
    assert "has reasoning, but the generation prompt" in refusal(ROWS["think"], load("qwen3_5_nothink_training"))


def rendered(render, messages):
    """What is written, or the reason why nothing is."""
    try:
        return render(messages)
    except Exception as error:
        return repr(error)


@pytest.mark.parametrize("name", ["chatml", *TEMPLATES])
def test_a_frame_holds_what_the_template_writes(load, name):
    tokenizer = load("phi3" if name == "chatml" else name)
    text = CHATML if name == "chatml" else tokenizer.chat_template
    template = replace(probe_template(tokenizer), text=text, framed=writes_contents_only(text))
    assert template.framed == (name in ("chatml", "phi3", "phi3_training"))
    contents = [
        "",
        " a\n",
        "{0} {braces} }}{{",
        "<think>\nr\n</think>\n\na",
        "Émile 四 🙂",
        "\\1 %s &lt;'\"",
        f"{OPEN}0{CLOSE}",
    ]
    for number in range(60):
        roles = [PLAIN_ROLES[number // 3**place % 3] for place in range(1 + number % 4)]
        messages = [says(contents[(number + n) % len(contents)], role) for n, role in enumerate(roles)]
        assert rendered(template.render_plain, messages) == rendered(template.render, messages)


LOOP = "{{% for message in messages %}}<|{{{{ message.role }}}}|>{}{{% endfor %}}".format
WRITTEN = ("message.content", "message['content']", "'a' + message.content + 'b'", "loop.index0 ~ message.content")
WRITTEN += ("messages[0].content", "messages[loop.index0 - 1]['role']", "'x' if loop.last else 'y'")
READ = (
    "message.content | trim",
    "message.content.strip()",
    "'x' in message.content",
    "'x' if message.content else ''",
)
READ += ("message.content[0]", "(message.content ~ 'x') | trim", "'%s' % message.content", "[message.content]")
READ += (
    "message",
    "messages",
    "messages | length",
    "message.items()",
    "message.get('content')",
    "messages[0] | tojson",
)
READ += ("loop.previtem.content | upper", "loop.changed(message.content)", "message[key]", "message['con' + 'tent']")
READ += ("messages[message.content].role", "messages['pop']['__self__'][0]['content'] | trim", "messages[:1] | string")
SHOWN = LOOP("{{ message.content }}")
STATEMENTS = (
    f"{{% set x %}}{SHOWN}{{% endset %}}{{{{ x | trim }}}}",
    f"{{% filter upper %}}{SHOWN}{{% endfilter %}}",
    f"{{% autoescape true %}}{SHOWN}{{% endautoescape %}}",
    f"{{% macro all() %}}{SHOWN}{{% endmacro %}}{{{{ all() | trim }}}}",
    "{% macro f(x) %}{{ x | trim }}{% endmacro %}" + LOOP("{{ f(message.content) }}"),
    LOOP("{% set said = message.content %}{{ said }}"),
    LOOP("{% if message.content is string %}{{ message.content }}{% endif %}"),
    "{% for message in messages if message.content %}{% endfor %}",
    "{% for message in messages[1:] %}{{ message.content }}{% endfor %}",
    "{% for sign in messages[0].content %}{{ sign }}{% endfor %}",
    "{% set first = messages[0] %}{{ first.content | trim }}",
    "{% for role, content in messages %}{% endfor %}",
    "{% unknown %}",
)


@pytest.mark.parametrize("said", WRITTEN)
def test_a_template_that_only_writes_contents_has_frames(said):
    assert writes_contents_only(LOOP(f"{{{{ {said} }}}}"))
    assert writes_contents_only("{% generation %}" + LOOP(f"{{{{ {said} }}}}") + "{%- endgeneration -%}")


@pytest.mark.parametrize("text", [*(LOOP(f"{{{{ {said} }}}}") for said in READ), *STATEMENTS])
def test_a_template_that_does_more_has_none(text):
    assert not writes_contents_only(text)
