"""Adapter folders and their settings: PEFT's adapter_config.json and PaddleNLP's lora_config.json. No paddle here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finetune.errors import ArgumentError, CheckpointError, Fault, did_you_mean
from finetune.model.family import ADAPTABLE
from finetune.model.hubs.hub import parse_repo

Variant = Literal["lora", "rslora", "lora_plus", "pissa"]
LORA_PLUS_RATIO = 16.0  # B learns 16 times as fast as A: Hayou et al. 2024, arXiv:2402.12354, section 5


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is.

    Attributes:
        rank, alpha, dropout: As in LoRA; the update is scaling * B A.
        target_modules: `all-linear` (every projection of the layers; not the head) or module names, matched as PEFT
            does: the full name, or its last parts.
        variant: lora | rslora | lora_plus | pissa. On disk only lora and rslora exist: lora_plus differs in
            training only, and pissa is saved as an equivalent lora of twice the rank.
        lora_plus_ratio: How many times faster B learns than A; 16 for lora_plus when not given, else 1.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    variant: Variant = "lora"
    lora_plus_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.lora_plus_ratio is None:
            object.__setattr__(self, "lora_plus_ratio", LORA_PLUS_RATIO if self.variant == "lora_plus" else 1.0)
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        """alpha / rank; alpha / sqrt(rank) with rslora (Kalajdzievski 2023, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)

    def saved(self) -> LoraSettings:
        """The settings of the adapter on disk: a plain lora or rslora with the same update."""
        if self.variant == "pissa":
            return replace(self, rank=2 * self.rank, alpha=2 * self.alpha, variant="lora", lora_plus_ratio=1.0)
        return replace(self, variant="rslora" if self.variant == "rslora" else "lora", lora_plus_ratio=1.0)


def target_names(targets: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of the model's modules that `target_modules` asks for.

    Raises:
        ArgumentError: a name that no module has, with the nearest one.
    """
    names = list(names)
    if targets == "all-linear":
        return names
    targets = (targets,) if isinstance(targets, str) else targets
    faults = [
        Fault(f"no module is called {target!r}", "lora.target_modules", did_you_mean(target, ADAPTABLE, _choice()))
        for target in targets
        if not any(_matches(name, target) for name in names)
    ]
    if faults:
        raise ArgumentError.of(faults)
    return [name for name in names if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _choice() -> str:
    return f"Known are all-linear and {', '.join(ADAPTABLE)}."


# Keys of PEFT's LoraConfig that do not change the numbers of a loaded adapter. `True` and "gaussian" are ways of
# starting A and B; other init_lora_weights (pissa, olora, corda, ...) change the base weights as well.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_FIXES = {
    "init_lora_weights": "Let PEFT save it as a plain LoRA (path_initial_model_for_weight_conversion).",
    "bias": "Only 'none'.",
}


def parse_peft_config(raw: dict[str, Any], where: Path) -> LoraSettings:
    """Settings of a PEFT adapter; target_modules is empty where the config has a regular expression (never evaluated:
    it is a stranger's, and the tensors say the same).

    Raises:
        CheckpointError: not LoRA, or a feature that would change the numbers and is not supported; all are named.
    """
    if raw.get("peft_type") != "LORA":
        what, fix = f"peft_type is {str(raw.get('peft_type'))[:50]!r}", "Only LORA adapters are supported."
        raise CheckpointError(what, where=str(where), fix=fix)
    faults = []
    for key, value in raw.items():
        harmless = (
            key in _HARMLESS
            or not value
            or (key == "bias" and value == "none")
            or (key == "init_lora_weights" and value in _HARMLESS_INITS)
        )
        if not harmless:
            faults.append(Fault(f"{key[:50]} {str(value)[:80]!r} is not supported", str(where), _FIXES.get(key)))
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(Fault(f"task_type is {str(raw['task_type'])[:50]!r}", str(where), "Only CAUSAL_LM."))
    named = raw.get("target_modules")
    targets: str | tuple[str, ...] = ()
    if isinstance(named, str):
        targets = named if named == "all-linear" else ()
    elif raw.get("layers_to_transform") is not None or raw.get("exclude_modules"):
        targets = ()
    elif isinstance(named, list) and named and all(isinstance(target, str) for target in named):
        targets = tuple(named)
    else:
        faults.append(Fault("target_modules is not a list of names", str(where)))
    return _settings(raw, where, faults, targets, rslora=bool(raw.get("use_rslora")))


def parse_paddle_config(raw: dict[str, Any], where: Path) -> LoraSettings:
    """Settings of a PaddleNLP LoRA adapter, target_modules empty: PaddleNLP has regular expressions there.

    Raises:
        CheckpointError: a variant that PaddleNLP itself saves wrong (PiSSA, MoRA, LoRA-GA) or that is not supported.
    """
    faults = [
        Fault(f"{key} is not supported", str(where), "PaddleNLP does not save such adapters right.")
        for key in ("pissa", "use_mora", "loraga", "lora_use_mixer", "do_qat")
        if raw.get(key)
    ]
    for key in ("trainable_bias", "trainable_modules", "enable_lora_list"):
        if raw.get(key):
            faults.append(Fault(f"{key} is not supported", str(where)))
    return _settings(raw, where, faults, (), rslora=bool(raw.get("rslora")))


def _settings(
    raw: dict[str, Any], where: Path, faults: list[Fault], targets: str | tuple[str, ...], *, rslora: bool
) -> LoraSettings:
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    dropout: Any = raw.get("lora_dropout", 0.0) or 0.0
    if type(rank) is not int or not 1 <= rank <= 65536:
        faults.append(Fault(f"r is {str(rank)[:50]!r}", str(where), "A positive integer."))
    if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
        faults.append(Fault(f"lora_alpha is {str(alpha)[:50]!r}", str(where), "A number."))
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        faults.append(Fault(f"lora_dropout is {str(dropout)[:50]!r}", str(where), "A number from 0 to below 1."))
    if faults:
        raise CheckpointError.of(faults)
    return LoraSettings(rank, float(alpha), float(dropout), targets, "rslora" if rslora else "lora")


def peft_config(settings: LoraSettings, base: str, targets: list[str]) -> dict[str, Any]:
    """adapter_config.json for settings as saved (see `LoraSettings.saved`).

    Args:
        base: The base model as a hub names it, or its folder. PEFT has a key of its own for the revision on
            Hugging Face's hub, and knows no other hub.
        targets: Last names of the modules that carry the adapter.
    """
    repo = parse_repo(base, "model")
    at = repo.revision if repo and repo.hub == "hf" else None
    alpha = int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha
    return {
        "auto_mapping": None,
        "base_model_name_or_path": repo.id if repo and repo.hub == "hf" else base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": at,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": settings.variant == "rslora",
    }
