"""The recipe as frozen, strict pydantic models: which keys exist, their types, ranges, units and defaults.

Key names follow transformers, TRL and PEFT, then PaddleNLP. Rules that look at several keys at once are in `rules.py`.
A default that depends on another key is filled in here, so that a `Recipe` never has a value left to guess.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

QWEN2_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REFERENCE_FREE_LOSSES = ("simpo", "orpo")

Text = Annotated[str, Field(min_length=1, max_length=4096)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LossType = Literal["sigmoid", "hinge", "ipo", "kto_pair", "simpo", "orpo", "dpop", "sppo_hard", "nca_pair"]
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
        path: Hub id, Hugging Face or PaddleNLP folder, adapter folder, checkpoint or run folder.
        dtype: `auto` is bfloat16 on GPU and float32 on CPU.
    """

    path: Text
    dtype: Dtype = "auto"


class LoraSection(Section):
    """LoRA. The section's absence means full fine-tuning.

    Attributes:
        loraplus_lr_ratio: Learning rate of B over that of A; `variant: lora_plus` only, there 16 when not given
            (Hayou et al. 2024, arXiv:2402.12354).
    """

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1, max_length=64)] = "all-linear"
    variant: Literal["lora", "rslora", "lora_plus", "pissa"] = "lora"
    loraplus_lr_ratio: Annotated[float, Field(gt=0, le=1e4)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("variant") == "lora_plus" and data.get("loraplus_lr_ratio") is None:
            return {**data, "loraplus_lr_ratio": 16.0}
        return data


class Source(Section):
    """Where rows come from.

    Attributes:
        path: File, folder, glob or hub id.
        format: The rows' form; `auto` looks at the keys of each row.
        split: Split of a hub dataset or a saved one, or what files of a folder are named after.
        samples: Take this many rows, the first ones; None takes all.
    """

    path: Text
    format: Literal["auto", "messages", "alpaca", "sharegpt", "preference"] = "auto"
    split: Text = "train"
    samples: Annotated[Count | None, Field(json_schema_extra=unit("rows"))] = None


class DataSection(Section):
    """What is trained and evaluated on, and how rows become tokens.

    Attributes:
        streaming: Tokenize training rows while the model trains, not before.
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
    """Names of transformers' and PaddleNLP's TrainingArguments.

    Attributes:
        max_steps: Optimizer steps; excludes num_train_epochs. With neither, 3 epochs, as transformers does.
        per_device_eval_batch_size: As per_device_train_batch_size when not given.
        eval_steps: Evaluate every so many optimizer steps; as save_steps when evaluation data is given and this is not.
        early_stopping_patience: Stop after this many evaluations in a row without a lower eval_loss.
        min_lr_ratio: Lowest learning rate as a share of learning_rate; `cosine_with_min_lr` only.
        save_total_limit: Checkpoints kept; None keeps all.
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
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
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


class DpoSection(Section):
    """Names of TRL's and PaddleNLP's DPOConfig; `method: dpo` only.

    Attributes:
        precompute_ref_log_probs: Reference log-probabilities once before training. False when there is no reference,
            and for rows that are streamed.
        sft_loss_ratio: Weight of an added SFT loss on the chosen response.
        simpo_gamma: Target reward margin of SimPO, there 0.5 when not given, as TRL's CPOConfig.
        dpop_lambda: Weight of DPO-Positive's penalty, there 50 when not given (Pal et al. 2024, arXiv:2402.13228).
        reference: Another model as the reference; None is the model before training.
        reference_free: Take the reference log-probabilities as 0. Always true for simpo and orpo.
    """

    beta: Annotated[float, Field(gt=0, le=1000)] = 0.1
    loss_type: LossType = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    precompute_ref_log_probs: bool = True
    sft_loss_ratio: Annotated[float, Field(ge=0, le=1000)] = 0.0
    simpo_gamma: Annotated[float, Field(ge=0, le=1000)] | None = None
    dpop_lambda: Annotated[float, Field(ge=0, le=1e6)] | None = None
    reference: Text | None = None
    reference_free: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        loss = data.get("loss_type")
        if loss in REFERENCE_FREE_LOSSES:
            data.setdefault("reference_free", True)
        if data.get("reference_free") is True or loss in REFERENCE_FREE_LOSSES:
            data.setdefault("precompute_ref_log_probs", False)
        if loss == "simpo" and data.get("simpo_gamma") is None:
            data["simpo_gamma"] = 0.5
        if loss == "dpop" and data.get("dpop_lambda") is None:
            data["dpop_lambda"] = 50.0
        return data


class DistributedSection(Section):
    """How a run is spread over processes, on Paddle Fleet.

    Attributes:
        sharding_parallel_degree: Processes that share one sharded copy; -1 is all data-parallel processes, and what
            `sharding` without a degree means.
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
    """One run, all of it. `lora` None is full fine-tuning; `dpo` is None unless method is dpo."""

    method: Literal["sft", "dpo"]
    model: ModelSection
    lora: LoraSection | None = None
    data: DataSection
    training: TrainingSection = Field(default_factory=lambda: TrainingSection(num_train_epochs=3.0))
    dpo: DpoSection | None = None
    distributed: DistributedSection = DistributedSection()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("method") != "dpo":
            return data
        dpo, rows = data.get("dpo"), data.get("data")
        dpo = {} if dpo is None else dpo
        if isinstance(dpo, dict) and isinstance(rows, dict) and rows.get("streaming") is True:
            dpo = {"precompute_ref_log_probs": False, **dpo}
        return {**data, "dpo": dpo}
