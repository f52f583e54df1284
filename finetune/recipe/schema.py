"""The recipe as frozen, strict pydantic models: which keys exist, their types, ranges, units and defaults.

Key names follow transformers, TRL and PEFT, then PaddleNLP. Rules that look at several keys at once are in `rules.py`.
A default that depends on another key is filled in here, so that a `Recipe` never has a value left to guess.

The "Attributes" of a section say what each of its keys means; docs/reference.py makes the reference of all keys from
them, and a key without one fails there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.compute.losses import LOSSES, LossOptions
from finetune.methods import METHODS
from finetune.model.adapters import LORA_PLUS_RATIO, LoraSettings, Variant
from finetune.rows.formats import FORMS

Text = Annotated[str, Field(min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=1, le=2**31)]
COLUMNS = "a mapping of a form's keys to the file's columns, such as {instruction: question, output: answer}"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
if TYPE_CHECKING:  # a type checker takes no names that are computed
    MethodName = str
    RowForm = str
else:
    MethodName = Literal[tuple(METHODS)]
    RowForm = Literal[tuple(["auto", *FORMS])]
Scheduler = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
]


def unit(name: str) -> dict[str, str]:
    """Extra field data: the unit that messages and documentation name."""
    return {"unit": name}


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no conversions, no changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(Section):
    """The base model.

    Attributes:
        path: Hub id, Hugging Face or PaddleNLP folder, adapter folder, checkpoint, or a run's folder.
        dtype: `auto` is bfloat16 on a GPU and float32 on CPU, where the other two do not work and are refused.
        quantization: Of the frozen weights of the decoder's linear layers, with a `lora` section (QLoRA): `nf4` takes
            4.13 bits a number (arXiv:2305.14314), `int8` 8 bits, one scale a row.
        double_quantization: `nf4` only: quantize the scales too, 4.13 bits a number instead of 4.5.
    """

    path: Text
    dtype: Dtype = "auto"
    quantization: Literal["none", "nf4", "int8"] = "none"
    double_quantization: bool = True


class LoraSection(Section):
    """LoRA. The section's absence means full fine-tuning.

    Attributes:
        rank: Inner dimension of the adapter.
        alpha: The update is scaled by alpha / rank (`rslora`: alpha / sqrt(rank)).
        dropout: On the adapter's input, in training. 0 for `pissa`, and with lm_head among target_modules.
        target_modules: Of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (these are `all-linear`),
            embed_tokens, lm_head.
        variant: `lora_plus` trains B with a higher rate than A; `pissa` starts from the principal components of the
            weights; `dora` learns the length of each output's weights apart from their direction.
        loraplus_lr_ratio: Rate of B over rate of A, for `lora_plus` only (Hayou et al. 2024, arXiv:2402.12354); there
            16 when not given.
        modules_to_save: Of embed_tokens, lm_head: trained in full beside the adapter, as PEFT does.
    """

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=64)] = "all-linear"
    variant: Variant = "lora"
    loraplus_lr_ratio: Annotated[float, Field(gt=0, le=1e4)] | None = None
    modules_to_save: Annotated[list[Literal["embed_tokens", "lm_head"]], Field(max_length=2)] = []

    def settings(self) -> LoraSettings:
        """The section as the model package takes it."""
        return LoraSettings(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules if isinstance(self.target_modules, str) else tuple(self.target_modules),
            variant=self.variant,
            lora_plus_ratio=self.loraplus_lr_ratio or 1.0,
            modules_to_save=tuple(self.modules_to_save),
        )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("variant") == "lora_plus" and data.get("loraplus_lr_ratio") is None:
            return {**data, "loraplus_lr_ratio": LORA_PLUS_RATIO}
        return data


class Source(Section):
    """Where rows come from.

    Attributes:
        path: File (json, jsonl, csv, parquet, arrow), folder, glob, or hub id. Relative to the current folder, else to
            the recipe's.
        format: The rows' form; `auto` goes by the keys of the first row, and a row of another form is then an
            error.
        columns: What the file calls the keys of the rows' form, for example {instruction: question, output: answer}.
        split: Of a hub dataset, or of a folder, by the names of its files. A file has no splits.
        samples: Take only the first so many rows.
        weight: Share of this source's rows in the mix, beside the weights of the others, of which then each must have
            one. An epoch ends when each source was gone through; smaller ones are repeated meanwhile.
    """

    path: Text
    format: RowForm = "auto"
    columns: Annotated[dict[Text, Text], Field(max_length=32, json_schema_extra={"takes": COLUMNS})] = {}
    split: Text = "train"
    samples: Annotated[Count | None, Field(json_schema_extra=unit("rows"))] = None
    weight: Annotated[float, Field(gt=0, le=1e9, json_schema_extra=unit("share of the rows"))] | None = None


class DataSection(Section):
    """What is trained and evaluated on, and how rows become tokens.

    Attributes:
        train: What is trained on; a single path or source will do.
        eval: What is evaluated on, every `training.eval_steps`.
        eval_fraction: Instead of `eval`: set this share of the training rows aside, the same rows for the same seed.
        max_length: Tokens of a row. At most what the model knows.
        overlong: What happens to longer rows; how many were cut or left out is counted and said.
        train_on: The tokens that are trained on. A response is its content and its `<|im_end|>`.
        packing: Put several rows into one sequence of `max_length`, without any of them seeing another.
        streaming: Tokenize training rows while the model trains, so that it starts at once. Needs
            `training.max_steps`.
    """

    train: Annotated[list[Source], Field(min_length=1, max_length=10_000)]
    eval: Annotated[list[Source], Field(max_length=10_000)] = []
    eval_fraction: Annotated[float, Field(ge=0, lt=1, json_schema_extra=unit("share of the training rows"))] = 0.0
    max_length: Annotated[int, Field(ge=2, le=2**20, json_schema_extra=unit("tokens"))] = 2048
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    train_on: Literal["responses", "last_response", "all"] = "responses"
    packing: bool = False
    streaming: bool = False


class TrainingSection(Section):
    """How. Names of transformers' and PaddleNLP's TrainingArguments.

    Attributes:
        output_dir: The run's folder. When not given, `outputs/` and the recipe's file name.
        max_steps: Optimizer steps.
        num_train_epochs: Instead of `max_steps`: passes over the rows, rounded up to a whole step. With neither, 3, as
            in transformers.
        per_device_train_batch_size: Rows (with packing: sequences) of a micro-batch.
        per_device_eval_batch_size: The same for evaluation; when not given, as for training.
        gradient_accumulation_steps: Micro-batches of an optimizer step.
        learning_rate: The highest rate.
        lr_scheduler_type: As in transformers.
        min_lr_ratio: Lowest rate over highest; `cosine_with_min_lr` needs it, no other takes it.
        warmup_steps: Steps of linear warm-up, the first of them at rate 0.
        warmup_ratio: Instead of `warmup_steps`: share of all steps, rounded up.
        weight_decay: AdamW's; not on biases and norm weights.
        optim: `adamw_8bit` keeps AdamW's moments in 8 bits (arXiv:2110.02861): 2 bytes a trained number instead of 8.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_epsilon: AdamW's.
        neftune_noise_alpha: Add noise to the embeddings in training, evenly from +-alpha / sqrt(tokens x hidden size)
            (NEFTune, arXiv:2310.05914, where it is 5 to 15); without it none.
        max_grad_norm: Clip the gradient of a step to this norm; 0 does not clip.
        seed: Of the adapter, the order of rows, dropout and `eval_fraction`.
        logging_steps: A row of metrics.jsonl every so many steps: means over them, but `grad_norm` and `learning_rate`
            are the last step's.
        save_steps: A checkpoint every so many steps, and at the end.
        save_total_limit: Checkpoints kept; `null` keeps all.
        eval_steps: Evaluate every so many steps, and at the end; when not given, as `save_steps`.
        load_best_model_at_end: final/ is the checkpoint of the lowest eval_loss instead of the last step.
        early_stopping_patience: Stop after so many evaluations in a row without a lower eval_loss.
        shuffle: A new order each epoch; `false` is the order of the files.
        recompute: Compute activations a second time instead of keeping them: less memory, more time.
        resume_from_checkpoint: `auto`: go on from the newest good checkpoint in `output_dir`, if any. `never`: start
            over. Or a checkpoint folder. The written recipe.yaml always has `auto`.
        allow_changes: Keys that may differ from those of the run that is resumed, such as `[learning_rate]` or
            `[data.train, max_grad_norm]`; a section's name stands for all of its keys. For once: the written
            recipe.yaml has none. `max_steps` and `num_train_epochs` need not be named.
    """

    output_dir: Text = "outputs/run"
    max_steps: Annotated[Count | None, Field(json_schema_extra=unit("optimizer steps"))] = None
    num_train_epochs: Annotated[float, Field(gt=0, le=1e6, json_schema_extra=unit("epochs"))] | None = None
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=65_536, json_schema_extra=unit("rows"))] = 2
    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=65_536, json_schema_extra=unit("rows"))] = 2
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65_536, json_schema_extra=unit("micro-batches"))] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    lr_scheduler_type: Scheduler = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    warmup_steps: Annotated[int, Field(ge=0, le=2**31, json_schema_extra=unit("optimizer steps"))] = 0
    warmup_ratio: Annotated[float, Field(ge=0, le=1, json_schema_extra=unit("share of all steps"))] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9, json_schema_extra=unit("0 turns clipping off"))] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    logging_steps: Annotated[Count, Field(json_schema_extra=unit("optimizer steps"))] = 1
    save_steps: Annotated[Count, Field(json_schema_extra=unit("optimizer steps"))] = 50
    save_total_limit: Annotated[Count | None, Field(json_schema_extra=unit("checkpoints"))] = 2
    eval_steps: Annotated[Count | None, Field(json_schema_extra=unit("optimizer steps"))] = None
    load_best_model_at_end: bool = False
    early_stopping_patience: Annotated[Count | None, Field(json_schema_extra=unit("evaluations"))] = None
    shuffle: bool = True
    recompute: bool = False
    resume_from_checkpoint: Annotated[
        Text, Field(json_schema_extra={"takes": "auto, never, or a checkpoint folder"})
    ] = "auto"
    allow_changes: Annotated[list[Text], Field(max_length=100)] = []

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if data.get("max_steps") is None and data.get("num_train_epochs") is None:
            data["num_train_epochs"] = 3.0
        if "per_device_eval_batch_size" not in data and "per_device_train_batch_size" in data:
            data["per_device_eval_batch_size"] = data["per_device_train_batch_size"]
        return data


class DpoSection(Section, LossOptions):
    """For `method: dpo` only. Names of TRL's and PaddleNLP's DPOConfig; what losses read is in `LossOptions`.

    Attributes:
        precompute_ref_log_probs: Compute the reference's log-probabilities once, before training; `false` when not
            given and there is no reference, or `data.streaming`.
        reference: Another model as the reference. When not given, the model before training.
        reference_free: Take the reference's log-probabilities as 0: `sigmoid`, `hinge`, `ipo`; always so for `simpo`
            and `orpo`.
    """

    precompute_ref_log_probs: bool = True
    reference: Text | None = None
    reference_free: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        name = data.get("loss_type")
        if isinstance(name, str) and name in LOSSES and not LOSSES[name].has_reference:
            data.setdefault("reference_free", True)
            data.setdefault("precompute_ref_log_probs", False)
        if data.get("reference_free") is True:
            data.setdefault("precompute_ref_log_probs", False)
        return data


class DistributedSection(Section):
    """How a run is spread over processes.

    Attributes:
        tensor_parallel_degree: Processes that share each layer.
        pipeline_parallel_degree: Processes that share the stack of layers.
        sharding: What of the optimizer, gradients and weights is split over processes.
        sharding_parallel_degree: Processes that share one sharded copy; -1 is all, and what `sharding` without a degree
            means.
    """

    tensor_parallel_degree: Annotated[int, Field(ge=1, le=1024, json_schema_extra=unit("processes"))] = 1
    pipeline_parallel_degree: Annotated[int, Field(ge=1, le=1024, json_schema_extra=unit("processes"))] = 1
    sharding: Literal["", "stage1", "stage2", "stage3"] = ""
    sharding_parallel_degree: Annotated[
        int, Field(ge=-1, le=65_536, json_schema_extra=unit("processes; -1 is all of them"))
    ] = 1

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sharding") and "sharding_parallel_degree" not in data:
            return {**data, "sharding_parallel_degree": -1}
        return data


class Recipe(Section):
    """One run, all of it.

    Attributes:
        method: Supervised fine-tuning on conversations, or preference optimization on pairs.
        model: What is trained.
        lora: Train an adapter. Without the section all weights are trained.
        data: What it is trained on.
        training: How.
        dpo: For `method: dpo` only.
        distributed: How a run is spread over processes.
    """

    method: MethodName
    model: ModelSection
    lora: LoraSection | None = None
    data: DataSection
    training: TrainingSection = Field(default_factory=lambda: TrainingSection(num_train_epochs=3.0))
    dpo: DpoSection | None = None
    distributed: DistributedSection = DistributedSection()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Give the method its section where the recipe leaves it out; of streamed rows nothing is known before."""
        method = data.get("method") if isinstance(data, dict) else None
        section = METHODS[method].section if isinstance(method, str) and method in METHODS else None
        if section is not None and data.get(section) is None:
            data = {**data, section: {}}
        dpo, rows = (data.get("dpo"), data.get("data")) if isinstance(data, dict) else (None, None)
        if isinstance(dpo, dict) and isinstance(rows, dict) and rows.get("streaming") is True:
            data = {**data, "dpo": {"precompute_ref_log_probs": False, **dpo}}
        return data


# By dotted name; `source` is an entry of data.train or data.eval.
SECTIONS: dict[str, type[Section]] = {
    "recipe": Recipe,
    "model": ModelSection,
    "lora": LoraSection,
    "data": DataSection,
    "source": Source,
    "training": TrainingSection,
    "dpo": DpoSection,
    "distributed": DistributedSection,
}
