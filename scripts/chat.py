"""Talk to a saved model in the terminal, with the chat template and the stop tokens that were saved with it.

    python scripts/chat.py MODEL [--system TEXT] [--max_new_tokens 512] [--temperature T]

MODEL is a directory with a full model or a LoRA adapter, or a hub id. One line is one question; /new starts over,
/quit or the end of input ends. Input may be a pipe. Without --temperature the saved generation config decides, 0 is
greedy.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from open_r1.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def main(argv: list[str] | None = None) -> int:
    """Chat with the model of `argv` (default: the command line); returns the exit code (2: it cannot chat)."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="directory of a saved model or adapter, or a hub id")
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="limit of an answer (512)")
    parser.add_argument("--temperature", type=float, help="0 is greedy; as saved with the model when left out")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)

    import torch

    from open_r1.handover import load, quiet

    try:
        with quiet():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model, tokenizer = load(args.model, device, args.trust_remote_code)
            if not tokenizer.chat_template:
                raise UserError(f"{args.model}: it has no chat template; python scripts/verify.py says what else")
            chat(model, tokenizer, args.system, {"max_new_tokens": args.max_new_tokens, **sampling(args.temperature)})
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


def sampling(temperature: float | None) -> dict[str, Any]:
    """What `generate` is told for a temperature."""
    if temperature is None:
        return {}
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def chat(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", system: str | None, options: dict[str, Any]
) -> None:
    """Answer questions until there are no more. Raises `UserError` when the template refuses the conversation."""
    from jinja2 import TemplateError

    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for question in questions():
        if question == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        try:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise UserError(f"the chat template refuses this conversation: {error}") from error
        text, ended = answer(model, tokenizer, inputs["input_ids"].to(model.device), options)
        messages.append({"role": "assistant", "content": text})
        if not ended:
            print(f"[cut off after {options['max_new_tokens']} tokens; --max_new_tokens allows more]")


def questions() -> Iterator[str]:
    """Lines of the user up to /quit or the end of input; a prompt is shown on a terminal only."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


def answer(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: Any, options: dict[str, Any]
) -> tuple[str, bool]:
    """Print the answer to token ids [1, length] while it is written; returns it, and whether it came to its end."""
    import torch
    from transformers import TextStreamer

    from open_r1.handover import as_set

    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **options,
        )
    said = output[0, ids.shape[1] :].tolist()
    ended = said[-1] in as_set(model.generation_config.eos_token_id)
    return tokenizer.decode(said, skip_special_tokens=True), ended


if __name__ == "__main__":
    sys.exit(main())
