"""What was exported, read back and compared with the model it came from, logit by logit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle

from finetune.export.formats import QUANTIZED
from finetune.export.gguf import as_stored
from finetune.model.adapted import stored_weights
from finetune.model.build import build_model, fill
from finetune.model.load import load_model
from finetune.model.resolve import ModelSource

PROMPTS, LENGTH = 4, 32

# Allowed difference of a logit. float32: what the order of additions explains. The others round every weight, so the
# limit is relative to the spread of the logits (their standard deviation); measured values are in docs/log.md. In 4 or
# 5 bits the logits of a good file may be as far off as those of another model: there, what the file holds is compared
# with the model's weights rounded alike.
FLOAT32_LIMIT = 1e-4
RELATIVE_LIMITS = {"bfloat16": 0.25, "float16": 0.03, "q8_0": 0.5}


def compare(source: ModelSource, folder: Path, format: str, dtype: str) -> tuple[float, float]:
    """Largest logit difference over fixed prompts, and what is allowed.

    Both models are computed in float32; an adapter is applied beside its base, not merged (for 4 and 5 bits, merged and
    rounded).

    Returns:
        (difference, limit), in logits.
    """
    prompts = fixed_prompts(source.config.vocab_size)
    is_coarse = dtype in QUANTIZED and dtype not in RELATIVE_LIMITS
    expected = _logits(_rounded(source, dtype) if is_coarse else load_model(source, dtype="float32").model, prompts)
    written = next(folder.glob("*.gguf")) if format == "gguf" else folder
    loaded = load_model(written, dtype="float32").model
    difference = float(np.abs(_logits(loaded, prompts) - expected).max())
    limit = RELATIVE_LIMITS[dtype] * float(expected.std()) if dtype in RELATIVE_LIMITS else FLOAT32_LIMIT
    return difference, limit


def fixed_prompts(vocab_size: int) -> np.ndarray:
    """Token ids int64 [PROMPTS, LENGTH], the same every time, from the whole vocabulary."""
    return np.random.default_rng(20240608).integers(0, vocab_size, (PROMPTS, LENGTH))


def _rounded(source: ModelSource, dtype: str) -> paddle.nn.Layer:
    """The model with its weights as the file should hold them."""
    with paddle.utils.unique_name.guard():
        model = build_model(source.config, "float32")
        fill(model, as_stored(source.config, stored_weights(source), dtype))
    model.eval()
    return model


def _logits(model: paddle.nn.Layer, prompts: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        output = model(paddle.to_tensor(prompts))
    return (output[0] if isinstance(output, tuple) else output).astype("float32").numpy()
