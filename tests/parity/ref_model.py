"""Model folders and adapters as transformers and PEFT see them. Runs in a reference environment; no paddle.

Each argument is a JSON job with `steps`, a list of objects, done in order:

    {"do": "logits", "model": folder, "adapter": folder?, "ids": file.npy, "output": file.npy}
    {"do": "greedy", "model": folder, "ids": file.npy, "new": 64, "output": file.npy}
    {"do": "save", "model": folder, "dtype": "bfloat16", "max_shard_size": "40KB", "output": folder}
    {"do": "adapter", "model": folder, "config": {...}, "seed": 0, "output": folder}    a PEFT adapter, all but A shaken
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load(step: dict, dtype: str = "float32"):
    """The model, under its adapter if it has one; every key of the folder must have found its place."""
    found = AutoModelForCausalLM.from_pretrained(
        step["model"], torch_dtype=getattr(torch, dtype), output_loading_info=True, attn_implementation="eager"
    )
    model, info = found
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise SystemExit(f"{kind}: {info[kind]}")
    if step.get("adapter"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, step["adapter"])
    return model.eval()


def logits(step: dict) -> None:
    """float32 [rows, length, vocabulary]."""
    with torch.no_grad():
        output = load(step)(torch.from_numpy(np.load(step["ids"]))).logits
    np.save(step["output"], output.float().numpy())


def greedy(step: dict) -> None:
    """The tokens after each prompt, int64 [rows, new]; the prompts have one length."""
    ids = torch.from_numpy(np.load(step["ids"]))
    model = load(step)
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=step["new"], do_sample=False, pad_token_id=0
    )
    np.save(step["output"], out[:, ids.shape[1] :].numpy())


def save(step: dict) -> None:
    """Write the folder again, as this version of transformers does."""
    model = load(step, step.get("dtype", "float32"))
    model.save_pretrained(step["output"], max_shard_size=step.get("max_shard_size", "5GB"), safe_serialization=True)


def adapter(step: dict) -> None:
    """Make a PEFT adapter that does something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(step["seed"])
    model = get_peft_model(load(step), LoraConfig(task_type="CAUSAL_LM", **step["config"]))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(step["output"])


if __name__ == "__main__":
    for file in sys.argv[1:]:
        for step in json.loads(Path(file).read_text(encoding="utf-8"))["steps"]:
            globals()[step["do"]](step)
