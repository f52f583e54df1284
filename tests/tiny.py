"""Tiny Qwen2 folders made on the spot from a seed, for tests. No paddle, no torch.

    folder = tiny_model(tmp_path / "base")                       # tied, float32, one file, with a tokenizer
    folder = tiny_model(tmp_path / "big", tied=False, dtype="bfloat16", max_shard_bytes=20_000, rope="parameters")
    folder = tiny_model(tmp_path / "wide", shape=Shape(hidden_size=64, num_hidden_layers=4))

The layout is that of Hugging Face's Qwen2 folders. Weights are scaled so that logits spread by a few units and greedy
choices are far from ties; biases and norms are not trivial, so that a dropped one shows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGED_VOCAB_SIZE = 400  # 256 bytes and 144 merges; the special tokens follow: 400, 401, 402
TEXT = (
    "You are a helpful assistant. The user asks a question and the assistant answers it. system user assistant tool\n"
    "What is the sum of 12 and 30? The sum of 12 and 30 is 42. Please write the word backwards. Thank you very much.\n"
    "一个人在路上走。今天天气很好。 The quick brown fox jumps over the lazy dog, again and again and again.\n"
)
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Shape:
    """The size of a tiny model. The vocabulary is larger than the tokenizer's, as in the real Qwen2."""

    vocab_size: int = 416
    hidden_size: int = 32
    intermediate_size: int = 48
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512


def tiny_model(
    folder: str | Path,
    *,
    shape: Shape = Shape(),
    tied: bool = True,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
    rope: str = "theta",
    rope_theta: float = 1000000.0,
    tokenizer: bool = True,
) -> Path:
    """Write a whole model folder: config, weights, generation config and (if asked) the tokenizer.

    Args:
        folder: Where to; made if missing.
        tied: Whether the output head is the embedding matrix.
        dtype: float32, float16 or bfloat16: how the weights are stored.
        max_shard_bytes: Split into shards of about this size, with an index.
        rope: `theta` (transformers 4 writes `rope_theta`), `parameters` (transformers 5 writes `rope_parameters`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", tiny_config(shape, tied=tied, dtype=dtype, rope=rope, rope_theta=rope_theta))
    write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": [402, 400], "pad_token_id": 400})
    write_weights(folder, tiny_weights(shape, tied=tied, seed=seed, dtype=dtype), max_shard_bytes)
    if tokenizer:
        tiny_tokenizer(folder)
    return folder


def tiny_config(shape: Shape = Shape(), *, tied=True, dtype="float32", rope="theta", rope_theta=1000000.0) -> dict:
    """config.json of a tiny Qwen2, as transformers 4 or (rope="parameters") 5 writes it."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 400,
        "eos_token_id": 402,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": shape.num_hidden_layers,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
        **asdict(shape),
    }
    if rope == "parameters":
        return config | {"dtype": dtype, "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"}}
    return config | {"torch_dtype": dtype, "rope_theta": rope_theta}


def tiny_weights(shape: Shape = Shape(), *, tied=True, seed=0, dtype="float32") -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names, Linear weights as [out, in]."""
    random = np.random.default_rng(seed)
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads

    def normal(*size: int, std: float) -> np.ndarray:
        return (random.standard_normal(size) * std).astype(np.float32).astype(_DTYPES[dtype])

    def norm() -> np.ndarray:
        return (1 + 0.1 * random.standard_normal(hidden)).astype(np.float32).astype(_DTYPES[dtype])

    weights = {"model.embed_tokens.weight": normal(shape.vocab_size, hidden, std=0.4)}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = norm()
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            weights[f"{prefix}.self_attn.{name}.weight"] = normal(rows, hidden, std=hidden**-0.5)
            weights[f"{prefix}.self_attn.{name}.bias"] = normal(rows, std=0.2)
        weights[f"{prefix}.self_attn.o_proj.weight"] = normal(hidden, hidden, std=hidden**-0.5)
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm()
        weights[f"{prefix}.mlp.gate_proj.weight"] = normal(ffn, hidden, std=hidden**-0.5)
        weights[f"{prefix}.mlp.up_proj.weight"] = normal(ffn, hidden, std=hidden**-0.5)
        weights[f"{prefix}.mlp.down_proj.weight"] = normal(hidden, ffn, std=ffn**-0.5)
    weights["model.norm.weight"] = norm()
    if not tied:
        weights["lm_head.weight"] = normal(shape.vocab_size, hidden, std=0.4)
    return weights


def write_weights(folder: Path, weights: dict[str, np.ndarray], max_shard_bytes: int | None = None) -> None:
    """Write safetensors: one file, or shards with an index."""
    if max_shard_bytes is None:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def tiny_tokenizer(folder: str | Path) -> Path:
    """Write a byte-level BPE tokenizer of Qwen2's kind: 400 tokens, three special ones, the ChatML template."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED_VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt, as the Qwen2 folders have them
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    return folder


def _tokenizer_config(tokenizer) -> dict:
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file the way Hugging Face writes them."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
