"""What was exported, read back: each tensor against the model's, and what the whole predicts of text.

The two find different things. Tensors are compared with the model's, merged and rounded as the file should hold them:
one that was swapped, shifted, turned or left out is found in whatever format, however little it does to the logits.
What rounding does to the model, and whether an adapter was merged as it works beside its base, only logits say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune.model.runtime import paddle as _bring_up

_bring_up()

import paddle

from finetune.chat.tokenizer import Tokenizer
from finetune.compute.layers import prepare_linears
from finetune.errors import CheckpointError
from finetune.export.gguf import as_stored
from finetune.model.adapted import open_adapter, stored_weights
from finetune.model.build import build_model, fill
from finetune.model.load import load_model
from finetune.model.quantize import Quantization
from finetune.model.resolve import ModelSource, resolve_model
from finetune.model.tensorfile import Array
from finetune.model.weights import Weight
from finetune.model.write import cast
from finetune.recipe.shipped import SHIPPED

LENGTH = 32
"""Tokens of each text that are looked at: 20 texts of it are some 600 predictions."""

FLOAT32_LIMIT = 1e-4
"""Allowed difference of a logit where nothing is rounded: what the order of additions explains."""

_CHUNK = 64  # positions whose probabilities are in float64 at a time


@dataclass(frozen=True)
class Limits:
    """What rounding may do to what a model predicts.

    Attributes:
        agreement: Least share of positions with the same likeliest next token.
        divergence: Greatest mean KL divergence from the model, in nats.
    """

    agreement: float
    divergence: float


# A multiple of what right exports of small models give, which rounding hurts most; measured values are in docs/log.md.
LIMITS = {
    "float16": Limits(0.98, 1e-4),
    "bfloat16": Limits(0.95, 0.005),
    "q8_0": Limits(0.9, 0.02),
    "q5_1": Limits(0.6, 0.6),
    "q5_0": Limits(0.6, 0.6),
    "q4_1": Limits(0.4, 1.2),
    "q4_0": Limits(0.4, 1.2),
}


@dataclass(frozen=True)
class Likeness:
    """How near what was written is to the model it came from.

    Attributes:
        wrong: The tensors that are not the model's, rounded as the file should hold them.
        tensors: How many were compared.
        difference: Largest difference of a logit; where numbers are rounded, of the same before they are.
        positions: Predictions compared for the other two.
        agreement: Share of them with the same likeliest token.
        divergence: Mean KL divergence from the model's probabilities, in nats.
        limits: For these two; None where nothing is rounded.
    """

    wrong: tuple[str, ...]
    tensors: int
    difference: float
    positions: int
    agreement: float
    divergence: float
    limits: Limits | None

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words; empty where it is the same model."""
        found = []
        if self.wrong:
            more = f" and {len(self.wrong) - 3} more" if len(self.wrong) > 3 else ""
            found.append(f"{', '.join(self.wrong[:3])}{more} {'is' if len(self.wrong) == 1 else 'are'} not the model's")
        if not self.difference <= FLOAT32_LIMIT:
            found.append(f"the largest logit difference to the model is {self.difference:.3g}, above {FLOAT32_LIMIT:g}")
        if self.limits and not self.agreement >= self.limits.agreement:
            found.append(
                f"the likeliest token is the model's in {self.agreement:.1%}, below {self.limits.agreement:.0%}"
            )
        if self.limits and not self.divergence <= self.limits.divergence:
            found.append(f"the mean KL divergence is {self.divergence:.2g} nats, above {self.limits.divergence:g}")
        return found

    def __str__(self) -> str:
        tensors = f"Verified: {self.tensors} tensors as they should be; largest logit difference {self.difference:.3g}"
        if self.limits is None:
            return f"{tensors} (limit {FLOAT32_LIMIT:g})."
        return (
            f"{tensors} before rounding (limit {FLOAT32_LIMIT:g}).\n"
            f"Rounded, the likeliest next token is the same at {self.agreement:.1%} of {self.positions} tokens of text "
            f"(at least {self.limits.agreement:.0%}); mean KL divergence {self.divergence:.2g} nats "
            f"(at most {self.limits.divergence:g})."
        )


def compare(
    source: ModelSource, folder: Path, format: str, dtype: str, quantization: Quantization | None = None
) -> Likeness:
    """Compare what was written with the model, which is computed in float32, an adapter beside its base.

    Args:
        quantization: Of that base.

    Raises:
        CheckpointError: what was written cannot be read.
    """
    written = resolve_model(next(folder.glob("*.gguf")) if format == "gguf" else folder)
    expected = expected_tensors(source, format, dtype, quantization)
    wrong = wrong_tensors(expected, held_tensors(written, format))
    prompts = texts(source)
    beside = load_model(source, dtype="float32", quantization=quantization).model
    if quantization is not None:
        prepare_linears(beside)
    model = _logits(beside, prompts)
    seen = _logits(load_model(written, dtype="float32").model, prompts)
    unrounded = model
    if dtype != "float32" and source.base and format != "peft":
        unrounded = _logits(_merged(source, quantization), prompts)
    difference = float(np.abs((seen if dtype == "float32" else unrounded) - model).max())
    agreement = float((seen.argmax(-1) == model.argmax(-1)).mean())
    divergence = mean_divergence(model, seen)
    return Likeness(wrong, len(expected), difference, len(model), agreement, divergence, LIMITS.get(dtype))


def wrong_tensors(expected: dict[str, Weight], found: dict[str, Weight]) -> tuple[str, ...]:
    """The names of tensors that are missing, or differ in any number."""
    return tuple(name for name, weight in expected.items() if name not in found or not _equal(weight, found[name]))


def texts(source: ModelSource) -> list[list[int]]:
    """Token ids of the example rows that come with the package: their words, for a base model has no chat template.

    A model without a tokenizer gets ids drawn from its whole vocabulary, the same every time.
    """
    size = source.config.vocab_size
    try:
        backend = Tokenizer.from_folder(source.tokenizer_folder).backend
    except CheckpointError:
        return np.random.default_rng(20240608).integers(0, size, (20, LENGTH)).tolist()
    lines = (SHIPPED / "data" / "examples" / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    rows = ["\n".join(message["content"] for message in json.loads(line)["messages"]) for line in lines]
    ids = [[number for number in backend.encode(row).ids if number < size][:LENGTH] for row in rows]
    return [row for row in ids if row]


def mean_divergence(model: Array, other: Array) -> float:
    """Mean over positions of the KL divergence of `other` from `model`, in nats.

    Args:
        model, other: Logits [positions, vocabulary].
    """
    total = 0.0
    for start in range(0, len(model), _CHUNK):
        p, q = (_log_probabilities(logits[start : start + _CHUNK]) for logits in (model, other))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(model)


def _log_probabilities(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def expected_tensors(
    source: ModelSource, format: str, dtype: str, quantization: Quantization | None = None
) -> dict[str, Weight]:
    """What the file should hold: what the model does, in the numbers of this dtype."""
    weights = held_tensors(source, format, quantization)
    if format == "gguf":
        return as_stored(source.config, weights, dtype)
    return {name: _cast(name, weight, dtype) for name, weight in weights.items()}


def _cast(name: str, weight: Weight, dtype: str) -> Weight:
    return replace(weight, read=lambda: cast(weight.read(), dtype, name))


def held_tensors(source: ModelSource, format: str, quantization: Quantization | None = None) -> dict[str, Weight]:
    """What this layout holds of a model: an adapter's own, or all, merged."""
    return open_adapter(source)[0] if format == "peft" else stored_weights(source, quantization)


def _equal(left: Weight, right: Weight) -> bool:
    first, second = (weight.read().astype(np.float32) for weight in (left, right))
    return np.array_equal(first, second, equal_nan=True)


def _merged(source: ModelSource, quantization: Quantization | None) -> paddle.nn.Layer:
    """The model with its adapter merged and nothing rounded."""
    with paddle.utils.unique_name.guard():
        model = build_model(source.config, "float32")
        fill(model, stored_weights(source, quantization))
    model.eval()
    return model


def _logits(model: paddle.nn.Layer, prompts: list[list[int]]) -> Array:
    """Logits of each position of each prompt, float32 [positions, vocabulary]."""
    found = []
    with paddle.no_grad():
        for ids in prompts:
            output = model(paddle.to_tensor([ids]))
            found.append((output[0] if isinstance(output, tuple) else output).astype("float32").numpy()[0])
    return np.concatenate(found)
