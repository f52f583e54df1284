"""config.json of a Qwen2 model: checked, completed with the defaults, and written for every reader. No paddle here."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import CheckpointError, Fault, did_you_mean
from finetune.files import read_json

# Name, default (transformers' and PaddleNLP's agree), smallest, largest. The bounds keep a hostile file from asking
# for more than any Qwen2 needs; the tensors themselves are compared with these numbers before anything is built.
_SIZES = {
    "vocab_size": (151936, 1, 2**24),
    "hidden_size": (4096, 1, 2**20),
    "intermediate_size": (22016, 1, 2**22),
    "num_hidden_layers": (32, 1, 1024),
    "num_attention_heads": (32, 1, 4096),
    "num_key_value_heads": (32, 1, 4096),
    "max_position_embeddings": (32768, 1, 2**31),
}
_NUMBERS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.0}
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


def read_config(raw: dict, where: Path) -> dict:
    """Check a config.json and return the facts of the model, all faults at once.

    Returns:
        `architectures, model_type, vocab_size, hidden_size, ..., rope_theta, tie_word_embeddings`, token ids as found,
        and `dtype` (None where the file does not say). Keys that change nothing for Qwen2 are left out.

    Raises:
        CheckpointError: not a Qwen2 model, a value of the wrong type or size, or a feature that is not supported.
    """
    model_type = raw.get("model_type")
    if model_type != "qwen2":
        fix = "Qwen2 and Qwen2.5 models (model_type 'qwen2') are supported."
        raise CheckpointError(f"model_type is {str(model_type)[:50]!r}", where=str(where), fix=fix)
    faults: list[Fault] = []
    config: dict = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    for name, (default, low, high) in _SIZES.items():
        config[name] = value = default if raw.get(name) is None else raw[name]
        if name == "num_key_value_heads" and raw.get(name) is None:
            config[name] = value = raw.get("num_attention_heads", default)
        if type(value) is not int or not low <= value <= high:
            faults.append(Fault(f"{name} is {str(value)[:50]!r}", str(where), f"An integer from {low} to {high}."))
            config[name] = 1
    for name, default in _NUMBERS.items():
        config[name] = value = raw.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            faults.append(Fault(f"{name} is {str(value)[:50]!r}", str(where), "A number from 0 to 1."))
    tied = config["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        faults.append(Fault(f"tie_word_embeddings is {str(tied)[:50]!r}", str(where), "true or false."))
    config |= {name: raw.get(name) for name in _TOKENS}
    faults += _wrong_tokens(raw, where)
    config["dtype"] = _dtype(raw, where, faults)
    config["rope_theta"] = _rope_theta(raw, where, faults)
    faults += _unsupported(raw, config, where)
    if faults:
        raise CheckpointError.of(faults)
    return config


def _wrong_tokens(raw: dict, where: Path) -> list[Fault]:
    faults = []
    for name in _TOKENS:
        value = raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids) or (
            name != "eos_token_id" and ids is value
        ):
            faults.append(Fault(f"{name} is {str(value)[:50]!r}", str(where), "A token id, or null."))
    return faults


def read_generation_config(path: Path) -> dict:
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


def _dtype(raw: dict, where: Path, faults: list[Fault]) -> str | None:
    value = raw.get("dtype") or raw.get("torch_dtype")  # transformers 5, transformers 4
    if value is None or value in DTYPES:
        return value
    fix = did_you_mean(str(value), DTYPES, f"One of {', '.join(DTYPES)}.")
    faults.append(Fault(f"dtype is {str(value)[:50]!r}", str(where), fix))
    return None


def _rope_theta(raw: dict, where: Path, faults: list[Fault]) -> float:
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


def _unsupported(raw: dict, config: dict, where: Path) -> list[Fault]:
    """Features that would change the numbers and that PaddleNLP's Qwen2 does not compute."""
    faults = []

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
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {str(raw['hidden_act'])[:50]!r}", "Qwen2 uses silu.")
    quantized = raw.get("quantization_config")  # PaddleNLP gives every model one, with no algorithm in it
    if quantized and not (isinstance(quantized, dict) and quantized.get("weight_quantize_algo", "") is None):
        refuse("a quantized model", "Use the original one.")
    if raw.get("attention_bias") is False or raw.get("mlp_bias"):
        refuse("another choice of biases than Qwen2's")
    for fused in ("fuse_attention_qkv", "fuse_attention_ffn"):
        if raw.get(fused):
            refuse(f"{fused} (projections stored as one matrix)", "Save the model with it switched off.")
    hidden, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    if hidden % heads or (hidden // heads) % 2:
        refuse(f"hidden_size {hidden} with {heads} heads", "Each head needs an even number of dimensions.")
    if heads % groups:
        refuse(f"{heads} heads with {groups} key-value heads", "The one must be a multiple of the other.")
    if raw.get("head_dim") is not None and raw["head_dim"] != hidden // heads:
        refuse(f"head_dim {str(raw['head_dim'])[:50]} other than hidden_size / heads")
    return faults


def hf_config(config: dict, dtype: str) -> dict:
    """config.json as transformers 4 and 5 both read it: every fact under its old and its new name.

    Args:
        config: As `read_config` returns it.
        dtype: Of the weights written beside it.
    """
    rope = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    shared = {key: value for key, value in config.items() if key != "dtype"}
    return shared | {
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_parameters": rope,
        "max_window_layers": config["num_hidden_layers"],
        "sliding_window": None,
        "use_sliding_window": False,
        "use_cache": True,
    }


def paddle_config(config: dict, dtype: str) -> dict:
    """config.json as PaddleNLP reads it."""
    shared = {key: value for key, value in config.items() if value is not None and key != "dtype"}
    eos = config["eos_token_id"]
    if isinstance(eos, list):  # PaddleNLP's config takes one; the list goes to generation_config.json
        shared["eos_token_id"] = eos[0]
    return shared | {"dtype": dtype, "use_sliding_window": False, "paddlenlp_version": None}
