"""Compare what we supervise under TRL's chat templates with the assistant mask of TRL's training twins of them.

    python scripts/compare_supervision.py

Prints a Markdown table of every difference and its reason; exits with 1 when there is one without a known reason.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from open_r1.chat import end_of_turn
from open_r1.errors import UserError
from open_r1.supervision import Messages, Template, conversation_rows, probe_template

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|<\|[\w\"]+>|<[\w\"]+\|>|\[gMASK\]|<sop>"
)
WORD = re.compile(rf"{SPECIAL.pattern}|</?think>|\s+|\w+|.")
NUMBER = {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}, "required": ["a"]}
STOPS = {"<|observation|>", "<|end|>", "<|tool_response>"}  # that take the place of the stop token at times
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add one.", "parameters": NUMBER}}]
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def turns(*contents: str) -> Messages:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def with_field(messages: Messages) -> Messages:
    """The same with reasoning in a field of its own."""
    return [{**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in messages]


KINDS: dict[str, tuple[Messages, dict[str, Any]]] = {
    "plain": (turns("One?", "Eins.", "Two?", "Zwei."), {}),
    "white space": (turns("One?", "\n  Eins.\n\n"), {}),
    "`<think>` in content": (
        turns("One?", "<think>\nhm\n</think>\n\nEins.", "Two?", "<think>\nha\n</think>\n\nZwei."),
        {},
    ),
    "reasoning field": (with_field(turns("One?", "Eins.", "Two?", "Zwei.")), {}),
    "tool call": (
        [
            *turns("One?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "add", "tool_call_id": CALL["id"], "content": "1"},
            *turns("", "Eins.")[1:],
        ],
        {"tools": TOOLS},
    ),
}


def load(name: str) -> Template:
    """A template as a byte tokenizer with the template's tokens in its vocabulary would know it."""
    vocabulary = {byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    special = sorted({"<bos>", "<eos>", *SPECIAL.findall(text)})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.chat_template = text
    tokenizer.eos_token = end_of_turn(tokenizer) or tokenizer.eos_token
    return probe_template(tokenizer)


def ours(template: Template, messages: Messages, kwargs: dict[str, Any]) -> list[tuple[str, bool]]:
    """What we supervise, turn by turn, and whether that turn became a row of its own."""
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    how = {"on_rewritten": "expand", "empty_reasoning": "mask"}
    rows, counts = conversation_rows(messages, template, turns=places, **how, **kwargs)
    alone = counts["rewritten"]
    found = [(text, span, n < alone) for n, (text, spans) in enumerate(rows) for span in spans]
    found.sort(key=lambda said: said[1][0])  # a later turn has more text before it
    return [(text[start:end], own) for text, (start, end), own in found]


def theirs(template: Template, messages: Messages, kwargs: dict[str, Any]) -> list[str]:
    """What the twin's mask holds, turn by turn."""
    text, spans = template.render_with_markers(messages, **kwargs)
    joined: list[list[int]] = []
    for start, end in spans:
        if start == end:
            continue
        if joined and not text[joined[-1][1] : start].strip():  # two blocks of one turn
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return [text[start:end] for start, end in joined]


def parts(extra: str, prompt: str, stops: set[str]) -> Iterator[tuple[str, str]]:
    """(what to show, reason) for each part of a text that only one side supervises before or behind the turn."""
    fill = re.search(r"<think>\s*(</think>\s*)?$", prompt)
    known = {
        "role header": "|".join(re.escape(part) for part in headers(prompt)),
        "pre-fill": r"<think>\s*(</think>\s*)?|</think>\s*" if fill else "(?!)",
        "empty reasoning": r"\s*(<think>)?\s*</think>\s*",
        "stop token": "|".join(map(re.escape, stops)),
        "white space around": r"\s+",
    }
    while extra:
        matches = ((reason, re.match(pattern, extra)) for reason, pattern in known.items())
        reason, found = next(((r, m) for r, m in matches if m and m[0]), ("other", re.match(r"(?s).+", extra)))
        yield {"role header": "header", "stop token": "stop"}.get(reason, repr(found[0])), reason
        extra = extra[found.end() :]


def headers(prompt: str) -> list[str]:
    """The ends of a generation prompt that begin with a token, longest first, without reasoning."""
    text = re.sub(r"<think>\s*(</think>\s*)?$", "", prompt).rstrip()
    starts = [found.start() for found in SPECIAL.finditer(text)]
    return [text[start:] for start in starts] or [text]


def refusal(error: Exception) -> str:
    """Why we refuse a row, in short."""
    short = {
        "does not survive": "the template drops it",
        "no reasoning, but": "contradicts the pre-fill",
        "has reasoning, but": "contradicts the pre-fill",
        "another way once": "the template looks ahead",
    }
    return next((why for text, why in short.items() if text in str(error)), "the template raises an error")


def differences(name: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """(only ours, only theirs, reason) for one template and conversation."""
    template, twin = load(name), load(f"{name}_training")
    messages, kwargs = KINDS[kind]
    try:
        yours = theirs(twin, messages, kwargs)
    except Exception:  # a template may raise anything when it does not take such a conversation
        return
    try:
        mine = ours(template, messages, kwargs)
    except Exception as error:
        yield "", "row", f"refused: {refusal(error)}"
        return
    if len(mine) != len(yours):
        yield f"{len(mine)} turns", f"{len(yours)} turns", "other"
        return
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for n, (said, alone), marked in zip(places, mine, yours, strict=True):
        history = template.render(messages[:n], **kwargs)
        prompt = template.render(messages[:n], prompt=True, **kwargs)
        prompt = prompt[len(history) :] if prompt.startswith(history) else prompt
        prompt = prompt or template.render(messages[:1], prompt=True, **kwargs)  # none behind a tool's answer
        yield from compare(said, marked, alone, prompt, {template.stop, twin.stop, *STOPS})


def compare(said: str, marked: str, alone: bool, prompt: str, stops: set[str]) -> Iterator[tuple[str, str, str]]:
    """(only ours, only theirs, reason) for what we and the mask hold of one turn."""
    words = [WORD.findall(text) for text in (said, marked)]
    same = SequenceMatcher(None, *words, autojunk=False).find_longest_match()
    for one, start in ((0, same.a), (1, same.b)):
        for extra in (words[one][:start], words[one][start + same.size :]):
            if one == 0 and alone and "</think>" in extra:  # reasoning that the whole conversation does not hold
                yield "reasoning", "", "rewritten turn expanded"
                continue
            for shown, reason in parts("".join(extra), prompt, stops):
                if reason == "other" and alone:
                    shown, reason = "reasoning", "rewritten turn expanded"
                yield (shown, "", reason) if one == 0 else ("", shown, reason)


def main() -> int:
    """Print the table; returns 1 when a difference has no known reason."""
    found: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for path in sorted(TEMPLATES.glob("*_training.jinja")):
        name = path.stem.removesuffix("_training")
        try:
            load(name)
        except UserError:
            found["all", "", "row", "refused: takes contents in parts only"][name] = None
            continue
        for kind in KINDS:
            for difference in differences(name, kind):
                found[(kind, *difference)][name] = None
    kinds_of: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for (kind, *difference), names in found.items():
        for name in names:
            kinds_of[(name, *difference)].append(kind)
    merged: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for (name, *difference), kinds in kinds_of.items():
        merged[("all" if len(kinds) == len(KINDS) else ", ".join(kinds), *difference)].append(name)
    print("| templates | conversations | only ours | only TRL's | reason |")
    print("|---|---|---|---|---|")
    for (kinds, mine, yours, reason), names in sorted(merged.items(), key=lambda row: row[0][3]):
        cells = [", ".join(names), kinds, *(f"`{text}`" if text else "" for text in (mine, yours)), reason]
        print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return int(any(difference[-1] == "other" for difference in found))


if __name__ == "__main__":
    sys.exit(main())
