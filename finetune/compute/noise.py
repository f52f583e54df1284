"""NEFTune: noise on the embeddings while a model is trained (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

The length of a sequence is its own, as in the paper's code; transformers takes that of the padded batch. A prompt that
two responses share gets one draw. A reference model sees no noise: it is what the policy is measured against.
"""

from __future__ import annotations

import numpy as np

from finetune.compute.layout import Layout
from finetune.model.build import body_of, causal_lm
from finetune.model.runtime import paddle as _bring_up

_bring_up()
import paddle


def set_noise(model: paddle.nn.Layer, alpha: float | None) -> None:
    """Add noise of this strength in training from now on; None: no noise."""
    causal_lm(model).neftune_noise_alpha = alpha


def noisy_embeddings(model: paddle.nn.Layer, layout: Layout) -> paddle.Tensor | None:
    """The embeddings of a micro-batch with noise, [1, T, hidden]; None where there is to be none.

    Each number gets one drawn evenly from +-alpha / sqrt(L d), L the length of its sequence and d the hidden size. The
    draws are those of the step's own seed, so that a resumed run repeats them.
    """
    alpha = getattr(causal_lm(model), "neftune_noise_alpha", None)
    if alpha is None or not (model.training and paddle.is_grad_enabled()):
        return None
    embeddings = body_of(model).embed_tokens(paddle.to_tensor(layout.input_ids))
    reach = alpha / np.sqrt(layout.sequence_lengths() * embeddings.shape[-1])
    noise = paddle.uniform(embeddings.shape, "float32", -1.0, 1.0) * paddle.to_tensor(reach.astype(np.float32)[:, None])
    return embeddings + noise.astype(embeddings.dtype)
