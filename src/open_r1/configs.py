"""Everything a recipe may say: every key, typed, documented and checked alone.

Three configs extend TRL's (`ScriptArguments`, `SFTConfig`, `ModelConfig`), two describe a mixture of datasets.
`schema.json` is generated from this file by `make schema`; `recipe.py` reads it, so that help and recipe errors need
neither torch nor TRL.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import trl

# The keys of a dataset alone; in a mixture each source says them itself.
ALONE = ("dataset_name", "dataset_data_files", "dataset_revision", "dataset_columns", "dataset_mapping")
ALONE += ("dataset_max_samples",)
OLD_GPUS = ("T4", "V100")  # that have no bfloat16


@dataclass
class ColumnMapping:
    """Which columns of a table are what, for tables of a shape that is not known by name.

    A path reaches into nested columns: `meta.question`, `answers.0.text`. Raises `ValueError` when the columns named
    do not make a conversation, a prompt with its completion, or a text.
    """

    messages: str | None = field(default=None, metadata={"help": "A list of messages (role/content or from/value)."})
    prompt: str | None = field(default=None, metadata={"help": "What the user asks; a conversation with response."})
    query: str | None = field(
        default=None, metadata={"help": "More of what the user asks (Alpaca's input), on a new line behind prompt."}
    )
    response: str | None = field(default=None, metadata={"help": "What the assistant answers."})
    system: str | None = field(default=None, metadata={"help": "The system message, where it is not empty."})
    history: str | None = field(
        default=None, metadata={"help": "Earlier turns: a list of [question, answer] pairs, or of messages."}
    )
    completion: str | None = field(
        default=None, metadata={"help": "What follows prompt as plain text, without a chat template."}
    )
    text: str | None = field(default=None, metadata={"help": "Plain text, learnt in full."})
    tools: str | None = field(default=None, metadata={"help": "Tool schemas for the chat template."})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "Arguments for the chat template."})

    def __post_init__(self) -> None:
        said = {name for name, column in vars(self).items() if column is not None}
        extra = {"tools", "chat_template_kwargs"}
        for needed, also in (
            ({"messages"}, {"system", *extra}),
            ({"prompt", "response"}, {"query", "system", "history", *extra}),
            ({"prompt", "completion"}, extra),
            ({"text"}, set()),
        ):
            if needed <= said <= needed | also:
                return
        raise ValueError(
            f"a column mapping names messages, or prompt and response (and query, system, history), or prompt and "
            f"completion, or text; found {', '.join(sorted(said)) or 'nothing'}"
        )

    @property
    def columns(self) -> dict[str, str]:
        """Column or path of each part that is named."""
        return {name: column for name, column in vars(self).items() if column is not None}


@dataclass
class DatasetConfig:
    """One source. Raises `ValueError` naming the source when a value cannot be meant."""

    id: str | None = field(
        default=None, metadata={"help": "Hub id, local directory, file or glob (.jsonl .json .parquet .csv)."}
    )
    config: str | None = field(default=None, metadata={"help": "Configuration name of a hub dataset."})
    split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:10%] work."})
    test_split: str | None = field(default=None, metadata={"help": "Split of this source to evaluate on."})
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Files of a hub dataset or directory (globs); without id, local files."}
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a hub dataset."})
    name: str | None = field(default=None, metadata={"help": "What messages and the ledger call this source."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns to keep; say which when a table holds several formats."}
    )
    mapping: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Which columns are what, for a table of another shape.", "nested": ColumnMapping},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Only the first rows of the source, so many of them.", "above": 0}
    )
    weight: float = field(
        default=1.0,
        metadata={
            "help": "Share of the rows to take after a seeded shuffle; above 1 the source is repeated, 2.5 = every "
            "row twice and half of them a third time.",
            "above": 0,
        },
    )
    proportion: float | None = field(
        default=None,
        metadata={
            "help": "Share of the mixture that is to come from this source, of what weight and bad rows have left; "
            "said of all sources or of none, and in any unit (3 and 1 are three quarters and one).",
            "above": 0,
        },
    )

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and self.id) and not self.data_files:
            raise ValueError(
                "a source needs an id (hub id, directory or file) or data_files, found "
                f"id {self.id!r} and data_files {self.data_files!r}"
            )
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight < float("inf"):
            raise ValueError(f"{self.id}: weight must be a number above 0, found {self.weight!r}")
        if isinstance(self.mapping, dict):
            try:
                self.mapping = ColumnMapping(**self.mapping)
            except ValueError as error:
                raise ValueError(f"{self.id or self.data_files}: {error}") from None


@dataclass
class DatasetMixtureConfig:
    """Sources that are trained on together, in an order drawn from `seed` alone."""

    datasets: list[DatasetConfig] = field(metadata={"help": "The sources."})
    seed: int = field(default=0, metadata={"help": "Seed of the selection, the order and the split."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Rows held out for evaluation: a share below 1, or a count.", "above": 0}
    )
    proportion_unit: str = field(
        default="supervised_tokens",
        metadata={"help": "What proportions are of.", "choices": ["supervised_tokens", "rows"]},
    )
    stopping_strategy: str = field(
        default="first_exhausted",
        metadata={
            "help": "With proportions, end when one source has given all it has (first_exhausted, no row is repeated) "
            "or when all have (all_exhausted, the others start over in a new order).",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("dataset_mixture: datasets is empty; name at least one source")
        self.datasets = [DatasetConfig(**source) if isinstance(source, dict) else source for source in self.datasets]
        without = [source.id or source.data_files for source in self.datasets if source.proportion is None]
        if 0 < len(without) < len(self.datasets):
            raise ValueError(f"dataset_mixture: {without[0]} has no proportion, others have; say it of all or of none")

    @property
    def in_proportion(self) -> bool:
        """Whether sources are mixed by proportion."""
        return self.datasets[0].proportion is not None


@dataclass
class ScriptArguments(trl.ScriptArguments):
    """What to train on: one dataset, or a mixture, and what to evaluate on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local directory, file or glob (.jsonl .json .parquet .csv, also compressed), or a "
            "directory written by save_to_disk."
        },
    )
    dataset_data_files: list[str] | None = field(
        default=None, metadata={"help": "Files of dataset_name (globs); without dataset_name, local files."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of dataset_name on the hub."}
    )
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of dataset_name to keep, when it holds several formats."}
    )
    dataset_mapping: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Which columns of dataset_name (and eval_dataset_name) are what, for a table of another shape.",
            "nested": ColumnMapping,
        },
    )
    dataset_max_samples: int | None = field(
        default=None, metadata={"help": "Only the first rows of dataset_name, so many of them.", "above": 0}
    )
    dataset_mixture: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Weighted sources instead of dataset_name.", "nested": DatasetMixtureConfig},
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "A second dataset to evaluate on, named as dataset_name is."}
    )
    eval_dataset_mapping: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Which columns of eval_dataset_name are what; default: dataset_mapping.",
            "nested": ColumnMapping,
        },
    )
    eval_datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Datasets to evaluate on, each a source as of a mixture, without weight and proportion; the loss "
            "of each is eval_loss/NAME, that of all tokens eval_loss.",
            "nested": DatasetConfig,
        },
    )
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Hold out rows of dataset_name for evaluation: a share below 1, or a count.", "above": 0},
    )

    def __post_init__(self) -> None:
        if self.eval_datasets is not None:
            self.eval_datasets = [to_evaluate_on(each) for each in self.eval_datasets]
        if isinstance(self.dataset_mixture, dict):
            self.dataset_mixture = DatasetMixtureConfig(**self.dataset_mixture)
        if isinstance(self.dataset_mapping, dict):
            self.dataset_mapping = ColumnMapping(**self.dataset_mapping)
        if isinstance(self.eval_dataset_mapping, dict):
            self.eval_dataset_mapping = ColumnMapping(**self.eval_dataset_mapping)
        alone = {name: value for name, value in vars(self).items() if name in ALONE and value is not None}
        if bool(alone) == (self.dataset_mixture is not None):
            found = f"dataset_mixture and {', '.join(alone)}" if alone else "neither"
            raise ValueError(f"say what to train on with dataset_name or dataset_mixture; found {found}")
        if alone and self.dataset_name is None and not self.dataset_data_files:
            raise ValueError(f"{', '.join(alone)} say nothing without dataset_name")

    @property
    def sources(self) -> list[DatasetConfig]:
        """What to train on: the sources of the mixture, or the one dataset."""
        if self.dataset_mixture is not None:
            return self.dataset_mixture.datasets
        return [
            DatasetConfig(
                id=self.dataset_name,
                config=self.dataset_config,
                split=self.dataset_train_split,
                test_split=self.dataset_test_split,
                data_files=self.dataset_data_files,
                revision=self.dataset_revision,
                columns=self.dataset_columns,
                mapping=self.dataset_mapping,
                max_samples=self.dataset_max_samples,
            )
        ]


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's `SFTConfig` with our keys and with defaults that do not hurt. Raises `ValueError` on contradictions."""

    assistant_only_loss: bool | None = field(
        default=None,
        metadata={"help": "TRL's name: true is supervision: assistant, false is supervision: full."},
    )
    supervision: str = field(
        default="assistant",
        metadata={
            "help": "What of a conversation is learnt: assistant (every turn, as inference asks for it), last_turn, "
            "full (everything), or template (what stands in the template's generation blocks).",
            "choices": ["assistant", "last_turn", "full", "template"],
        },
    )
    on_rewritten_turn: str = field(
        default="expand",
        metadata={
            "help": "A turn that the template rewrites in the whole conversation (reasoning stripped, say) becomes a "
            "row of its own (expand), is not learnt (mask), or is an error.",
            "choices": ["expand", "mask", "error"],
        },
    )
    empty_reasoning: str = field(
        default="mask",
        metadata={
            "help": "Whether an empty reasoning block that only the template writes is learnt.",
            "choices": ["mask", "supervise"],
        },
    )
    on_long_row: str = field(
        default="truncate",
        metadata={
            "help": "What becomes of a row longer than max_length; split is for plain text.",
            "choices": ["truncate", "drop", "error", "split"],
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "A row that cannot be trained on is an error, or dropped, counted and kept in rejected.jsonl.",
            "choices": ["error", "drop"],
        },
    )
    dedup: bool = field(
        default=False,
        metadata={
            "help": "Drop rows to train on that are exact duplicates of others, or ask what the evaluation data asks."
        },
    )
    max_bad_rows: float | None = field(
        default=None,
        metadata={"help": "Stop when more rows are bad than this: a share below 1, or a count.", "above": 0},
    )
    max_truncated_answers: float | None = field(
        default=None,
        metadata={"help": "Stop when more than this share of the answers loses its end to max_length."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimiser step, over all processes; gradient_accumulation_steps follows from it, from "
            "per_device_train_batch_size and from the number of processes."
        },
    )
    longest_first: bool | None = field(
        default=None,
        metadata={
            "help": "The global batch of the first epoch with the longest rows comes in step two, so that memory runs "
            "out at once or not at all. Default: on, unless packing is on or rows are sequential."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "chatml, the name of a template that TRL ships (llama3, qwen3), Jinja text, the path of a .jinja "
            "file, or a model whose template to take. Default: the model's own, else ChatML."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message for conversations that have none of their own."}
    )
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto goes on from the newest complete checkpoint in output_dir, if there is any; must insists on "
            "one, never on none; a path names it."
        },
    )
    allow_changes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Settings, by name, that may differ from those of the checkpoint that a run goes on from although "
            "they change what is learnt; data, that the rows may."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row that did not better metric_for_best_model.",
            "above": 0,
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much an evaluation must be better to count for early stopping."}
    )
    stall_timeout: float | None = field(
        default=1800.0,
        metadata={
            "help": "Seconds without the end of a step after which the stacks of all threads are shown.",
            "above": 0,
        },
    )
    loss_spike: float | None = field(
        default=3.0,
        metadata={
            "help": "Report a step, with its rows, whose loss is more than so many times the median of the 50 before.",
            "above": 1,
        },
    )
    sample_prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts that the model in training answers greedily, for samples.jsonl and the report: before "
            "training, every sample_steps, and at its end. Each is what a user says, or a row with messages (and "
            "tools, chat_template_kwargs) as datasets have them.",
        },
    )
    sample_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps between two answers to sample_prompts. Default: at every evaluation.",
            "above": 0,
        },
    )
    sample_tokens: int = field(
        default=128, metadata={"help": "Tokens after which an answer to sample_prompts is cut off.", "above": 0}
    )
    callbacks: list[str] = field(
        default_factory=list,
        metadata={"help": "Callbacks to run while training.", "choices": ["push_to_hub_revision"]},
    )
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Benchmarks of the saved model, by lighteval in a Slurm job behind this one; outside of Slurm the "
            "command is printed: math_500, aime24, aime25, gpqa, lcb, lcb_v4, all, or a task as suite|task|few_shot.",
        },
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={
            "help": "Whether what is pushed (and a Trackio Space) is private. Default: true; false publishes it, and "
            "a repository that is public already is pushed to only then."
        },
    )
    hub_model_revision: str = field(default="main", metadata={"help": "Branch of the hub repository to push to."})
    push_to_hub_revision: bool = field(
        default=False, metadata={"help": "Push the final model to the branch hub_model_revision."}
    )
    overwrite_hub_revision: bool = field(
        default=False, metadata={"help": "Allow pushing to a hub branch that already holds files."}
    )
    dry_run: bool | str = field(
        default=False,
        metadata={
            "help": "Check recipe, model files and data, show what was found and what the run comes to, and stop "
            "before weights (exit code 1 for errors); json writes it to stdout for machines.",
            "choices": [True, False, "json"],
        },
    )
    plan_gpu: str | None = field(
        default=None,
        metadata={
            "help": "GPU that dry_run plans memory for: H100, A100-40GB, ANY-24GB; default: the one that is here."
        },
    )
    plan_processes: int | None = field(
        default=None,
        metadata={
            "help": "GPUs, one process each, that dry_run plans for, whatever is here; default: the processes it is "
            "run with.",
            "above": 0,
        },
    )
    wandb_entity: str | None = field(default=None, metadata={"help": "W&B entity to log to."})
    wandb_project: str | None = field(default=None, metadata={"help": "W&B project to log to."})
    wandb_run_group: str | None = field(default=None, metadata={"help": "W&B group of the run."})

    # Upstream's defaults that hurt: 30 min of silence kills a job whose rank 0 still loads, metrics print once per
    # node, and the old name of activation checkpointing warns on every run.
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Old name, see above."})
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute activations again in the backward pass instead of keeping them: slower, with less "
            "memory. Default: off where the plan says that they fit, of every n-th layer where they nearly do, else "
            "on."
        },
    )
    padding_free: bool | None = field(
        default=None,
        metadata={
            "help": "Lay the rows of a batch end to end instead of padding them: the same rows, the same losses. "
            "Default: on where attention keeps them apart by their lengths and batches have more than a row."
        },
    )
    use_liger_kernel: bool | None = field(
        default=None,
        metadata={
            "help": "Norms, rotations and gates of liger-kernel: faster, with less memory. Default: on for a GPU "
            "where liger-kernel is installed, for dense Llama, Mistral, Qwen2 and Qwen3, and torch_compile is off."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that make batches ahead of each training process. Default: 2 for a GPU, with cores to "
            "spare; none on a CPU.",
        },
    )
    ddp_timeout: int = field(
        default=18000, metadata={"help": "Seconds until a collective counts as dead.", "above": 0}
    )
    log_on_each_node: bool = field(
        default=False, metadata={"help": "Print metrics on every node, not only the first."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision. Default: what the launch config says, else on where supported."},
    )

    def __post_init__(self) -> None:
        if self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        # Left open: careful until `defaults.settle` knows model, data and machine.
        careful = {"activation_checkpointing": True, "padding_free": False}
        careful |= {"use_liger_kernel": False, "dataloader_num_workers": 0}
        self.unsettled = {name for name in careful if getattr(self, name) is None}
        for name in self.unsettled:
            setattr(self, name, careful[name])
        if self.assistant_only_loss is False and self.supervision == "assistant":
            self.supervision = "full"
        if self.assistant_only_loss and self.supervision == "full":
            raise ValueError("assistant_only_loss: true and supervision: full exclude each other; keep supervision")
        if self.plan_processes is not None:  # on other machines: nothing is asked of this one's GPU
            self.use_cpu = True
        best = self.metric_for_best_model or ""
        if self.greater_is_better is None and best.removeprefix("eval_").startswith("loss/"):
            self.greater_is_better = False  # upstream tells a loss by the end of its name
        if self.hub_private_repo is None:  # unset, upstream leaves it to the hub, which publishes
            self.hub_private_repo = True
        self._settle_precision()
        if self.eval_packing and not self.packing:
            raise ValueError("eval_packing without packing would let documents see each other; set both, or neither")
        if self.packing and self.max_length is None:
            raise ValueError("packing needs a max_length: the number of tokens in a packed row")
        if self.global_batch_size is not None:  # before super, which tells DeepSpeed how many steps accumulate
            processes = self.plan_processes or int(os.environ.get("WORLD_SIZE", "1"))
            each = self.per_device_train_batch_size
            self.gradient_accumulation_steps = accumulation_steps(self.global_batch_size, each, processes)
        super().__post_init__()

    @property
    def processes(self) -> int:
        """Processes that train: those it is run with, or those that `dry_run` plans for."""
        return self.plan_processes or self.world_size

    def _settle_precision(self) -> None:
        """One precision, said once: the recipe's; else the launch config's; else bf16 where the hardware has it.

        GPUs elsewhere, which `plan_processes` plans for, have it, but for those that are known not to.
        """
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16 is None and not self.fp16:
            self.fp16 = launched == "fp16"
            elsewhere = self.plan_processes is not None
            has_it = (
                not (self.plan_gpu or "").upper().startswith(OLD_GPUS) if elsewhere else bf16_hardware(self.use_cpu)
            )
            self.bf16 = launched == "bf16" or (launched == "no" and has_it)
        asked = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        if launched not in ("no", asked):
            raise ValueError(
                f"the launch config says mixed_precision: {launched}, the recipe says {asked}; "
                "remove mixed_precision from the launch config, or bf16/fp16 from the recipe"
            )


@dataclass
class ModelConfig(trl.ModelConfig):
    """TRL's `ModelConfig`; dtype and attention follow from how the model is trained unless the recipe says them."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights. Default: float32 for full fine-tuning and on CPU, bfloat16 when the "
            "weights are frozen (LoRA) or under DeepSpeed ZeRO, which keeps float32 masters.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default="auto",
        metadata={
            "help": "Attention. auto takes the best that is installed, fits the model and keeps packed documents "
            "apart, and says which: flash_attention_3, flash_attention_2, varlen (needs nothing but PyTorch), sdpa or "
            "eager. Also flex_attention, flash_attention_4, and owner/name of a kernel on the hub."
        },
    )

    def __post_init__(self) -> None:
        targets = self.lora_target_modules
        super().__post_init__()
        # TRL unwraps a list of one, and PEFT then reads a lone module name as a regular expression that matches none.
        if isinstance(targets, list) and len(targets) == 1 and targets[0].isidentifier():
            self.lora_target_modules = targets


def to_evaluate_on(source: dict[str, Any] | DatasetConfig) -> DatasetConfig:
    """A dataset to evaluate on. Raises `ValueError` when it says what only a source to train on can."""
    source = DatasetConfig(**source) if isinstance(source, dict) else source
    default = DatasetConfig(id="any")
    for key in ("weight", "proportion", "test_split"):
        if getattr(source, key) != getattr(default, key):
            instead = "; the split to evaluate on is split" if key == "test_split" else ""
            raise ValueError(f"eval_datasets: {source.id or source.data_files}: {key} says nothing here{instead}")
    return source


def accumulation_steps(size: int, each: int, processes: int) -> int:
    """Batches of `each` rows that each of so many processes takes for an optimiser step of `size` rows.

    Raises `ValueError` when that is no whole number, with the nearest sizes that are and the batches that would fit.
    """
    at_once = each * processes
    if size >= at_once and size % at_once == 0:
        return size // at_once
    below = size // at_once * at_once
    sizes = " or ".join(str(good) for good in (below, below + at_once) if good)
    share, rest = divmod(size, processes)
    fitting = [batch for batch in range(1, share + 1) if rest == 0 and share % batch == 0]
    nearest = sorted(sorted(fitting, key=lambda batch: abs(batch - each))[:6])
    or_batch = f", or per_device_train_batch_size: {' or '.join(map(str, nearest))}" if nearest else ""
    raise ValueError(
        f"global_batch_size: {size} rows cannot be dealt out to {processes} process{'es' if processes > 1 else ''} in "
        f"batches of {each} (per_device_train_batch_size), which are {at_once} rows at once; set global_batch_size: "
        f"{sizes}{or_batch}"
    )


def bf16_hardware(use_cpu: bool) -> bool:
    """Whether bfloat16 is native here. A CPU without bf16 units is 3-4 times slower in it, so False there."""
    import torch

    return not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
