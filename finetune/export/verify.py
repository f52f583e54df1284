"""What was exported, read back and compared with the model it came from, logit by logit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finetune.export.gguf import read_gguf
from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle

from finetune.model.build import build_model, fill
from finetune.model.load import LoadedModel, load_model
from finetune.model.resolve import ModelSource

PROMPTS, LENGTH = 4, 32

# Allowed difference of a logit. float32: what the order of additions explains. The others round every weight, so the
# limit is relative to the spread of the logits (their standard deviation); measured values are in docs/log.md.
FLOAT32_LIMIT = 1e-4
RELATIVE_LIMITS = {"bfloat16": 0.25, "float16": 0.03, "q8_0": 0.5}


def compare(source: ModelSource, folder: Path, format: str, dtype: str) -> tuple[float, float]:
    """Largest logit difference over fixed prompts, and what is allowed.

    Both models are computed in float32; an adapter is applied beside its base, not merged.

    Returns:
        (difference, limit), in logits.
    """
    prompts = fixed_prompts(source.config.vocab_size)
    expected = _logits(load_model(source, dtype="float32"), prompts)
    loaded = load_gguf(source, folder) if format == "gguf" else load_model(folder, dtype="float32")
    difference = float(np.abs(_logits(loaded, prompts) - expected).max())
    limit = RELATIVE_LIMITS[dtype] * float(expected.std()) if dtype != "float32" else FLOAT32_LIMIT
    return difference, limit


def fixed_prompts(vocab_size: int) -> np.ndarray:
    """Token ids int64 [PROMPTS, LENGTH], the same every time, from the whole vocabulary."""
    return np.random.default_rng(20240608).integers(0, vocab_size, (PROMPTS, LENGTH))


def _logits(loaded: LoadedModel, prompts: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        output = loaded.model(paddle.to_tensor(prompts))
    return (output[0] if isinstance(output, tuple) else output).astype("float32").numpy()


def load_gguf(source: ModelSource, folder: Path) -> LoadedModel:
    """A GGUF export of `source` as a float32 model."""
    with paddle.utils.unique_name.guard():
        model = build_model(source.config, "float32")
        fill(model, read_gguf(source.config, folder))
    model.eval()
    return LoadedModel(model, source.config, source, None, "float32")
