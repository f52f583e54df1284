"""Logits of a loaded model, for comparisons."""

from __future__ import annotations

import numpy as np


def prompts(vocab_size: int = 416, rows: int = 3, length: int = 24, seed: int = 7) -> np.ndarray:
    """Token ids int64 [rows, length] over the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length))


def logits(model, ids: np.ndarray | None = None) -> np.ndarray:
    """float32 [rows, length, vocabulary]."""
    import paddle

    with paddle.no_grad():
        output = model(paddle.to_tensor(prompts() if ids is None else ids))
    return (output[0] if isinstance(output, tuple) else output).astype("float32").numpy()


def shake(model, seed: int = 3, size: float = 0.05) -> None:
    """Give every B of an adapter something to do."""
    from finetune.model.lora import lora_layers
    from finetune.model.tensors import as_numpy, set_parameter

    random = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        set_parameter(layer.lora_B, as_numpy(layer.lora_B) + size * random.standard_normal(layer.lora_B.shape))


def difference(left: np.ndarray, right: np.ndarray) -> float:
    """Largest difference of a logit. The tiny models' logits have a spread of 2 to 3 and reach 12, where a real one's
    rounding errors would be several times smaller; it is therefore given in units of the spread, if that is above 1.
    """
    return float(np.abs(left - right).max() / max(1.0, right.std()))
