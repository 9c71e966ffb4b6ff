"""Whether a saved model can be handed over: all of it is in its directory, loads, and stops where it should.

Weights are looked at through the headers of their files and read one piece at a time, so that any size fits. Only
`answers` loads the model. Under ZeRO-3, transformers must not know of it meanwhile (`report.verification`).
"""

import json
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from open_r1.chat import end_of_turn
from open_r1.errors import UserError
from open_r1.findings import Finding, has_errors
from open_r1.model import adapter_base, fit_vocabulary, require_safetensors, skeleton

PIECE = 2**26  # elements of a tensor that are read at once
SAVE_AGAIN = "copy the directory again, or start the run again: it saves what its last checkpoint holds"
Headers = dict[str, "Header"]


class Header(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]


def verify(
    path: str | Path,
    prompts: Sequence[str | list[int]] = (),
    *,
    max_new_tokens: int = 256,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> list[Finding]:
    """What is wrong with a saved model, a full one or a LoRA adapter with its base; no errors when it can be served.

    `prompts` are answered greedily (`answers`) when nothing else is wrong. Raises `UserError` when the directory
    holds no model whose config can be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    with quiet():
        base = adapter_base(str(path))
        config = read_config(base or str(path), trust_remote_code)
        tokenizer, findings = check_tokenizer(path, trust_remote_code)
        model = skeleton(config, trust_remote_code)
        if base is None:
            findings += check_weights(path, model)
        else:
            if Path(base).is_dir():
                findings += check_weights(Path(base), model)
            findings += check_adapter(path, model, tokenizer)
        if tokenizer is not None:
            findings += check_vocabulary(path, tokenizer, model)
            findings += check_stopping(path, base, tokenizer, config)
    if prompts and has_errors(findings):
        findings.append(Finding("note", "no prompt was answered, because of the errors"))
    elif prompts:
        findings += answers(path, prompts, max_new_tokens, device, trust_remote_code)
    return findings


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and PEFT say nothing meanwhile: what matters becomes a finding."""
    ours = logging.getLogger("open_r1")
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    our_level = ours.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ours.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        ours.setLevel(our_level)
        if bars:
            transformers_logging.enable_progress_bar()


def read_config(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model. Raises `UserError` when there is none that can be read."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: holds no model whose config can be read: {short(error)}") from error


def parameters(path: str | Path, trust_remote_code: bool = False) -> int:
    """How many parameters a saved model (without its adapter) has."""
    base = adapter_base(str(path))
    return skeleton(read_config(base or str(path), trust_remote_code), trust_remote_code).num_parameters()


def check_tokenizer(path: Path, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase | None, list[Finding]]:
    """The tokenizer saved with a model, None when it cannot be used, and what is wrong with it."""
    remedy = "save the tokenizer that it was trained with there: tokenizer.save_pretrained(...)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        usable = bool(tokenizer("The quick brown fox")["input_ids"])
    except Exception as error:  # a broken file surfaces as whatever its reader raises
        return None, [Finding("error", f"{path}: the tokenizer cannot be loaded: {short(error)}", remedy)]
    if not usable:
        return None, [Finding("error", f"{path}: the tokenizer has no vocabulary (tokenizer.json is missing)", remedy)]
    findings = []
    if tokenizer.eos_token_id is None:
        findings.append(
            Finding("error", f"{path}: the tokenizer has no EOS", "set eos_token in tokenizer_config.json")
        )
    if not tokenizer.chat_template:
        remedy = "save the template of training as chat_template.jinja there, or set chat_template in the recipe"
        findings.append(Finding("error", f"{path}: the tokenizer has no chat template", remedy))
    return tokenizer, findings


def headers(path: Path, stem: str) -> tuple[Headers, list[Finding]]:
    """The tensors in the safetensors files `stem` of a directory, sharded or not, without reading them."""
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    expected: dict[str, str] = {}
    findings = []
    if single.is_file():
        files = [single]
        if index.is_file():
            text = f"{path}: {single.name} and {index.name} are both there; only the first is read"
            findings.append(Finding("warning", text, "remove the one that is not of this model"))
    elif index.is_file():
        try:
            expected = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [path / name for name in sorted(set(expected.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [Finding("error", f"{index}: this index cannot be read: {short(error)}", SAVE_AGAIN)]
    else:
        other = sorted(found.name for found in path.glob("*.bin") if found.name != "training_args.bin")
        has = f"; it has {', '.join(other)}" if other else ""
        remedy = "save it with save_pretrained, which writes safetensors" if other else SAVE_AGAIN
        return {}, [Finding("error", f"{path}: the weights are missing: no {single.name}{has}", remedy)]
    found: Headers = {}
    for file in files:
        if not file.is_file():
            findings.append(Finding("error", f"{index} names {file.name}, which is missing", SAVE_AGAIN))
            continue
        try:
            with safe_open(file, "pt") as opened:
                names = opened.keys()
                found |= {name: Header(file, tuple(opened.get_slice(name).get_shape())) for name in names}
        except (SafetensorError, OSError) as error:
            text = f"{file}: cannot be read, it is cut short or broken: {short(error)}"
            findings.append(Finding("error", text, SAVE_AGAIN))
    elsewhere = [name for name, file in expected.items() if name in found and found[name].file.name != file]
    lost = [name for name, file in expected.items() if name not in found and (path / file).is_file()]
    if (elsewhere or lost) and not findings:
        text = f"{index}: {some([*lost, *elsewhere])} are not in the files that it names"
        findings.append(Finding("error", text, SAVE_AGAIN))
    return found, findings


def check_weights(path: Path, model: PreTrainedModel) -> list[Finding]:
    """Whether the files hold every tensor of the architecture, whole and finite.

    transformers matches names and shapes, tied and converted weights included, as it does when it loads.
    """
    tensors, findings = headers(path, "model")
    if not tensors or has_errors(findings):
        return findings
    empty, unread = check_values(tensors)
    findings += unread
    if getattr(model.config, "quantization_config", None) is not None:
        return [*findings, Finding("note", f"{path}: quantised weights, whose names and shapes were not compared")]
    state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    try:
        _, loaded = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever loading it will raise too
        return [*findings, Finding("error", f"{path}: the weights cannot be matched: {short(error)}", SAVE_AGAIN)]
    wrong = {name: (tuple(has), tuple(wants)) for name, has, wants in loaded["mismatched_keys"] if name not in empty}
    return findings + differences(path, loaded["missing_keys"], loaded["unexpected_keys"], wrong)


def check_adapter(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[Finding]:
    """Whether an adapter's file holds every tensor that its config asks for on this base, whole and finite."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    tensors, findings = headers(path, "adapter_model")
    if not tensors or has_errors(findings):
        return findings
    empty, unread = check_values(tensors)
    findings += unread
    try:
        config = PeftConfig.from_pretrained(path)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # some ways of it (PiSSA) compute on weights, which are not here
        base = skeleton(model.config)
        if tokenizer is not None and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        state = get_peft_model_state_dict(get_peft_model(base, config), save_embedding_layers=False)
    except Exception as error:
        return [*findings, Finding("error", f"{path}: the adapter does not fit its base: {short(error)}", SAVE_AGAIN)]
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    unexpected = {name for name in tensors.keys() - wanted.keys() if "embed" not in name and "lm_head" not in name}
    wrong = {
        name: (tensors[name].shape, shape)
        for name, shape in wanted.items()
        if name in tensors and name not in empty and tensors[name].shape != shape
    }
    return findings + differences(path, wanted.keys() - tensors.keys(), unexpected, wrong)


def check_values(tensors: Headers) -> tuple[set[str], list[Finding]]:
    """Names of tensors without elements, and findings for these and for NaN or infinite values. Reads every file."""
    empty = {name for name, tensor in tensors.items() if 0 in tensor.shape}
    infinite, findings = [], []
    for file in sorted({tensor.file for tensor in tensors.values()}):
        try:
            with safe_open(file, "pt") as opened:
                names = [name for name in opened.keys() if name not in empty]  # noqa: SIM118 (it is no mapping)
                infinite += [name for name in names if not finite(opened.get_slice(name))]
        except (SafetensorError, OSError) as error:
            findings.append(Finding("error", f"{file}: cannot be read to its end: {short(error)}", SAVE_AGAIN))
    where = next(iter(tensors.values())).file.parent
    if empty:
        text = f"{where}: tensors without elements: {some(empty)}"
        remedy = "sharded weights were saved without being gathered: save on all ranks, by the trainer's save_model"
        findings.append(Finding("error", text, remedy))
    if infinite:
        text = f"{where}: NaN or infinite values in {some(infinite)}"
        remedy = "training diverged or a cast overflowed: go back to a checkpoint, lower learning_rate, use bf16"
        findings.append(Finding("error", text, remedy))
    return empty, findings


def finite(tensor: Any) -> bool:
    """Whether all values of a tensor in an open file (a slice of safetensors) are finite, read by pieces.

    Minimum and maximum tell, NaN included, many times faster than a look at every value.
    """
    shape = tensor.get_shape()
    rows = max(1, PIECE * shape[0] // torch.Size(shape).numel()) if shape else 1
    for start in range(0, shape[0], rows) if shape else [None]:
        piece = tensor[...] if start is None else tensor[start : start + rows]
        if piece.is_floating_point():
            ends = torch.aminmax(piece.float() if piece.itemsize == 1 else piece)
            if not torch.isfinite(torch.stack(ends)).all():
                return False
    return True


def differences(
    path: Path, missing: set[str], unexpected: set[str], wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[Finding]:
    """Findings for tensors that are missing, not known, or of another shape (shape in the file, shape wanted)."""
    findings = []
    if missing:
        text = f"{path}: tensors that the architecture has are missing: {some(missing)}"
        findings.append(Finding("error", text, f"they would be random when it is loaded; {SAVE_AGAIN}"))
    if wrong:
        name, (has, wants) = min(wrong.items())
        text = f"{path}: tensors have another shape than the config says: {some(wrong)}; {name} is {has}, not {wants}"
        findings.append(Finding("error", text, "save weights and config of the same model"))
    if unexpected:
        text = f"{path}: tensors that the architecture does not have: {some(unexpected)}"
        findings.append(Finding("warning", text, "they are ignored when it is loaded; save the unwrapped model"))
    return findings


def check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[Finding]:
    """Whether every token has an embedding; those of an adapter may be in its own file."""
    last, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    for name, tensor in headers(path, "adapter_model")[0].items() if (path / "adapter_config.json").is_file() else ():
        if "embed" in name and "lora" not in name:
            rows = max(rows, tensor.shape[0])
    if last < rows:
        return []
    text = f"{path}: the tokenizer has {last + 1} tokens, the embedding {rows}"
    return [Finding("error", text, "save the tokenizer of training, or train with embeddings grown to the tokenizer")]


def check_stopping(
    path: Path, base: str | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[Finding]:
    """Whether generation stops where the chat template ends a turn of the assistant."""
    findings, eos = [], tokenizer.eos_token_id
    stops, problem = generation_stops(path)
    if problem:
        return [problem]
    configured = as_set(getattr(config.get_text_config(), "eos_token_id", None))
    configured = configured or as_set(getattr(config, "eos_token_id", None))
    of_base = generation_stops(base)[0] if base else None
    by_default = configured if of_base is None else of_base
    if stops is None:
        level = "warning" if eos in by_default else "error"
        text = f"{path}: generation_config.json is missing; servers stop at {tokens(tokenizer, by_default)}"
        findings.append(Finding(level, text, f"write one with eos_token_id: {eos}"))
        stops = by_default
    elif eos is not None and eos not in stops:
        text = f"{path}: generation stops at {tokens(tokenizer, stops)} (generation_config.json), EOS is "
        text += tokens(tokenizer, {eos})
        findings.append(Finding("error", text, f"set eos_token_id to {eos} in generation_config.json"))
    if base is None and configured and (configured - stops - {eos} or (eos is not None and eos not in configured)):
        text = f"{path}: config.json says that EOS is {tokens(tokenizer, configured)}, generation_config.json "
        text += f"{tokens(tokenizer, stops)}, the tokenizer {tokens(tokenizer, {eos})}"
        findings.append(Finding("error", text, "set eos_token_id of all to that which ends an answer"))
    if base is not None and eos in stops and eos not in by_default:
        text = f"{path}: the base {base} stops at {tokens(tokenizer, by_default)}, the adapter at "
        text += tokens(tokenizer, {eos})
        remedy = "serve it with the generation_config.json of the adapter, or merge it (scripts/merge.py)"
        findings.append(Finding("warning", text, remedy))
    # That EOS itself does not stop generation has been said.
    return findings + (check_template(path, tokenizer, stops | {eos}) if tokenizer.chat_template else [])


def check_template(path: Path, tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> list[Finding]:
    """Whether the token that ends a turn of the assistant is one that generation stops at."""
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        text = f"{path}: of the chat templates {', '.join(tokenizer.chat_template)} none is the default"
        return [Finding("error", text, "save one template")]
    try:
        end = end_of_turn(tokenizer)
    except UserError as error:
        return [Finding("error", f"{path}: {error}", "save the chat template of training")]
    if end is None:
        text = f"{path}: the chat template ends a turn of the assistant with no token of its own"
        return [Finding("warning", text, "end it with EOS, else a second turn is not what the model has learnt")]
    if tokenizer.convert_tokens_to_ids(end) in stops:
        return []
    text = f"{path}: the chat template ends a turn of the assistant with {end}, generation stops at "
    return [Finding("error", text + tokens(tokenizer, stops), f"make {end} EOS (eos_token in the recipe)")]


def generation_stops(path: str | Path) -> tuple[set[int] | None, Finding | None]:
    """The ids at which generation_config.json of a model stops, None without such a file, and what is wrong in it."""
    try:
        config = GenerationConfig.from_pretrained(path)
        config.validate(strict=True)
        return as_set(config.eos_token_id), None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not (Path(path) / "generation_config.json").is_file():
            return None, None
        text = f"{path}: generation_config.json is not valid: {short(error)}"
        return None, Finding("error", text, "mend it; transformers refuses to save a model with it")


def load(
    path: str | Path, device: str | torch.device = "cpu", trust_remote_code: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model as it is to be served, an adapter on its base, and its tokenizer.

    `kwargs` are those of `from_pretrained`. The generation config is that saved with it. Raises `UserError`.
    """
    base = adapter_base(str(path))
    require_safetensors(path, base)
    kwargs |= {"trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(base or path, **kwargs)
        if base is not None:
            model = with_adapter(model, path, tokenizer)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: the model cannot be loaded: {short(error)}") from error
    return model.to(device).eval(), tokenizer


def with_adapter(
    model: PreTrainedModel, path: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> PreTrainedModel:
    """A base model with a saved adapter on it, and the generation config of the adapter where it has one."""
    from peft import PeftModel

    fit_vocabulary(model, tokenizer)
    adapted = PeftModel.from_pretrained(model, path, **kwargs)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = adapted.generation_config = GenerationConfig.from_pretrained(path)
    return adapted


def answers(
    path: str | Path,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> list[Finding]:
    """Whether greedy answers stop by themselves. A prompt is a user's message, or token ids as they are."""
    try:
        with quiet():
            model, tokenizer = load(path, device, trust_remote_code)
            lengths = [answer_length(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    except Exception as error:  # what a broken model raises cannot be foreseen
        return [Finding("error", f"{path}: no answer can be generated: {short(error)}", "see that it loads")]
    stopped = [length for length in lengths if length is not None]
    share = f"{path}: {len(stopped)} of {len(lengths)} answers stopped within {max_new_tokens} tokens"
    if not stopped:
        remedy = "train longer, see that answers keep their end (ledger: lost ends), or allow more tokens"
        return [Finding("error", share, remedy)]
    if not any(stopped):
        return [Finding("warning", f"{share}, all of them empty", "look at what the loss counts: make preview")]
    return [Finding("note" if len(stopped) == len(lengths) else "warning", share)]


@torch.inference_mode()
def answer_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | list[int], max_new_tokens: int
) -> int | None:
    """How many tokens the greedy answer has before its stop token, None when it does not stop."""
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    said = greedy_answer(model, prompt, max_new_tokens)
    return len(said) - 1 if said[-1] in as_set(model.generation_config.eos_token_id) else None


def greedy_answer(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, **kwargs: Any) -> list[int]:
    """The token ids that a model says to those of a prompt, its stop token included where it stops."""
    ids = torch.tensor([prompt], device=model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1, **kwargs}
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **greedy
    )
    return output[0, ids.shape[1] :].tolist()


def as_set(ids: int | Sequence[int] | None) -> set[int]:
    """Token ids, however a config holds them."""
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def tokens(tokenizer: PreTrainedTokenizerBase, ids: set[int]) -> str:
    """Token ids for a message, with what they are."""
    known = len(tokenizer)
    names = (tokenizer.convert_ids_to_tokens(i) if i is not None and 0 <= i < known else "?" for i in ids)
    return ", ".join(f"{name} ({i})" for name, i in zip(names, ids, strict=True)) or "nothing"


def some(names: Collection[str], count: int = 3) -> str:
    """The first of some names, and how many more there are."""
    shown = ", ".join(islice(sorted(names), count))
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def short(error: Exception) -> str:
    """The message of an error on one line of reasonable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
