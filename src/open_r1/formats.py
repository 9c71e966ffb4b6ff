"""Row formats: a raw row -> a row in one of TRL's formats (`messages`, `prompt`+`completion`, `text`, `input_ids`).

A format is one function and one entry in `FORMATS`. Each raises `ValueError` with what it found and what a row
should hold.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from open_r1.errors import UserError

Row = dict[str, Any]
RESERVED = {"messages", "conversations", "tools", "template", "chat_template", "add_generation_prompt"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def from_messages(row: Row, column: str = "messages") -> Row:
    """Conversation under `role`/`content` or ShareGPT's `from`/`value`; tools and template arguments pass through."""
    messages = [message_of(message, index) for index, message in enumerate(list_of(row[column], column))]
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages, **for_template(row)}


def from_prompt_completion(row: Row) -> Row:
    """`prompt` and `completion`, both text or both messages."""
    prompt, completion = row["prompt"], row["completion"]
    if completion in ("", []):
        raise ValueError("completion is empty, so there is nothing to learn")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError(
            f"prompt and completion are both text or both messages; found {brief(prompt)} and {brief(completion)}"
        )
    return {
        "prompt": [message_of(message, index) for index, message in enumerate(list_of(prompt, "prompt"))],
        "completion": [message_of(message, index) for index, message in enumerate(list_of(completion, "completion"))],
        **for_template(row),
    }


def for_template(row: Row) -> Row:
    """What a row says to the chat template beside messages. Raises `ValueError` when it is of no use there."""
    kept = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
    if not kept:
        return kept
    if isinstance(kept.get("tools"), str):
        try:
            kept["tools"] = json.loads(kept["tools"])
        except ValueError as error:
            raise ValueError(f"tools is not valid JSON: {error}") from None
    if not isinstance(kept.get("tools", []), list):
        raise ValueError(f"tools must be a list of schemas; found {brief(kept['tools'])}")
    given = kept.get("chat_template_kwargs", {})
    if not isinstance(given, dict) or RESERVED & given.keys():
        raise ValueError(f"chat_template_kwargs must hold arguments of the template, not {brief(given)}")
    return {key: without_nulls(value) for key, value in kept.items()}


def without_nulls(value: Any) -> Any:
    """Mappings in `value` without the nulls that a column of mixed schemas fills in."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def from_text(row: Row, column: str = "text") -> Row:
    """Plain text, trained on in full."""
    if not isinstance(row[column], str) or not row[column]:
        raise ValueError(f"{column} must be a text; found {brief(row[column])}")
    return {"text": row[column]}


def from_tokens(row: Row) -> Row:
    """Rows that somebody tokenised already: `input_ids`, and `labels` or TRL's masks of the same length."""
    ids = row["input_ids"]
    labels = row.get("labels", ids)
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    for name, values in (("input_ids", ids), ("labels", labels), *(("a mask", mask) for mask in masks)):
        if (
            not isinstance(values, list)
            or len(values) != len(ids)
            or not all(type(v) is int for v in values)
            or not ids
        ):
            raise ValueError(
                f"input_ids, labels and masks are lists of numbers, of one length; {name} is {brief(values)}"
            )
    if masks and "labels" not in row:
        labels = [token if all(said) else -100 for token, *said in zip(ids, *masks, strict=True)]
    return {"input_ids": ids, "labels": labels}


FORMATS: dict[tuple[str, ...], Callable[[Row], Row]] = {
    ("messages",): from_messages,
    ("conversations",): partial(from_messages, column="conversations"),
    ("prompt", "completion"): from_prompt_completion,
    ("text",): from_text,
    ("input_ids",): from_tokens,
}


def row_function(columns: list[str], name: str, text_field: str = "text") -> Callable[[Row], Row]:
    """The format that a table's columns say it has. Raises `UserError` when that is none or several."""
    if images := {"image", "images", "pixel_values"} & set(columns):
        raise UserError(f"{name}: column {', '.join(images)} holds images; only text models are trained here")
    formats = {**FORMATS, (text_field,): partial(from_text, column=text_field)}
    found = [needed for needed in formats if set(needed) <= set(columns)]
    if len(found) == 1:
        return formats[found[0]]
    known = "; ".join("+".join(needed) for needed in formats)
    if not found:
        raise UserError(f"{name}: no known format in its columns {', '.join(columns)}; known are {known}")
    raise UserError(
        f"{name}: its columns {', '.join(columns)} hold several formats ({'; '.join('+'.join(f) for f in found)}); "
        "say which with columns, in a dataset_mixture of this one source"
    )


def list_of(value: Any, what: str) -> list[Any]:
    """`value` when it is a list with something in it. Raises `ValueError`."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} must be a list with at least one message; found {brief(value)}")
    return value


def message_of(message: Any, index: int) -> Row:
    """A message under `role` and `content`, absent fields left out. Raises `ValueError` when either is missing."""
    if not isinstance(message, dict):
        raise ValueError(f"message {index} must hold role and content; found {brief(message)}")
    said = {
        key: value if isinstance(value, str) else without_nulls(value)
        for key, value in message.items()
        if value is not None
    }
    if "from" in said and "role" not in said:
        said["role"] = said.pop("from")
    if "value" in said and "content" not in said:
        said["content"] = said.pop("value")
    if not isinstance(said.get("role"), str):
        raise ValueError(f"message {index} has no role; found {brief(message)}")
    said["role"] = ROLES.get(said["role"], said["role"])
    content = said.get("content")
    if isinstance(content, list):
        raise ValueError(
            f"message {index} has content in parts (images?); only text is trained here: {brief(content)}"
        )
    if not isinstance(content, str) and not said.get("tool_calls"):
        raise ValueError(f"message {index} ({said['role']}) has no content; found {brief(content)}")
    return said


def brief(value: Any) -> str:
    """A value short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
