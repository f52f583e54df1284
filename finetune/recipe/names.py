"""The nearest valid name for a key that is not one: in its section, in the others, and by what other tools call it."""

from __future__ import annotations

from functools import lru_cache

from finetune.errors import nearest
from finetune.recipe.schema import Recipe

# What transformers, PEFT, TRL, PaddleNLP, LLaMA-Factory, axolotl, torchtune and ms-swift call our keys, or people do.
_ALIASES = {
    "method": "stage task train_type training_type finetuning_stage",
    "model.path": "model_name model_name_or_path base_model pretrained_model_name_or_path model_id model_path name",
    "model.dtype": "torch_dtype bf16 fp16 precision compute_dtype fp16_opt_level",
    "model.quantization": "load_in_4bit load_in_8bit quantization_bit quant_method bnb_4bit_quant_type quant_bits"
    " weight_quantize_algo quantization_config",
    "model.double_quantization": "bnb_4bit_use_double_quant double_quant use_double_quant qlora_weight_double_quant",
    "lora": "finetuning_type tuner_type peft use_lora adapter use_peft",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules modules targets lora_target_linear",
    "lora.variant": "use_rslora rslora pissa pissa_init lora_plus init_lora_weights use_dora",
    "lora.loraplus_lr_ratio": "lora_plus_scale lora_plus_lr_ratio lorap_lr_ratio",
    "data.train": "dataset datasets dataset_name train_file train_data data_path dataset_path dataset_name_or_path"
    " train_dataset train_path",
    "data.eval": "eval_dataset val_dataset val_file validation_file dev_file eval_file validation",
    "data.eval_fraction": "val_size val_set_size eval_size split_dataset_ratio",
    "data.max_length": "cutoff_len max_seq_length max_seq_len sequence_len seq_length max_len model_max_length seq_len"
    " src_length block_size",
    "data.overlong": "truncation truncation_strategy excess_length_strategy",
    "data.train_on": "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss mask_history"
    " train_on_input",
    "data.packing": "pack packed sample_packing zero_padding neat_packing",
    "training.output_dir": "output output_path save_dir out_dir",
    "training.max_steps": "steps num_steps max_steps_per_epoch iters",
    "training.num_train_epochs": "epochs num_epochs epoch max_epochs",
    "training.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_device_batch_size"
    " per_gpu_train_batch_size bsz",
    "training.per_device_eval_batch_size": "eval_batch_size",
    "training.gradient_accumulation_steps": "grad_accum accumulation accumulation_steps accumulate_grad_batches"
    " gradient_accumulation grad_accumulation_steps",
    "training.optim": "optimizer optimizer_type optim_type",
    "training.neftune_noise_alpha": "neftune neftune_alpha noisy_embedding_alpha noise_alpha",
    "training.learning_rate": "lr max_lr",
    "training.lr_scheduler_type": "scheduler lr_scheduler lr_schedule schedule lr_decay_style",
    "training.min_lr_ratio": "min_lr lr_end min_lr_rate",
    "training.warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "training.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping grad_clip_norm",
    "training.seed": "random_seed data_seed",
    "training.logging_steps": "log_steps log_every log_every_n_steps log_interval",
    "training.save_steps": "save_every save_interval checkpoint_steps",
    "training.eval_steps": "eval_every eval_interval val_check_interval",
    "training.recompute": "gradient_checkpointing activation_checkpointing enable_activation_checkpointing",
    "training.resume_from_checkpoint": "resume auto_resume_from_checkpoints",
    "dpo.beta": "pref_beta dpo_beta",
    "dpo.loss_type": "pref_loss loss dpo_loss rpo_loss rlhf_type",
    "dpo.label_smoothing": "dpo_label_smoothing cdpo_alpha",
    "dpo.precompute_ref_log_probs": "precompute precompute_ref",
    "dpo.sft_loss_ratio": "pref_ftx rpo_alpha sft_weight ftx",
    "dpo.simpo_gamma": "gamma",
    "dpo.reference": "ref_model ref_model_name_or_path reference_model",
    "distributed.tensor_parallel_degree": "tp tensor_parallel tensor_model_parallel_size tensor_parallel_size",
    "distributed.pipeline_parallel_degree": "pp pipeline_parallel pipeline_model_parallel_size",
    "distributed.sharding": "zero zero_stage deepspeed fsdp",
}


@lru_cache(maxsize=1)
def recipe_keys() -> dict[str, tuple[str, ...]]:
    """Keys of each section by the section's dotted name, "" for the top level; a source of data is `data.train`."""
    keys = {"": tuple(Recipe.model_fields)}
    for name, schema in Recipe.model_json_schema()["$defs"].items():
        section = name.removesuffix("Section").lower()
        keys["data.train" if section == "source" else section] = tuple(schema["properties"])
    keys["data.eval"] = keys["data.train"]
    return keys


@lru_cache(maxsize=1)
def _by_name() -> dict[str, str]:
    """Dotted key by bare name: the keys themselves first, then the aliases."""
    table: dict[str, str] = {}
    for section, keys in recipe_keys().items():
        if section and not section.startswith("data."):
            for key in keys:
                table.setdefault(key, f"{section}.{key}")
    for dotted, names in _ALIASES.items():
        for name in names.split():
            table.setdefault(name, dotted)
    return table


_CHANGEABLE_SECTIONS = ("data", "training", "dpo")
_CHANGEABLE_OF_LORA = ("lora.dropout", "lora.loraplus_lr_ratio")


@lru_cache(maxsize=1)
def changeable() -> dict[str, str]:
    """What training.allow_changes takes, and the dotted key or section that each name means.

    Weights and optimizer state still fit after such a change; after one of the model or the adapter they do not.

    >>> changeable()["learning_rate"], changeable()["data"], changeable()["lora.dropout"]
    ('training.learning_rate', 'data', 'lora.dropout')
    """
    table = {key: f"training.{key}" for key in recipe_keys()["training"]}
    for section in _CHANGEABLE_SECTIONS:
        table[section] = section
        table |= {f"{section}.{key}": f"{section}.{key}" for key in recipe_keys()[section]}
    return table | {key: key for key in _CHANGEABLE_OF_LORA}


def nearest_key(section: str, key: str) -> str | None:
    """The dotted valid key nearest to `key`, which was found in `section`; None when nothing is near.

    >>> nearest_key("training", "learnig_rate"), nearest_key("", "lr"), nearest_key("", "lora_r")
    ('training.learning_rate', 'training.learning_rate', 'lora.rank')
    """
    name = key.strip().lower().replace("-", "_").rpartition(".")[2]
    here = {own: f"{section}.{own}" if section else own for own in recipe_keys().get(section, ())}
    table = _by_name()
    for names in (here, table):
        if name in names:
            return names[name]
    for names in (here, table):
        if near := nearest(name, names):
            return names[near]
    return None
