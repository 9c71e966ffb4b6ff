"""The tokenizer with its chat template, stop token and padding settled, and what the assistant says in a rendering."""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from open_r1.errors import UserError

if TYPE_CHECKING:
    from trl import ModelConfig

    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)
Messages = list[dict[str, Any]]
# A rendered conversation and the character spans [start, end) that the assistant says in it.
Rendering = tuple[str, list[tuple[int, int]]]

# https://github.com/openai/openai-python/blob/v0.28.1/chatml.md with the assistant's words and stop token marked.
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Tokens that models keep for padding or leave unused, in the order we would take them.
PADDING = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|vision_pad|>", "<unk>")


def get_tokenizer(model_args: "ModelConfig", training_args: "SFTConfig") -> PreTrainedTokenizerBase:
    """Load the tokenizer and settle template, stop token and padding; BOS is never touched.

    The template is the recipe's, else the tokenizer's own, else ChatML. Its end-of-turn token becomes EOS, and
    `training_args.eos_token`, from which the trainer sets the model's configs. `tokenizer.added_for_chat` names the
    tokens that had to be added, empty when the vocabulary has them all. Raises `UserError`.
    """
    tokenizer = load_tokenizer(model_args, training_args)
    template = recipe_template(training_args)
    if template is not None:
        tokenizer.chat_template = template
    elif tokenizer.chat_template is None:
        logger.info("%s has no chat template: ChatML is used", model_args.model_name_or_path)
        tokenizer.chat_template = CHATML
    tokenizer.added_for_chat = add_delimiters(tokenizer)
    settle_stop_token(tokenizer, training_args)
    settle_padding(tokenizer)
    return tokenizer


def load_tokenizer(model_args: "ModelConfig", training_args: "SFTConfig") -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises `UserError` when it cannot be loaded or has no fast backend."""
    name = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{name}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not tokenizer("The quick brown fox")["input_ids"]:
        raise UserError(
            f"{name}: its tokenizer cannot be loaded: the files of its vocabulary (tokenizer.json) are missing"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: {type(tokenizer).__name__} has no fast backend (tokenizer.json), which exact supervision needs; "
            "convert it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)"
        )
    return tokenizer


def recipe_template(training_args: "SFTConfig") -> str | None:
    """The template that the recipe gives: `chatml`, Jinja text, or the path of a `.jinja` file. Raises `UserError`."""
    if training_args.chat_template is not None and training_args.chat_template_path is not None:
        raise UserError("chat_template and chat_template_path are both set; keep chat_template")
    given = training_args.chat_template or training_args.chat_template_path
    if given == "chatml":
        return CHATML
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template: {given!r} is neither chatml, nor Jinja text, nor a readable file: {error}"
        ) from None


def add_delimiters(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Add the ChatML delimiters that the template writes and the vocabulary lacks; returns those added."""
    wanted = [token for token in ("<|im_start|>", "<|im_end|>") if token in tokenizer.chat_template]
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in wanted if token not in vocabulary]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        logger.warning("added %s to the vocabulary: new embeddings are trained and saved", " and ".join(missing))
    return missing


def settle_stop_token(tokenizer: PreTrainedTokenizerBase, training_args: "SFTConfig") -> None:
    """Make the template's end-of-turn token EOS, unless the recipe names another. Raises `UserError`."""
    ends = end_of_turn(tokenizer)
    asked = training_args.eos_token
    if asked is not None and asked not in tokenizer.get_vocab():
        raise UserError(f"eos_token: {asked!r} is not in the vocabulary of the tokenizer")
    if asked is not None and ends not in (None, asked):
        logger.warning("eos_token is %s, but the chat template ends a turn with %s", asked, ends)
    tokenizer.eos_token = asked or ends or tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise UserError("neither the chat template nor the tokenizer has a stop token; set eos_token")
    training_args.eos_token = tokenizer.eos_token
    if ends is None:
        logger.warning("the chat template ends turns with no token of its own; EOS stays %s", tokenizer.eos_token)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that follows the assistant's content in a rendering, None when there is none."""
    said = "x7q"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the chat template cannot render a user and an assistant turn: {error}") from error
    tail = text[text.rfind(said) + len(said) :]
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    found = re.search("|".join(re.escape(token) for token in special), tail) if special else None
    return found.group() if found else None


def settle_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with a token that is not EOS when the vocabulary has one to spare."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    spare = [token for token in PADDING if token in vocabulary and token != tokenizer.eos_token]
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    if not spare:
        logger.warning("padding with EOS: the vocabulary has no token to spare (labels are masked, so none is learnt)")


def assistant_spans(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Rendering]:
    """How to render a conversation and find what the assistant says in it, for this tokenizer's template.

    By `{% generation %}` markers where the template has them; else by the training twin that TRL ships for it; else
    by rendering up to each turn, which is exact for templates that only ever append.
    """
    template = tokenizer.chat_template
    if has_generation_markers(template):
        return partial(spans_by_markers, template=template, special=tokenizer.special_tokens_map)
    try:
        twin = get_training_chat_template(tokenizer)
    except ValueError:
        return partial(
            spans_by_prefix, template=template, special=tokenizer.special_tokens_map, stop=tokenizer.eos_token
        )
    return partial(spans_by_markers, template=twin, special=tokenizer.special_tokens_map)


def spans_by_markers(messages: Messages, *, template: str, special: dict[str, Any], **kwargs: Any) -> Rendering:
    """Spans inside `{% generation %}`."""
    texts, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **{**special, **kwargs}
    )
    return texts[0], [tuple(span) for span in spans[0]]


def spans_by_prefix(
    messages: Messages, *, template: str, special: dict[str, Any], stop: str, **kwargs: Any
) -> Rendering:
    """Spans from the end of each generation prompt to the stop token. Raises `ValueError` when a turn is rewritten."""

    def render(upto: int, prompt: bool) -> str:
        texts, _ = render_jinja_template(
            [messages[:upto]], chat_template=template, add_generation_prompt=prompt, **{**special, **kwargs}
        )
        return texts[0]

    text = render(len(messages), prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1, prompt=False)
        if not text.startswith(before) or not text.startswith(after):
            raise ValueError(
                f"the chat template rewrites what comes before or in message {index}, so what the model says there "
                "cannot be told; put {% generation %} markers into the template, or set assistant_only_loss: false"
            )
        end = text.rfind(stop, len(before), len(after))
        spans.append((len(before), len(after) if end < 0 else end + len(stop)))
    return text, spans
