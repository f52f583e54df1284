"""What an adapter is: its settings, and which of the model's modules and tensors they mean. No paddle here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from finetune.errors import ArgumentError, Fault, did_you_mean
from finetune.model.family import ADAPTABLE, EMBEDDING, HEAD, Architecture

Variant = Literal["lora", "rslora", "lora_plus", "pissa", "dora"]
Bias = Literal["none", "all", "lora_only"]
LORA_PLUS_RATIO = 16.0  # B learns 16 times as fast as A: Hayou et al. 2024, arXiv:2402.12354, section 5


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is. Attributes that name modules do it as PEFT does: the full name, or its last parts.

    Attributes:
        rank, alpha, dropout: As in LoRA; the update is scaling * B A.
        target_modules: `all-linear` (every projection of the layers; neither embedding nor head) or module names.
        variant: lora | rslora | lora_plus | pissa | dora. On disk lora_plus and pissa do not exist: the one differs in
            training only, the other is saved as an equivalent lora of twice the rank.
        lora_plus_ratio: How many times faster B learns than A; 16 for lora_plus when not given, else 1.
        dora: Whether each output has a magnitude of its own (Liu et al. 2024, arXiv:2402.09353); always with the
            variant dora, and beside rslora where PEFT says both.
        modules_to_save: Modules whose own tensors are trained too, and stand in the adapter whole.
        bias: Which biases are: none, all of the model, or those of the modules with an adapter.
        rank_pattern, alpha_pattern: Module name -> its own rank or alpha.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    variant: Variant = "lora"
    lora_plus_ratio: float | None = None
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    bias: Bias = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lora_plus_ratio is None:
            object.__setattr__(self, "lora_plus_ratio", LORA_PLUS_RATIO if self.variant == "lora_plus" else 1.0)
        for name in ("target_modules", "modules_to_save"):
            if not isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, tuple(value))
        if self.variant == "dora":
            object.__setattr__(self, "dora", True)

    def rank_of(self, module: str) -> int:
        """The rank of a module's update."""
        return next((rank for name, rank in self.rank_pattern.items() if _is_meant(module, name)), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's update."""
        return next((alpha for name, alpha in self.alpha_pattern.items() if _is_meant(module, name)), self.alpha)

    def scaling_of(self, module: str) -> float:
        """alpha / rank; alpha / sqrt(rank) with rslora (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.variant == "rslora" else rank)

    def saved(self) -> LoraSettings:
        """The settings of the adapter on disk: a lora, rslora or dora with the same update."""
        if self.variant == "pissa":
            ranks = {name: 2 * rank for name, rank in self.rank_pattern.items()}
            alphas = {name: 2 * alpha for name, alpha in self.alpha_pattern.items()}
            double = replace(self, rank=2 * self.rank, alpha=2 * self.alpha, rank_pattern=ranks, alpha_pattern=alphas)
            return replace(double, variant="lora", lora_plus_ratio=1.0)
        return replace(self, variant="lora" if self.variant == "lora_plus" else self.variant, lora_plus_ratio=1.0)


def target_names(targets: str | Sequence[str], config: Architecture) -> list[str]:
    """Those of the model's modules that `target_modules` asks for.

    Raises:
        ArgumentError: a name that no module has, with the nearest one.
    """
    if targets == "all-linear":
        return list(config.linears)
    names = list(config.adaptable)
    targets = (targets,) if isinstance(targets, str) else targets
    faults = [
        Fault(f"no module is called {target!r}", "lora.target_modules", did_you_mean(target, ADAPTABLE, _choice()))
        for target in targets
        if not any(_matches(name, target) for name in names)
    ]
    if faults:
        raise ArgumentError.of(faults)
    return [name for name in names if any(_matches(name, target) for target in targets)]


def tensors_to_save(settings: LoraSettings, config: Architecture, adapted: Collection[str]) -> list[str]:
    """Names of the base's tensors that are in the adapter whole: of `modules_to_save`, and biases.

    A module is saved where its name ends with one of those, even within a word (`norm`): so PEFT has it.

    Args:
        adapted: The modules with an update.
    """
    kept = []
    for name in config.shapes:
        module, _, kind = name.rpartition(".")
        own_bias = kind == "bias" and (settings.bias == "all" or (settings.bias == "lora_only" and module in adapted))
        if own_bias or any(module.endswith(target) for target in settings.modules_to_save):
            kept.append(name)
    return kept


def unties(settings: LoraSettings, config: Architecture) -> bool:
    """Whether head and embedding, one matrix in the base, are two under the adapter: one of them has its own part."""
    targets = () if isinstance(settings.target_modules, str) else settings.target_modules
    named = (*targets, *settings.modules_to_save)
    return config.tie_word_embeddings and any(_matches(end, name) for end in (EMBEDDING, HEAD) for name in named)


def _is_meant(module: str, name: str) -> bool:
    """Whether a pattern's name means a module: with ^ that one only, as PEFT has it."""
    return module == name[1:] if name.startswith("^") else _matches(module, name)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _choice() -> str:
    return f"Known are all-linear and {', '.join(ADAPTABLE)}."
