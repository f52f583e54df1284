"""A model that bitsandbytes quantizes and transformers saves: `python ref_bitsandbytes.py JOB.json`.

A job is {"model": Hugging Face folder, "double": bool, "quantized": where the folder goes, "ids": .npy, "output": .npy}
or, for a folder that is there, the same without "double" and perhaps with "adapter", a PEFT folder. The output is the
logits in float32, from a pass with gradients: without, bitsandbytes multiplies on CPU in less than float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

if __name__ == "__main__":
    for step in json.loads(Path(sys.argv[1]).read_text()):
        if "double" in step:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=step["double"],
                bnb_4bit_compute_dtype=torch.float32,
            )
            options = {"dtype": torch.float32, "device_map": "cpu"}
            model = AutoModelForCausalLM.from_pretrained(step["model"], quantization_config=config, **options)
            model.save_pretrained(step["quantized"])
        model = AutoModelForCausalLM.from_pretrained(step["quantized"], dtype=torch.float32, device_map="cpu")
        if "adapter" in step:
            model = PeftModel.from_pretrained(model, step["adapter"], is_trainable=True)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        logits = model(torch.tensor(np.load(step["ids"]))).logits
        np.save(step["output"], logits.detach().numpy())
