"""Row formats: a raw row -> a row in one of TRL's formats (`messages`, `prompt`+`completion`, `text`, `input_ids`).

A format is one function and one entry in `FORMATS`; a flat shape of instruction data is one entry in `SHAPES`. Each
function raises `ValueError` with the field, what it found and what a row should hold. Conversations are checked turn
by turn, so that what reaches the chat template is one.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from open_r1.errors import UserError

logger = logging.getLogger(__name__)
Row = dict[str, Any]
RESERVED = {"messages", "conversations", "tools", "template", "chat_template", "add_generation_prompt"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
ROLES |= {"observation": "tool", "ipython": "tool", "function": "tool"}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # the names that transformers reads reasoning from
BLANK = "".join(sign for sign in map(chr, range(0x3001)) if sign.isspace())
BLANK += "\ufdd0\ufdd1"  # which are taken out of contents, see supervision.py
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


def from_messages(row: Row, column: str = "messages", system: str = "system", **others: str) -> Row:
    """Conversation under `role`/`content` or ShareGPT's `from`/`value`, also as JSON text.

    Tools and template arguments pass through.
    """
    said = value_at(row, column)
    if isinstance(said, str) and said.lstrip().startswith("["):
        said = from_json(said, column)
    messages = [message_of(message, index) for index, message in enumerate(list_of(said, column))]
    return conversation(messages, system_of(row, system), row, others)


def from_columns(
    row: Row,
    prompt: str,
    response: str,
    query: str | None = None,
    system: str | None = None,
    history: str | None = None,
    **others: str,
) -> Row:
    """Instruction data in flat columns (or paths into nested ones) as a conversation.

    `query` stands on a new line behind `prompt`; `history` holds [question, answer] pairs or messages. Empty and null
    `query`, `system` and `history` count as absent.
    """
    asked, said = text_at(row, prompt), text_at(row, response)
    more = value_at(row, query) if query else None
    if more not in (None, ""):
        asked += "\n" + text_at(row, query)
    messages = earlier_turns(value_at(row, history), history) if history else []
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return conversation(messages, system_of(row, system) if system else "", row, others)


def conversation(messages: list[Row], system: str, row: Row, others: dict[str, str]) -> Row:
    """A conversation in TRL's format, with a system message where it has none."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return checked(messages, {"messages": messages, **for_template(row, **others)})


def checked(messages: list[Row], made: Row) -> Row:
    """The row `made` of messages, which are checked turn by turn.

    A message with `train: false` or `weight: 0` is context only: its number is in `untrained`.
    """
    untrained = [index for index, message in enumerate(messages) if "train" in message and not message.pop("train")]
    check_turns(messages)
    return {**made, "untrained": untrained} if untrained else made


def system_of(row: Row, column: str) -> str:
    """The system prompt of a row, empty where there is none. Raises `ValueError` when it is no text."""
    return "" if value_at(row, column) in (None, "") else text_at(row, column)


def earlier_turns(value: Any, column: str) -> list[Row]:
    """History as messages: from pairs or messages, or either as JSON."""
    value = from_json(value, column) if value else value
    if not value:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{column} must be a list of [question, answer] pairs or of messages; found {brief(value)}")
    messages: list[Row] = []
    for number, item in enumerate(value):
        if isinstance(item, dict):
            messages.append(message_of(item, number))
        elif isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item):
            asked, said = (clean(text, f"{column} {number}") for text in item)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        else:
            raise ValueError(f"{column} {number} must be a [question, answer] pair; found {brief(item)}")
    return messages


def from_prompt_completion(row: Row, prompt: str = "prompt", completion: str = "completion", **others: str) -> Row:
    """`prompt` and `completion`, both text or both messages."""
    asked, said = value_at(row, prompt), value_at(row, completion)
    if said in ("", []):
        raise ValueError(f"{completion} is empty, so there is nothing to learn")
    if isinstance(asked, str) and isinstance(said, str):
        return {"prompt": clean(asked, prompt), "completion": clean(said, completion)}
    if not isinstance(asked, list) or not isinstance(said, list):
        raise ValueError(
            f"{prompt} and {completion} are both text or both messages; found {brief(asked)} and {brief(said)}"
        )
    before = [message_of(message, index) for index, message in enumerate(list_of(asked, prompt))]
    after = [message_of(message, index) for index, message in enumerate(list_of(said, completion), len(before))]
    return checked([*before, *after], {"prompt": before, "completion": after, **for_template(row, **others)})


def prompt_id(row: Row) -> int:
    """64 bits of what a row in TRL's format asks first, white space aside: equal for rows with the same question.

    A greeting asks nothing: where the user has said fewer than four words, what is said next counts too, and the
    system message where there is nothing more.
    """
    prompt = row.get("messages", row.get("prompt"))
    if isinstance(prompt, list):
        words: list[str] = []
        before = ""
        for message in prompt:
            role = message["role"]
            if role == "assistant" and before != "assistant" and len(words) >= 4:
                break
            if role == "user":
                words += (message.get("content") or "").split()
            before = role
        if len(words) < 4:
            words += [
                word
                for message in prompt
                if message["role"] == "system"
                for word in (message.get("content") or "").split()
            ]
    elif prompt is None and "input_ids" in row:
        learnt = next((place for place, label in enumerate(row["labels"]) if label != -100), 0)
        words = [str(token) for token in row["input_ids"][:learnt] or row["input_ids"]]
    else:
        words = (row["text"] if prompt is None else prompt).split()
    found = hashlib.blake2b(" ".join(words).encode(), digest_size=8)
    return int.from_bytes(found.digest(), "little", signed=True)


def for_template(row: Row, tools: str = "tools", chat_template_kwargs: str = "chat_template_kwargs") -> Row:
    """What a row says to the chat template beside messages. Raises `ValueError` when it is of no use there."""
    kept = {}
    if schemas := value_at(row, tools):
        kept["tools"] = schemas
    if arguments := value_at(row, chat_template_kwargs):
        kept["chat_template_kwargs"] = arguments
    if not kept:
        return kept
    if "tools" in kept and (schemas := from_json(kept.pop("tools"), tools)) is not None:
        kept["tools"] = schemas
    if not isinstance(kept.get("tools", []), list):
        raise ValueError(f"{tools} must be a list of schemas; found {brief(kept['tools'])}")
    given = kept.get("chat_template_kwargs", {})
    if not isinstance(given, dict) or RESERVED & given.keys():
        raise ValueError(f"{chat_template_kwargs} must hold arguments of the template, not {brief(given)}")
    return kept


def from_text(row: Row, column: str = "text") -> Row:
    """Plain text, trained on in full."""
    return {"text": text_at(row, column)}


def from_tokens(row: Row) -> Row:
    """Rows that somebody tokenised already: `input_ids`, and `labels` or TRL's masks of the same length."""
    ids = row["input_ids"]
    labels = row.get("labels", ids)
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if name in row]
    for name, values in (("input_ids", ids), ("labels", labels), *(("a mask", mask) for mask in masks)):
        if not isinstance(values, list) or len(values) != len(ids) or set(map(type, values)) != {int}:
            raise ValueError(
                f"input_ids, labels and masks are lists of numbers, of one length; {name} is {brief(values)}"
            )
    if 0 in (row.get("attention_mask") or []):
        raise ValueError("attention_mask says that input_ids hold padding; remove the padding")
    if masks and "labels" not in row:
        labels = [token if all(said) else -100 for token, *said in zip(ids, *masks, strict=True)]
    return {"input_ids": ids, "labels": labels}


def from_json(value: Any, what: str) -> Any:
    """`value`, or what it says where it is JSON as text. Raises `ValueError`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is text that is not valid JSON: {error}") from None


def from_table(row: Row, nested: list[str], then: Callable[[Row], Row]) -> Row:
    """What `then` makes of a row of a typed table, whose `nested` columns hold mappings."""
    return then({**row, **{column: without_nulls(row[column]) for column in nested}})


def without_nulls(value: Any) -> Any:
    """Mappings in `value` without the nulls that a typed column fills in where rows have different keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


FORMATS: dict[tuple[str, ...], Callable[[Row], Row]] = {
    ("messages",): from_messages,
    ("conversations",): partial(from_messages, column="conversations"),
    ("prompt", "completion"): from_prompt_completion,
    ("text",): from_text,
    ("input_ids",): from_tokens,
}
# Flat shapes of instruction data by the columns that ask and answer, and what else belongs to them when it is there.
SHAPES: dict[tuple[str, str], dict[str, str]] = {
    ("instruction", "output"): {"query": "input", "system": "system", "history": "history"},
    ("instruction", "response"): {"query": "context", "system": "system"},
    ("prompt", "response"): {"query": "query", "system": "system", "history": "history"},
    ("query", "response"): {"system": "system", "history": "history"},
    ("question", "answer"): {"system": "system"},
    ("question", "response"): {"system": "system_prompt"},
    ("problem", "solution"): {},
}


def row_function(
    columns: list[str], name: str, text_field: str = "text", mapping: dict[str, str] | None = None
) -> Callable[[Row], Row]:
    """The function for rows of a table: as `mapping` says, or as the table's columns tell.

    Raises `UserError` when a column that the mapping names is missing, and when columns tell nothing or too much.
    """
    if mapping:
        if missing := {path for path in mapping.values() if path not in columns and path.split(".")[0] not in columns}:
            raise UserError(f"{name}: its mapping names {listed(sorted(missing))}; its columns are {listed(columns)}")
        return mapped(mapping)
    if images := {"image", "images", "pixel_values"} & set(columns):
        raise UserError(f"{name}: column {', '.join(images)} holds images; only text models are trained here")
    formats = {**FORMATS, (text_field,): partial(from_text, column=text_field)}
    found = [needed for needed in formats if set(needed) <= set(columns)]
    shapes = [shape for shape in SHAPES if set(shape) <= set(columns)]
    if len(found) == 1 and not (shapes and found[0] in ((text_field,), ("prompt", "completion"))):
        return formats[found[0]]
    if not found and len(shapes) == 1:
        asks, answers = shapes[0]
        also = {part: column for part, column in SHAPES[shapes[0]].items() if column in columns}
        mapping = {"prompt": asks, "response": answers, **also}
        logger.info("%s: read as instruction data: %s", name, as_yaml(mapping))
        return mapped(mapping)
    known = "; ".join("+".join(needed) for needed in [*formats, *SHAPES])
    if not found and not shapes:
        raise UserError(
            f"{name}: no known format in its columns {listed(columns)}; known are {known}; for another one say "
            f"which columns ask and answer: mapping: {{prompt: {columns[0]}, response: {columns[-1]}}}"
        )
    several = [*found, *shapes]
    asks, answers = shapes[0] if shapes else (several[0][0], several[-1][-1])
    raise UserError(
        f"{name}: its columns {listed(columns)} hold several formats ({'; '.join('+'.join(f) for f in several)}); "
        f"say which, with columns: [{', '.join(several[0])}] or mapping: {{prompt: {asks}, response: {answers}}} "
        "(of a source in dataset_mixture; dataset_columns and dataset_mapping for one dataset alone)"
    )


def mapped(mapping: dict[str, str]) -> Callable[[Row], Row]:
    """The function for rows whose columns a `ColumnMapping` names."""
    if "messages" in mapping:
        return partial(from_messages, **{("column" if k == "messages" else k): v for k, v in mapping.items()})
    if "text" in mapping:
        return partial(from_text, column=mapping["text"])
    return partial(from_prompt_completion if "completion" in mapping else from_columns, **mapping)


def listed(names: Iterable[str]) -> str:
    """Names for a message; those that could be misread are quoted."""
    return ", ".join(name if name.isprintable() and name == name.strip() else repr(name) for name in names)


def as_yaml(mapping: dict[str, str]) -> str:
    """A mapping as one would write it in a recipe."""
    return "mapping: {" + ", ".join(f"{part}: {column}" for part, column in mapping.items()) + "}"


def value_at(row: Row, path: str) -> Any:
    """The value of a column, or of a path into it (`meta.question`, `answers.0.text`); None where there is none."""
    if path in row or "." not in path:
        return row.get(path)
    value: Any = row
    for step in path.split("."):
        if isinstance(value, list) and step.isdigit():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def text_at(row: Row, path: str) -> str:
    """A text with something in it. Raises `ValueError`."""
    value = value_at(row, path)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path} must be a text with something in it; found {brief(value)}")
    return clean(value, path)


def clean(text: str, what: str) -> str:
    """`text` when it is one. Raises `ValueError` where it holds NUL or half a character, which no text does."""
    if "\0" in text:
        raise ValueError(f"{what} holds the control character NUL at {text.index(chr(0))}; found {brief(text)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} holds half a character at {error.start}; found {brief(text)}") from None
    return text


def list_of(value: Any, what: str) -> list[Any]:
    """`value` when it is a list with something in it. Raises `ValueError`."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} must be a list with at least one message; found {brief(value)}")
    return value


def message_of(message: Any, index: int) -> Row:
    """A message under `role` and `content`, absent fields left out; `train` is there where it says something.

    Raises `ValueError` when role or content is missing or of no known kind.
    """
    if not isinstance(message, dict):
        raise ValueError(f"message {index} must hold role and content; found {brief(message)}")
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and role in KNOWN_ROLES and isinstance(content, str):  # most are so
        if "\0" in content or not content.isascii():
            clean(content, f"message {index} ({role})")
        return {"role": role, "content": content}
    said = {key: value for key, value in message.items() if value is not None}
    if "from" in said and "role" not in said:
        said["role"] = said.pop("from")
    if "value" in said and "content" not in said:
        said["content"] = said.pop("value")
    role = said.get("role")
    if not isinstance(role, str):
        raise ValueError(f"message {index} has no role; found {brief(message)}")
    said["role"] = role = ROLES.get(role, role)
    if role not in KNOWN_ROLES:
        raise ValueError(f"message {index} has the role {brief(role)}; known are {', '.join(KNOWN_ROLES)}")
    content = said.get("content")
    if isinstance(content, list):
        raise ValueError(
            f"message {index} has content in parts (images?); only text is trained here: {brief(content)}"
        )
    for name in THOUGHTS:
        if name in said and not isinstance(said[name], str):
            raise ValueError(f"message {index} ({role}) has reasoning that is no text; found {brief(message)}")
        clean(said.get(name, ""), f"message {index} ({role})")
    calls = said.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"message {index} ({role}) has no content; found {brief(content)}")
    if content is not None:
        clean(content, f"message {index} ({role})")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"message {index} ({role}) has tool_calls that are no list of calls: {brief(calls)}")
    for call in calls or ():
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"message {index} ({role}) has a tool call without a name: {brief(call)}")
    weight = said.pop("weight", None)
    train = said.pop("train", None if weight is None else bool(weight))
    if train is not None and (not isinstance(train, bool) or weight not in (None, train)):
        raise ValueError(f"message {index}: train is true or false, weight 0 or 1; found {brief(message)}")
    return said if train is None else {**said, "train": train}


def check_turns(messages: list[Row]) -> None:
    """Raise `ValueError` when messages are no conversation: turns that are empty, or in an order that cannot be."""
    first = next((message["role"] for message in messages if message["role"] not in ("system", "developer")), "user")
    if first != "user":
        raise ValueError(f"the conversation starts with the {first}: there is no prompt that it answers")
    before = ""
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role in ("system", "developer") and index and before not in ("system", "developer"):
            raise ValueError(f"message {index} is a {role} message behind a {before} message; it stands first")
        if role == "assistant" and before == "assistant":
            raise ValueError(
                f"messages {index - 1} and {index} are both the assistant's; join them, or put in what was asked"
            )
        called = before == "tool" or (before == "assistant" and bool(messages[index - 1].get("tool_calls")))
        if role == "tool" and not called:
            raise ValueError(f"message {index} is a tool's answer, but the message before it calls none")
        spoken = role == "user" or (role == "assistant" and not message.get("tool_calls"))
        if spoken and not content.strip(BLANK) and not any(message.get(name, "").strip(BLANK) for name in THOUGHTS):
            raise ValueError(f"message {index} ({role}) is empty; found {brief(content)}")
        before = role


def brief(value: Any, length: int = 80) -> str:
    """A value short enough for a message, with control characters escaped."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
