"""What the model in training says to the recipe's `sample_prompts`: `samples.jsonl`, the log, TensorBoard, the report.

Greedy, so that nothing random is drawn, and nothing of the training is changed: a run is the same with and without.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl.models.utils import unwrap_model_for_generation

from open_r1.errors import UserError
from open_r1.formats import check_turns, message_of
from open_r1.handover import as_set, greedy_answer
from open_r1.isolation import undisturbed
from open_r1.model import adapters_cast
from open_r1.resuming import launch_of
from open_r1.views import visible

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig
    from open_r1.trainer import OrderedTrainer

logger = logging.getLogger(__name__)
SAMPLES = "samples.jsonl"
LOGGED = 160  # characters of an answer in the log


class Prompt(NamedTuple):
    """A prompt as people read it, and the token ids that the model is to go on from."""

    text: str
    ids: list[int]


def prompts_of(args: "SFTConfig", tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The recipe's `sample_prompts`, rendered as inference does. Raises `UserError` for one that cannot be.

    Under FSDP there are none, with a warning: no process has the whole model there.
    """
    prompts = []
    for number, given in enumerate(args.sample_prompts):
        try:
            row = {"messages": [{"role": "user", "content": given}]} if isinstance(given, str) else given
            prompts.append(rendered(row, args, tokenizer))
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"sample_prompts.{number}: cannot be asked: {reason}") from error
    if prompts and launch_of(args) == "fsdp":
        logger.warning("sample_prompts: left out: under FSDP no process has the whole model")
        return []
    return prompts


def rendered(row: dict[str, Any], args: "SFTConfig", tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A row's messages as a prompt. Raises `ValueError` where they are none that the model could answer."""
    messages = [message_of(message, index) for index, message in enumerate(row["messages"])]
    if args.system_prompt is not None and messages[:1] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": args.system_prompt}, *messages]
    check_turns(messages)
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("the last message is to be one that the assistant answers")
    kwargs = row.get("chat_template_kwargs") or {}
    ids = tokenizer.apply_chat_template(
        messages, tools=row.get("tools") or None, add_generation_prompt=True, return_dict=True, **kwargs
    )["input_ids"]
    if args.max_length is not None and len(ids) >= args.max_length:
        raise ValueError(f"it is {len(ids)} tokens long, and max_length is {args.max_length}")
    said = [f"{message['role']}: {message.get('content') or ''}" for message in messages]
    return Prompt(messages[0]["content"] if len(messages) == 1 else "\n".join(said), list(ids))


class Answers(TrainerCallback):
    """Ask the prompts before training, every `sample_steps` or with each evaluation, and when the model is saved.

    One process answers; under ZeRO-3, which cuts the weights up, all do the same at once.
    """

    def __init__(self, trainer: "OrderedTrainer", prompts: list[Prompt]) -> None:
        self.trainer, self.prompts = trainer, prompts
        self.path = Path(trainer.args.output_dir) / SAMPLES
        self.together = launch_of(trainer.args) == "zero3"
        self.last = -1

    def on_train_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the model that there is before the first step; of a run that goes on, what its last step still lacks."""
        if state.global_step == 0:
            if state.is_world_process_zero:
                self.path.unlink(missing_ok=True)
            self.ask()
        elif args.sample_steps and state.global_step % args.sample_steps == 0:
            self.ask()

    def on_step_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask every `sample_steps`; a run that was told to stop does when it goes on."""
        if args.sample_steps and state.global_step % args.sample_steps == 0 and not self.trainer.preempted:
            self.ask()

    def on_evaluate(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask with each evaluation where the recipe says no steps."""
        if not args.sample_steps:
            self.ask()

    def ask(self) -> None:
        """Ask every prompt, once in a step, and write down what is said. Without ZeRO-3 a failure is only said."""
        step, first = self.trainer.state.global_step, self.trainer.is_world_process_zero()
        before = self.last < 0 or step < self.last  # in an earlier start, or of the best model when that was the last
        if step == self.last or (before and step and self.asked(step)):
            return
        self.last = step
        if not (first or self.together):
            return
        try:
            with self.trainer.meter.clock.spent_on("evaluation"), to_generate(self.trainer) as model:
                said = [self.answer(model, prompt) for prompt in self.prompts]
            if first:
                self.tell(step, said)
        except Exception:
            if self.together:
                raise  # the other processes would wait for this one
            logger.exception("sample_prompts were not answered at step %d; training goes on", step)

    def asked(self, step: int) -> bool:
        """Whether the answers of a step are there already."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return any(json.loads(line)["step"] == step for line in lines)

    def answer(self, model: PreTrainedModel, prompt: Prompt) -> dict[str, Any]:
        """What the model says to a prompt: `prompt`, `text`, `tokens` of it, and whether it `stopped` by itself."""
        tokenizer, args = self.trainer.processing_class, self.trainer.args
        stops = as_set(model.generation_config.eos_token_id) | {tokenizer.eos_token_id}
        options = {"eos_token_id": sorted(stops), "pad_token_id": tokenizer.pad_token_id, "use_cache": True}
        ids = greedy_answer(model, prompt.ids, args.sample_tokens, **options)
        stopped = ids[-1] in stops
        text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
        return {"prompt": prompt.text, "text": text, "tokens": len(ids), "stopped": stopped}

    def tell(self, step: int, answers: list[dict[str, Any]]) -> None:
        """Write answers into `samples.jsonl`, the log and TensorBoard."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **answer}) + "\n" for answer in answers)
        for number, answer in enumerate(answers):
            asked, said = (visible(" ".join(answer[key].split())) for key in ("prompt", "text"))
            said = said[:LOGGED] + "…" * (len(said) > LOGGED or not answer["stopped"])
            logger.info("step %d, %s -> %s (%d tokens)", step, asked[: LOGGED // 2], said, answer["tokens"])
            for callback in self.trainer.callback_handler.callbacks:
                if writer := getattr(callback, "tb_writer", None):
                    writer.add_text(f"sample_prompts/{number}", f"{answer['prompt']}\n\n{answer['text']}", step)


@contextlib.contextmanager
def to_generate(trainer: "OrderedTrainer") -> Iterator[PreTrainedModel]:
    """The model in training, whole and in evaluation mode; behind it, it is as it was.

    TRL would switch activation checkpointing off and on again, with none of its settings (trl 1.16), so that it is not
    shown any; in evaluation mode nothing is checkpointed anyway.
    """
    model, accelerator = trainer.model, trainer.accelerator
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    sharded = launch_of(trainer.args) == "zero3"
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        with undisturbed(model, trainer.args.device):
            whole = unwrap_model_for_generation(trainer.model_wrapped, accelerator) if sharded else None
            unwrapping = whole or contextlib.nullcontext(accelerator.unwrap_model(model))
            with unwrapping as unwrapped, adapters_cast(unwrapped, cast=True):  # there is no autocast here
                yield unwrapped
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
