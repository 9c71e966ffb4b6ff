"""What the model must say in a conversation, for any chat template: the text to train on and its supervised spans.

One rule: supervised is exactly what the model has to produce at inference, from the end of the generation prompt (the
template rendered with `add_generation_prompt`) to the turn's stop token inclusive. A turn whose rendering inside the
whole conversation is not what inference would have produced is never supervised there: it becomes a row of its own, is
masked, or is an error, as the recipe says. Nothing is guessed: a turn that cannot be told is a `ValueError`.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from open_r1.formats import THOUGHTS

Messages = list[dict[str, Any]]
# A text to train on, and the character spans [start, end) of it that the model says.
Rendering = tuple[str, list[tuple[int, int]]]

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, put around control tokens that a user spelled out
PROBE = "x7q"
PLAIN_ROLES = ("system", "user", "assistant")
EMPTY_REASONING = re.compile(r"\s*(<think>)?\s*</think>\s*")
PREFILL = re.compile(r"<think>\s*(</think>\s*)?$")
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# What a template may read of plain messages and of a loop over them, as it has nothing to do with contents, and the
# nodes of its syntax that write what stands in them.
FIELDS = {"role", "name", "tool_calls", *THOUGHTS}
PLACES = {"index", "index0", "revindex", "revindex0", "first", "last", "length"}
MESSAGES = nodes.Name("messages", "load")
WRITING = (nodes.Template, nodes.Output, nodes.Add, nodes.Concat, nodes.If)


@dataclass(frozen=True, eq=False)
class Template:
    """A chat template, and what rendering a few probes has shown of it.

    `stop` ends the assistant's turn; `stops` finds it where the template wrote it, and `endings` any special token at
    the end of a text. `prompt` is the generation prompt when the template only ever appends and writes
    contents as they are, None otherwise: then one rendering of a conversation tells its spans. `control` matches the
    tokens that structure a conversation. `text_arguments` says whether it takes the arguments of a tool call as text
    or, false, as a mapping; None when it takes neither. `framed` says that contents decide nothing about a rendering,
    so that their roles alone tell what stands around them.
    """

    name: str
    text: str
    special: dict[str, Any]
    stop: str
    stops: re.Pattern
    endings: re.Pattern
    control: re.Pattern
    prompt: str | None
    text_arguments: bool | None
    framed: bool

    def render(self, messages: Messages, prompt: bool = False, **kwargs: Any) -> str:
        """The conversation as text, with the generation prompt behind it when `prompt`."""
        texts, _ = render_jinja_template(
            [messages], chat_template=self.text, add_generation_prompt=prompt, **{**self.special, **kwargs}
        )
        return texts[0]

    def render_plain(self, messages: Messages) -> str:
        """`render` of messages that `is_plain`."""
        if not self.framed:
            return self.render(messages)
        frame = frame_of(self, tuple([message["role"] for message in messages]))
        return frame.format(*[message["content"] for message in messages])

    def render_with_markers(self, messages: Messages, **kwargs: Any) -> Rendering:
        """The conversation and the spans inside its `{% generation %}` blocks."""
        texts, spans = render_jinja_template(
            [messages], chat_template=self.text, return_assistant_tokens_mask=True, **{**self.special, **kwargs}
        )
        return texts[0], [tuple(span) for span in spans[0]]


@dataclass(frozen=True)
class Turn:
    """An assistant turn as inference sees it: `prompt`, then `response`.

    `prefill` is the reasoning that the generation prompt opens, part of `prompt`; the first `skipped` characters of
    `response` are an empty reasoning block that the template puts there and the content does not hold.
    """

    prompt: str
    response: str
    prefill: str
    skipped: int
    stop_added: bool

    @property
    def block(self) -> bool:
        """Whether prompt and response hold an empty reasoning block that the content does not."""
        return bool(EMPTY_REASONING.fullmatch(self.prefill + self.response[: self.skipped]))

    @property
    def without_block(self) -> str:
        """Prompt and response without that block."""
        return self.prompt[: len(self.prompt) - len(self.prefill)] + self.response[self.skipped :]


def probe_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Learn what a tokenizer's template does by rendering short conversations with it."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= {"<think>", "</think>"}  # an answer may hold its reasoning
    text = tokenizer.chat_template
    text = text["default"] if isinstance(text, dict) else text
    bare = Template(
        name=getattr(tokenizer, "template_name", f"of {tokenizer.name_or_path}"),
        text=text,
        special=tokenizer.special_tokens_map,
        stop=tokenizer.eos_token,
        stops=re.compile("((?<!{0}){1})(?:\\s*{1})*".format(OPEN, re.escape(tokenizer.eos_token))),
        endings=re.compile(f"(?:{any_of(sorted(special)).pattern})$"),
        control=re.compile("(?!)"),
        prompt=None,
        text_arguments=None,
        framed=writes_contents_only(text),
    )
    turns = [{"role": role, "content": f"{PROBE}{n}"} for n, role in enumerate(["user", "assistant"] * 2)]
    shown = bare.render(turns) + bare.render(turns[:1], prompt=True)
    delimiters = {token for token in added if token in shown and "think" not in token and not token.isspace()}
    return Template(
        **{
            **vars(bare),
            "control": any_of(sorted(special | delimiters)),
            "prompt": constant_prompt(bare, turns),
            "text_arguments": argument_type(bare, turns[0]),
        }
    )


@lru_cache(maxsize=1024)
def frame_of(template: Template, roles: tuple[str, ...]) -> str:
    """What a `framed` template writes for plain messages of these roles, as a format string of their contents."""
    messages = [{"role": role, "content": f"{OPEN}{index}{CLOSE}"} for index, role in enumerate(roles)]
    escaped = template.render(messages).replace("{", "{{").replace("}", "}}")
    return re.sub(f"{OPEN}(\\d+){CLOSE}", r"{\1}", escaped)


def writes_contents_only(text: str) -> bool:
    """Whether the syntax of a template shows that all it does with contents of plain messages is to write them."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", text))
    except TemplateSyntaxError:
        return False
    return indifferent(tree, frozenset())


def indifferent(node: nodes.Node, held: frozenset[str], written: bool = True) -> bool:
    """Whether no content of a plain message decides anything in a part of a template, which may only write them.

    `held` are the variables that hold a message, `written` says that what the part gives is written as it is. What is
    not known to do no harm is taken to do some.
    """
    if isinstance(node, nodes.Name):
        return node.name not in held | {"messages", "loop"}
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        of, key = node.node, node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        if of == nodes.Name("loop", "load"):
            return key in PLACES
        numbered = isinstance(of, nodes.Getitem) and of.node == MESSAGES and indifferent(of.arg, held, False)
        if numbered or (isinstance(of, nodes.Name) and of.name in held):
            return key in FIELDS or (key == "content" and written)
    skipped: tuple[str, ...] = ("test",)
    if isinstance(node, nodes.For) and node.iter == MESSAGES and isinstance(node.target, nodes.Name):
        held, skipped = held | {node.target.name}, ("test", "target", "iter")
    elif not isinstance(node, WRITING):
        written = False
    test = getattr(node, "test", None)
    parts = node.iter_child_nodes(exclude=skipped)
    return (test is None or indifferent(test, held, False)) and all(indifferent(part, held, written) for part in parts)


def any_of(tokens: list[str]) -> re.Pattern:
    """A pattern of any of the tokens, longest first. What all begin with is taken out: `re` then looks for it fast."""
    prefix = os.path.commonprefix(tokens)
    rest = "|".join(re.escape(token[len(prefix) :]) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(f"{re.escape(prefix)}(?:{rest})" if tokens else "(?!)")


def constant_prompt(template: Template, turns: Messages) -> str | None:
    """The generation prompt of a template that only appends and writes contents verbatim, else None."""
    prompt = ""
    for messages in (turns, [{"role": "system", "content": f"{PROBE}s"}, *turns]):
        try:
            whole = template.render(messages)
        except Exception:
            if messages is turns:
                return None
            break  # the template refuses system messages, in whatever way it does: no row can hold one
        prompt = template.render(messages[:-1], prompt=True)[len(template.render(messages[:-1])) :]
        spans = spans_at_a_glance(messages, whole, prompt, template.stop)
        if not prompt or spans is None or PREFILL.search(prompt):
            return None
        for index, (start, end) in zip((len(messages) - 3, len(messages) - 1), spans, strict=True):
            before, after = template.render(messages[:index], prompt=True), template.render(messages[: index + 1])
            if whole[:start] != before or not whole.startswith(after) or len(after) < end:
                return None
    return prompt


def argument_type(template: Template, question: dict[str, Any]) -> bool | None:
    """`text_arguments` of a template: a mapping where it takes one, as transformers documents it."""
    for given in ({PROBE: 1}, f'{{"{PROBE}": 1}}'):
        call = {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": given}}
        try:
            if PROBE in template.render([question, {"role": "assistant", "content": "", "tool_calls": [call]}]):
                return isinstance(given, str)
        except Exception:
            continue  # the template refuses it, in whatever way it does
    return None


def with_arguments(message: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """A message whose tool calls hold their arguments as text, or as the mapping that the text is."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        given = function.get("arguments")
        if as_text and isinstance(given, dict):
            function = {**function, "arguments": json.dumps(given, ensure_ascii=False)}
        elif not as_text and isinstance(given, str):
            try:
                function = {**function, "arguments": json.loads(given) if given.strip() else {}}
            except ValueError as error:
                raise ValueError(
                    f"the arguments of a tool call are text that is not JSON: {error}; {given[:60]!r}"
                ) from None
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def spans_at_a_glance(messages: Messages, whole: str, prompt: str, stop: str) -> list[tuple[int, int]] | None:
    """Spans by looking for prompt, content and stop token in one rendering; None unless each is there just so."""
    spans, at = [], 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        found = whole.find(prompt, at)
        start = found + len(prompt)
        end = start + len(message["content"])
        if found < 0 or whole[start:end] != message["content"] or not whole.startswith(stop, end):
            return None
        at = end + len(stop)
        spans.append((start, at))
    return spans if whole.find(prompt, at) < 0 else None


def conversation_rows(
    messages: Messages,
    template: Template,
    *,
    turns: list[int],
    plain: bool = False,
    on_rewritten: str,
    empty_reasoning: str,
    **kwargs: Any,
) -> tuple[list[Rendering], dict[str, int]]:
    """The rows to train on for one conversation, and counts of what was done to get them.

    `turns` are the numbers of the assistant's messages to learn; `plain` says that messages `is_plain` and hold no
    control tokens. `on_rewritten` is `expand`, `mask` or `error`; `empty_reasoning` is `mask` or `supervise`; `kwargs`
    are the row's tools and template arguments. Raises `ValueError` when what the model must say cannot be told.
    """
    whole = template.render_plain(messages) if plain else template.render(messages, **kwargs)
    if plain and template.prompt is not None:
        spans = spans_at_a_glance(messages, whole, template.prompt, template.stop)
        if spans is not None:
            said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            return [(whole, [span for index, span in zip(said, spans, strict=True) if index in turns])], {}
    counts: Counter = Counter()
    spans: list[tuple[int, int]] = []
    rows: list[Rendering] = []
    for index in turns:
        turn = turn_at_inference(messages, index, whole, template, counts, kwargs)
        skipped = turn.skipped if empty_reasoning == "mask" else 0
        text, start = turn.prompt + turn.response, len(turn.prompt)
        if turn.stop_added and whole.startswith(text.removesuffix(template.stop)):
            counts["rewritten"] += 1  # not rewritten, but only on its own it can end with a stop token
            rows.append((text, [(start + skipped, len(text))]))
        elif whole.startswith(text):
            spans.append((start + skipped, len(text)))
        elif turn.block and empty_reasoning == "mask" and whole.startswith(turn.without_block):
            end = len(turn.without_block)  # the empty block is only there at the turn's own inference
            spans.append((end - len(turn.response) + turn.skipped, end))
        elif on_rewritten == "expand":
            counts["rewritten"] += 1
            rows.append((text, [(start + skipped, len(text))]))
        elif on_rewritten == "mask":
            counts["masked_turns"] += 1
        else:
            raise ValueError(
                f"the chat template rewrites message {index} in the whole conversation, so that it is not what the "
                "model says at inference; set on_rewritten_turn to expand or mask"
            )
    return rows + [(whole, spans)] * bool(spans), counts


def is_plain(messages: Messages) -> bool:
    """Whether messages are of the kind that the template was probed with: text alone."""
    return all(len(m) == 2 and "content" in m and m.get("role") in PLAIN_ROLES for m in messages)


def turn_at_inference(
    messages: Messages, index: int, whole: str, template: Template, counts: Counter, kwargs: dict[str, Any]
) -> Turn:
    """What inference would see before turn `index`, and what the model has to say then."""
    message = messages[index]
    content = message.get("content") or ""
    reasoning = next((message[name] for name in THOUGHTS if message.get(name)), "")
    if index == 0:
        raise ValueError("the conversation starts with the assistant: there is no prompt that it answers")
    prompt = template.render(messages[:index], prompt=True, **kwargs)
    own = whole if index == len(messages) - 1 else template.render(messages[: index + 1], **kwargs)
    has_reasoning = bool(reasoning) or (content.lstrip().startswith("<think>") and "</think>" in content)
    said = own[len(prompt) :] if own.startswith(prompt) else None
    prefill = PREFILL.search(prompt)
    if prefill and not prefill[1] and content.lstrip().startswith("<think>"):
        inner = content.lstrip()[len("<think>") :]
        if said is None or squeeze(inner) != squeeze(said)[: len(squeeze(inner))]:
            said = inner.removeprefix("\n" if prefill[0].endswith("\n") else "")
            said += around(messages, index, template, kwargs)[1]
            counts["prefilled"] += 1
    elif said is None and prefill and prefill[1] and not has_reasoning:
        before = prompt[: prefill.start()]
        said = own[len(before) :] if own.startswith(before) else None
        counts["prefilled"] += 1
    elif said is None and not prefill and index > 1:
        said = behind_last_message(messages, index, prompt, own, template, kwargs)
    if said is None or (prefill and prefill[1] and has_reasoning):
        raise ValueError(contradiction(index, prompt, bool(prefill), has_reasoning))
    response, added = up_to_stop(said, template)
    counts["stop_added"] += added
    require_survival(message, index, content, reasoning, prefill[0] + response if prefill else response, template)
    injected = None if has_reasoning or EMPTY_REASONING.match(content) else EMPTY_REASONING.match(response)
    counts["empty_reasoning"] += injected is not None
    skipped = injected.end() if injected else 0
    if skipped and content[:1].isspace():  # which the pattern takes for the block's
        skipped = max(0, min(skipped, len(around(messages, index, template, kwargs)[0]) - len(prompt)))
    return Turn(prompt, response, prefill[0] if prefill else "", skipped, added)


def behind_last_message(
    messages: Messages, index: int, prompt: str, own: str, template: Template, kwargs: dict[str, Any]
) -> str | None:
    """What turn `index` says where the template rewrites something before the message that it answers.

    (gpt-oss drops the reasoning of tool calls once the answer is there.) That message with the generation prompt is
    looked for in `own`; control tokens in it, which no content can hold, make sure that it is not another text.
    """
    before = template.render(messages[: index - 1], **kwargs)
    asked = prompt[len(before) :] if prompt.startswith(before) else ""
    at = own.rfind(asked) if template.control.search(asked) else -1
    return own[at + len(asked) :] if at >= 0 else None


def around(messages: Messages, index: int, template: Template, kwargs: dict[str, Any]) -> tuple[str, str]:
    """What the template writes up to the content of turn `index`, and behind it: tool calls and the stop token."""
    probed = [*messages[:index], {**messages[index], "content": PROBE}]
    before, _, behind = template.render(probed, **kwargs).rpartition(PROBE)
    return before, behind


def contradiction(index: int, prompt: str, prefilled: bool, has_reasoning: bool) -> str:
    """Why a turn cannot follow its generation prompt."""
    if not prefilled:
        return (
            f"the chat template renders what comes before message {index} another way once the turn is there, so what "
            "the model is asked and has to say cannot be told; use a template that does not look ahead"
        )
    has = "has reasoning" if has_reasoning else "has no reasoning"
    return (
        f"message {index} {has}, but the generation prompt before it ends with {prompt[-30:]!r} and the chat "
        "template renders the turn another way: the model would never be asked so; set enable_thinking in the row's "
        "chat_template_kwargs to what the answer is, or give the answer its <think> block"
    )


def up_to_stop(said: str, template: Template) -> tuple[str, bool]:
    """`said` up to its stop token inclusive, and whether one had to be added because the template writes none.

    A template may write the stop token inside a turn too, and more than once at its end: the last place counts.
    """
    ends = [found.end(1) for found in template.stops.finditer(said)]
    if ends:
        return said[: ends[-1]], False
    said = said.rstrip()
    if template.endings.search(said):  # a tool call may end with a token of its own
        return said, False
    return said + template.stop, True


def require_survival(
    message: dict[str, Any], index: int, content: str, reasoning: str, response: str, template: Template
) -> None:
    """Raise `ValueError` when something that the message says is not in its rendering, white space aside."""
    rendered = squeeze(response)
    names = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or []]
    texts = [("content", content), ("reasoning", reasoning), *(("tool call", name) for name in names)]
    for what, text in sorted(texts, key=lambda said: len(said[1]), reverse=True):
        if squeeze(text) not in rendered:
            raise ValueError(
                f"the {what} of message {index} does not survive rendering by the chat template {template.name}; "
                f"it holds {text[:60]!r}, the rendering {response[:60]!r}"
            )
        rendered = rendered.replace(squeeze(text), "", 1)  # a call's name in the content does not stand for the call


def squeeze(text: str) -> str:
    """`text` without white space, which templates add and strip."""
    return "".join(text.split())


def mark_control_tokens(value: Any, control: re.Pattern) -> Any:
    """`value` (text, or lists and mappings of it) with every control token in it put between private marks.

    Marks that were there before are removed, so that nobody can forge one.
    """
    if isinstance(value, str):
        clean = value.replace(OPEN, "").replace(CLOSE, "")
        return control.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", clean)
    if isinstance(value, dict):
        return {mark_control_tokens(key, control): mark_control_tokens(item, control) for key, item in value.items()}
    if isinstance(value, list):
        return [mark_control_tokens(item, control) for item in value]
    return value
