"""config.json of a model: checked, completed with the defaults, and written for every reader. No paddle here."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError, Fault, did_you_mean
from finetune.files import read_json
from finetune.model.family import FAMILIES, Architecture, supported

_GENERATION = {
    "do_sample": ((bool,), 0, 1),
    "temperature": ((int, float), 0, 1e6),
    "top_p": ((int, float), 0, 1),
    "min_p": ((int, float), 0, 1),
    "top_k": ((int,), 0, 2**31),
    "repetition_penalty": ((int, float), 1e-3, 1e3),
    "max_new_tokens": ((int,), 1, 2**31),
    "max_length": ((int,), 1, 2**31),
    "min_new_tokens": ((int,), 0, 2**31),
    "num_return_sequences": ((int,), 1, 4096),
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = ("float32", "float16", "bfloat16")


def read_config(raw: dict[str, Any], where: Path) -> Architecture:
    """Check a config.json and describe the model, all faults at once. Keys that change nothing are left out.

    Raises:
        CheckpointError: of no family that is supported, a value of the wrong type or size, or a feature that is not
            supported.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(f"model_type is {str(model_type)[:50]!r}", where=str(where), fix=supported())
    faults: list[Fault] = []
    values = _sizes(family, raw, where, faults) | _shares(family, raw, where, faults)
    values["tie_word_embeddings"] = tied = raw.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        faults.append(Fault(f"tie_word_embeddings is {str(tied)[:50]!r}", str(where), "true or false."))
    for name in _TOKENS:
        found = raw.get(name)
        values[name] = tuple(found) if isinstance(found, list) else found
    faults += _wrong_tokens(raw, where)
    values["dtype"] = _dtype(raw, where, faults)
    values["rope_theta"] = _rope_theta(raw, where, faults)
    config = family(**values)
    faults += _unsupported(raw, config, where)
    if faults:
        raise CheckpointError.of(faults)
    return config


def _sizes(family: type[Architecture], raw: dict[str, Any], where: Path, faults: list[Fault]) -> dict[str, Any]:
    """The integers; 1 for those that are wrong, so that the rest can be checked."""
    values: dict[str, Any] = {}
    for name, (default, largest) in family.sizes().items():
        if name == "num_key_value_heads":
            default = raw.get("num_attention_heads", default)
        values[name] = value = default if raw.get(name) is None else raw[name]
        if type(value) is not int or not 1 <= value <= largest:
            faults.append(Fault(f"{name} is {str(value)[:50]!r}", str(where), f"An integer from 1 to {largest}."))
            values[name] = 1
    return values


def _shares(family: type[Architecture], raw: dict[str, Any], where: Path, faults: list[Fault]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, default in family.shares().items():
        values[name] = value = raw.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            faults.append(Fault(f"{name} is {str(value)[:50]!r}", str(where), "A number from 0 to 1."))
    return values


def _wrong_tokens(raw: dict[str, Any], where: Path) -> list[Fault]:
    faults = []
    for name in _TOKENS:
        value = raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids) or (
            name != "eos_token_id" and ids is value
        ):
            faults.append(Fault(f"{name} is {str(value)[:50]!r}", str(where), "A token id, or null."))
    return faults


def read_generation_config(path: Path) -> dict[str, Any]:
    """Read and check a generation_config.json; keys that nobody here reads may hold anything.

    Raises:
        CheckpointError: not a JSON object, or a token id or a setting of the wrong type or out of range.
    """
    raw = read_json(path)
    faults = _wrong_tokens(raw, path)
    for name, (kinds, low, high) in _GENERATION.items():
        value = raw.get(name)
        if value is not None and (type(value) not in kinds or not low <= value <= high):
            faults.append(Fault(f"{name} is {str(value)[:50]!r}", str(path), f"From {low:g} to {high:g}."))
    if faults:
        raise CheckpointError.of(faults)
    return raw


def _dtype(raw: dict[str, Any], where: Path, faults: list[Fault]) -> str | None:
    value = raw.get("dtype") or raw.get("torch_dtype")  # transformers 5, transformers 4
    if value is None or value in DTYPES:
        return value
    fix = did_you_mean(str(value), DTYPES, f"One of {', '.join(DTYPES)}.")
    faults.append(Fault(f"dtype is {str(value)[:50]!r}", str(where), fix))
    return None


def _rope_theta(raw: dict[str, Any], where: Path, faults: list[Fault]) -> float:
    """The base of the rotary embedding: in `rope_parameters` (transformers 5) or `rope_theta` (4)."""
    parameters = raw.get("rope_parameters")
    places = (parameters if isinstance(parameters, dict) else {}, raw)
    values = [place["rope_theta"] for place in places if place.get("rope_theta") is not None] or [10000.0]
    for value in values:
        if type(value) not in (int, float) or not 1 < value < 1e12:
            faults.append(Fault(f"rope_theta is {str(value)[:50]!r}", str(where), "A number above 1."))
    if values[0] != values[-1]:
        both = " and ".join(str(value)[:50] for value in values)
        faults.append(Fault(f"rope_theta has two values: {both}", str(where), "Keep the right one."))
    return values[0]


def _unsupported(raw: dict[str, Any], config: Architecture, where: Path) -> list[Fault]:
    """Features that would change the numbers and that nothing here computes."""
    faults: list[Fault] = []

    def refuse(what: str, fix: str | None = None) -> None:
        faults.append(Fault(f"{what} is not supported", str(where), fix))

    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind not in (None, "default"):
            refuse(f"{name} of type {str(kind)[:50]!r}", "Only the plain rotary embedding is.")
        if isinstance(rope, dict) and rope.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(f"{name}.partial_rotary_factor")
    if raw.get("rope_scaling_type") not in (None, "default"):  # PaddleNLP's own key
        refuse(f"rope_scaling_type {str(raw['rope_scaling_type'])[:50]!r}")
    layers = raw.get("layer_types")
    if raw.get("use_sliding_window") or (isinstance(layers, list) and set(map(str, layers)) - {"full_attention"}):
        refuse("sliding window attention", "use_sliding_window must be false.")
    if raw.get("hidden_act", config.ACTIVATION) != config.ACTIVATION:
        refuse(f"hidden_act {str(raw['hidden_act'])[:50]!r}", f"Only {config.ACTIVATION} is.")
    if quantized := _odd_quantization(raw.get("quantization_config")):
        refuse(*quantized)
    for fused in ("fuse_attention_qkv", "fuse_attention_ffn"):
        if raw.get(fused):
            refuse(f"{fused} (projections stored as one matrix)", "Save the model with it switched off.")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        refuse(f"{heads} heads with {groups} key-value heads", "The one must be a multiple of the other.")
    for what, fix in config.refused(raw):
        refuse(what, fix)
    return faults


def _odd_quantization(found: Any) -> tuple[str, str] | None:
    """What of a quantization_config is not read, and what to do. PaddleNLP gives every model one, with no algorithm."""
    if not found or (isinstance(found, dict) and found.get("weight_quantize_algo", "") is None):
        return None
    if not isinstance(found, dict) or found.get("quant_method") != "bitsandbytes":
        return "a quantized model", "Use the original one."
    kind = found.get("bnb_4bit_quant_type", "fp4") if found.get("load_in_4bit") else "8-bit"
    if kind == "nf4":
        return None
    fix = "Take the original model with model.quantization (--quantization) nf4 or int8; of these only nf4 is read."
    return f"a model that bitsandbytes quantized to {str(kind)[:20]}", fix


def _stored(config: Architecture) -> dict[str, Any]:
    """What config.json says of the model in every layout. `head_dim` is not among it where it follows from the rest."""
    values = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "dtype"}
    if "head_dim" not in config.sizes():
        del values["head_dim"]
    values["eos_token_id"] = list(eos) if isinstance(eos := config.eos_token_id, tuple) else eos
    return values | {
        "architectures": [config.ARCHITECTURE],
        "model_type": config.MODEL_TYPE,
        "hidden_act": config.ACTIVATION,
    }


def hf_config(config: Architecture, dtype: str) -> dict[str, Any]:
    """config.json as transformers 4 and 5 both read it: every fact under its old and its new name.

    Args:
        dtype: Of the weights written beside it.
    """
    return _stored(config) | {
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "max_window_layers": config.num_hidden_layers,
        "sliding_window": None,
        "use_sliding_window": False,
        "use_cache": True,
    }


def paddle_config(config: Architecture, dtype: str) -> dict[str, Any]:
    """config.json as PaddleNLP reads it. It knows one end token; the others go to generation_config.json."""
    stored = _stored(config) | {"eos_token_id": next(iter(config.eos_token_ids), None)}
    known = {key: value for key, value in stored.items() if value is not None}
    return known | {"dtype": dtype, "use_sliding_window": False, "paddlenlp_version": None}
