"""Adapters' settings in files: PEFT's adapter_config.json and PaddleNLP's lora_config.json. No paddle here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError, Fault
from finetune.model.adapters import LoraSettings
from finetune.model.hubs.hub import parse_repo

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
    "use_dora",
    "use_rslora",
}
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_FIXES = {
    "init_lora_weights": "Let PEFT save it as a plain LoRA (path_initial_model_for_weight_conversion).",
}
# What the numbers depend on and `_parts_of_peft` reads.
_READ = {"alpha_pattern", "bias", "modules_to_save", "rank_pattern"}
_WAY_OUT = "Merge it in PEFT (model.merge_and_unload()), save the whole model there, and name that one."
# Kinds of PEFT that put vectors before the tokens, or into attention, where there are no weights to merge with.
_PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
    "ADAPTION_PROMPT",
)
_NAME = re.compile(r"\^?[\w.]+", re.ASCII)


def parse_peft_config(raw: dict[str, Any], where: Path) -> LoraSettings:
    """Settings of a PEFT adapter; target_modules is empty where the config has a regular expression (never evaluated:
    it is a stranger's, and the tensors say the same).

    Raises:
        CheckpointError: not LoRA, or a feature that would change the numbers and is not supported; all are named.
    """
    if raw.get("peft_type") != "LORA":
        kind = str(raw.get("peft_type"))[:50]
        fix = "Only LORA adapters are supported." + ("" if kind in ("None", *_PROMPTS) else f" {_WAY_OUT}")
        raise CheckpointError(f"peft_type is {kind!r}", where=str(where), fix=fix)
    faults = []
    for key, value in raw.items():
        harmless = (
            key in _HARMLESS | _READ
            or not value
            or (key == "init_lora_weights" and isinstance(value, str | bool) and value in _HARMLESS_INITS)
        )
        if not harmless:
            fix = _FIXES.get(key, _WAY_OUT)
            faults.append(Fault(f"{key[:50]} {str(value)[:80]!r} is not supported", str(where), fix))
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(Fault(f"task_type is {str(raw['task_type'])[:50]!r}", str(where), "Only CAUSAL_LM."))
    named = raw.get("target_modules")
    targets: str | tuple[str, ...] = ()
    if isinstance(named, str):
        targets = named if named == "all-linear" else ()
    elif raw.get("layers_to_transform") is not None or raw.get("exclude_modules") or raw.get("ensure_weight_tying"):
        targets = ()
    elif isinstance(named, list) and named and all(isinstance(target, str) for target in named):
        targets = tuple(named)
    else:
        faults.append(Fault("target_modules is not a list of names", str(where)))
    parts = _parts_of_peft(raw, where, faults)
    return replace(_settings(raw, where, faults, targets, rslora=bool(raw.get("use_rslora"))), **parts)


def _parts_of_peft(raw: dict[str, Any], where: Path, faults: list[Fault]) -> dict[str, Any]:
    """What an adapter has beside one low-rank update for each module."""
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in saved):
        faults.append(Fault(f"modules_to_save is {str(saved)[:80]!r}", str(where), "A list of module names."))
        saved = []
    bias = raw.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        faults.append(Fault(f"bias is {str(bias)[:50]!r}", str(where), "One of none, all, lora_only."))
    patterns: dict[str, dict[str, Any]] = {}
    for key, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        pattern = raw.get(key) or {}
        good = isinstance(pattern, dict) and all(
            type(value) in kinds and 0 < value <= 65536 for value in pattern.values()
        )
        if not good:
            faults.append(Fault(f"{key} is {str(pattern)[:80]!r}", str(where), "Module names with positive numbers."))
        elif not all(_NAME.fullmatch(name) for name in pattern):
            faults.append(Fault(f"{key} has regular expressions, which are not evaluated", str(where), _WAY_OUT))
        patterns[key] = pattern if good else {}
    dora = bool(raw.get("use_dora"))
    variant = {"variant": "dora"} if dora and not raw.get("use_rslora") else {}
    return patterns | variant | {"modules_to_save": tuple(saved), "bias": bias, "dora": dora}


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
    return {
        "auto_mapping": None,
        "base_model_name_or_path": repo.id if repo and repo.hub == "hf" else base,
        "bias": settings.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _short(settings.alpha),
        "lora_dropout": settings.dropout,
        "modules_to_save": list(settings.modules_to_save) or None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": {name: _short(alpha) for name, alpha in settings.alpha_pattern.items()},
        "revision": at,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": settings.dora,
        "use_rslora": settings.variant == "rslora",
    }


def _short(number: float) -> float:
    return int(number) if float(number).is_integer() else number
