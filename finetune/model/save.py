"""A model in memory written as a folder: whole for Hugging Face's or PaddleNLP's readers, its adapter for PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle
from paddlenlp.peft.lora import LoRAModel

from finetune.errors import ArgumentError
from finetune.files import new_folder, write_json
from finetune.model.adapted import short_names
from finetune.model.adapter_config import peft_config
from finetune.model.build import config_of, dtype_of, model_weights
from finetune.model.lora import adapter_state, lora_layers
from finetune.model.tensorfile import Promise, write_tensors
from finetune.model.write import Companions, write_companions, write_hf, write_paddle


def save_hf(model: paddle.nn.Layer, folder: str | Path, *, dtype: str | None = None, **options: Any) -> None:
    """Write a model in memory with `write_hf`, by default in its own dtype. An adapter must be merged before."""
    _check_whole(model)
    write_hf(config_of(model), model_weights(model), folder, dtype=dtype or dtype_of(model), **options)


def save_paddle(model: paddle.nn.Layer, folder: str | Path, *, dtype: str | None = None, **options: Any) -> None:
    """Write a model in memory with `write_paddle`, by default in its own dtype. An adapter must be merged before."""
    _check_whole(model)
    write_paddle(config_of(model), model_weights(model), folder, dtype=dtype or dtype_of(model), **options)


def _check_whole(model: paddle.nn.Layer) -> None:
    if isinstance(model, LoRAModel):
        fix = "Merge it first (merge_lora), or save the adapter (save_peft)."
        raise ArgumentError("the model has an adapter", fix=fix)


def save_peft(model: LoRAModel, folder: str | Path, *, base: str, tokenizer: Path | Companions | None = None) -> None:
    """Write a PEFT folder, which PEFT and this toolkit open: complete, or not there at all.

    Args:
        folder: Must not exist, or be empty.
        base: Hub id or folder of the base model, as `ModelSource.hub_or_folder` gives it.
        tokenizer: Folder whose tokenizer files and generation config are to stand beside it, or these themselves
            (`write.read_companions`).
    """
    names = list(lora_layers(model))
    config = config_of(model)
    targets = short_names(names, config.adaptable)
    tensors = {name: Promise.of(array) for name, array in adapter_state(model).items()}
    with new_folder(Path(folder)) as partial:
        write_tensors(partial / "adapter_model.safetensors", tensors, {"format": "pt"})
        write_json(partial / "adapter_config.json", peft_config(model.settings.saved(), base, targets))
        write_companions(partial, config, tokenizer)
