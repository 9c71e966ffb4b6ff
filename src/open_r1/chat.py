"""The tokenizer with its chat template, stop token and padding settled."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from open_r1.errors import UserError

if TYPE_CHECKING:
    from trl import ModelConfig

    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)

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
SHIPPED = Path(trl.__file__).parent / "chat_templates"
# Tokens that models keep for padding or leave unused, in the order we would take them.
PADDING = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|vision_pad|>", "<unk>")


def get_tokenizer(model_args: "ModelConfig", training_args: "SFTConfig") -> PreTrainedTokenizerBase:
    """Load the tokenizer and settle template, stop token and padding; BOS is never touched.

    The template is the recipe's, else the tokenizer's own, else ChatML. Its end-of-turn token becomes EOS, and
    `training_args.eos_token`, from which the trainer sets the model's configs. `tokenizer.added_for_chat` names the
    tokens that had to be added, empty when the vocabulary has them all. Raises `UserError`.
    """
    tokenizer = load_tokenizer(model_args, training_args)
    if isinstance(tokenizer.chat_template, dict):
        logger.warning("of the chat templates %s the default is used", ", ".join(tokenizer.chat_template))
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    template = recipe_template(training_args)
    tokenizer.template_name = f"of {model_args.model_name_or_path}"
    if template is not None:
        given = training_args.chat_template or training_args.chat_template_path
        tokenizer.template_name = "of the recipe" if given == template else given
        tokenizer.chat_template = template
    elif tokenizer.chat_template is None:
        logger.info("%s has no chat template: ChatML is used", model_args.model_name_or_path)
        tokenizer.template_name, tokenizer.chat_template = "chatml", CHATML
    if "strftime_now" in (tokenizer.chat_template or ""):
        logger.warning("the chat template writes the day's date; prepared data keeps that of its preparation")
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
    """The template that the recipe gives, None when it gives none.

    `chat_template` is `chatml`, the name of a template that TRL ships (`llama3`, `qwen3`), Jinja text, the path of a
    `.jinja` file, or a model whose template to take. Raises `UserError`.
    """
    if training_args.chat_template is not None and training_args.chat_template_path is not None:
        raise UserError("chat_template and chat_template_path are both set; keep chat_template")
    given = training_args.chat_template or training_args.chat_template_path
    if given == "chatml":
        return CHATML
    if given is None or "{" in given:
        return given
    path = SHIPPED / f"{given}.jinja" if (SHIPPED / f"{given}.jinja").is_file() else Path(given)
    try:
        if path.suffix in (".jinja", ".j2") or path.is_file():
            return path.read_text(encoding="utf-8")
        template = AutoTokenizer.from_pretrained(given, trust_remote_code=False).chat_template
    except (OSError, UnicodeDecodeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"chat_template: {given!r} is neither chatml, nor the name of a template that TRL ships, nor Jinja text, "
            f"nor a readable file, nor a model: {reason}"
        ) from None
    if not isinstance(template, str):
        raise UserError(f"chat_template: {given!r} has no single chat template of its own")
    return template


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
    """The token that ends the assistant's content in a rendering, None when there is none.

    Of several in a row the last: before it the template may close the response (`<|END_RESPONSE|>` of Cohere).
    """
    said = "x7q"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        longer = tokenizer.apply_chat_template([*messages, *messages], tokenize=False)
    except Exception as error:  # a template may raise anything
        raise UserError(f"the chat template cannot render a user and an assistant turn: {error}") from error
    if text == longer:
        raise UserError(
            "the chat template writes the same text for different conversations: it does not use messages; a system "
            "prompt belongs into system_prompt"
        )
    tail = text[text.rfind(said) + len(said) :]
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    found = re.search(f"({'|'.join(map(re.escape, special))})+", tail) if special else None
    return found[1] if found else None


def settle_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with a token that is not EOS when the vocabulary has one to spare."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    spare = [token for token in PADDING if token in vocabulary and token != tokenizer.eos_token]
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    if not spare:
        logger.warning("padding with EOS: the vocabulary has no token to spare (labels are masked, so none is learnt)")
