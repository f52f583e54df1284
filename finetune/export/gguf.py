"""GGUF files, as llama.cpp and what is built on it read them, by way of the `gguf` package (the extra `gguf`).

Names and metadata follow llama.cpp's convert_hf_to_gguf.py. Vectors stay float32, and a matrix whose rows are no whole
number of blocks becomes float16. What gives the logits is stored in 8 bits where the other matrices get 4 or 5: so does
llama-quantize, with Q6_K, which the package reads and cannot make (nor the other K-quants).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from finetune.chat.messages import Conversation
from finetune.chat.render import render_conversation
from finetune.chat.tokenizer import Tokenizer
from finetune.errors import CheckpointError, DataError
from finetune.export.formats import QUANTIZED
from finetune.files import new_folder
from finetune.model.family import EMBEDDING, HEAD, Architecture
from finetune.model.gguf.package import gguf_package
from finetune.model.gguf.tensors import gguf_names
from finetune.model.tensorfile import Array
from finetune.model.weights import Weight, numpy_dtype
from finetune.model.write import cast, generation_config

# By what `--dtype` calls them: the type's name in GGUF.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {name: name.upper() for name in QUANTIZED}
_FILE_KINDS = {"F32": "ALL_F32"}  # of all others: MOSTLY_ and the name


def write_gguf(
    config: Architecture,
    weights: dict[str, Weight],
    folder: str | Path,
    *,
    dtype: str,
    tokenizer: Path,
    generation: Path | None,
    name: str,
) -> None:
    """Write `folder/model-<TYPE>.gguf`, one tensor in memory at a time.

    Args:
        config: The model's description.
        weights: By Hugging Face name.
        folder: Must not exist, or be empty.
        dtype: A key of `TYPES`.
        tokenizer: Folder with the tokenizer.
        generation: The model's generation_config.json, where it has one.
        name: The model's, for display.

    Raises:
        ArgumentError: the gguf package is missing, or a weight is too large for float16.
        CheckpointError: the tokenizer cannot be read, or the folder not written.
    """
    gguf = gguf_package("--format gguf")
    with new_folder(Path(folder)) as partial:
        writer = gguf.GGUFWriter(partial / f"model-{TYPES[dtype]}.gguf", config.GGUF)
        _add_sizes(writer, gguf, config, dtype, name)
        _add_tokenizer(writer, gguf, config, tokenizer, generation)
        names, output = gguf_names(config), _output(config)
        kinds = {name: _kind(gguf, weight.shape, dtype, name == output) for name, weight in weights.items()}
        for name, weight in weights.items():
            _add_info(writer, gguf, names[name], weight.shape, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights.items():
            writer.write_tensor_data(_encoded(gguf, weight.read(), kinds[name], name))
        writer.close()


def as_stored(config: Architecture, weights: dict[str, Weight], dtype: str) -> dict[str, Weight]:
    """The weights as a file of this dtype gives them back, in float32."""
    gguf, output = gguf_package("--format gguf"), _output(config)

    def rounded(name: str, weight: Weight) -> Weight:
        kind = _kind(gguf, weight.shape, dtype, name == output)
        stored = gguf.GGMLQuantizationType[TYPES[kind]]

        def read() -> Array:
            return gguf.dequantize(_encoded(gguf, weight.read(), kind, name), stored).reshape(weight.shape)

        return Weight(np.dtype(np.float32), weight.shape, read)

    return {name: rounded(name, weight) for name, weight in weights.items()}


def _output(config: Architecture) -> str:
    """The matrix that gives the logits."""
    return f"{EMBEDDING if config.tie_word_embeddings else HEAD}.weight"


def _kind(gguf: ModuleType, shape: tuple[int, ...], dtype: str, is_output: bool) -> str:
    """What a tensor is stored as."""
    if len(shape) == 1:
        return "float32"
    if dtype not in QUANTIZED:
        return dtype
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[dtype]]]
    return "float16" if shape[-1] % block else "q8_0" if is_output else dtype


def _add_info(writer: Any, gguf: ModuleType, name: str, shape: tuple[int, ...], kind: str) -> None:
    stored = gguf.GGMLQuantizationType[TYPES[kind]]
    if kind in ("float32", "float16"):
        item = numpy_dtype(kind)
        writer.add_tensor_info(name, shape, item, int(np.prod(shape)) * item.itemsize, stored)
    else:
        size = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), stored)


def _encoded(gguf: ModuleType, array: Array, kind: str, name: str) -> Array:
    """The tensor as its bytes go into the file."""
    if kind in QUANTIZED:
        return gguf.quantize(array.astype(np.float32), gguf.GGMLQuantizationType[TYPES[kind]])
    array = np.ascontiguousarray(cast(array, kind, name))
    return array.view(np.uint8) if kind == "bfloat16" else array


def _add_sizes(writer: Any, gguf: ModuleType, config: Architecture, dtype: str, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    kind = TYPES[dtype]
    writer.add_file_type(gguf.LlamaFileType[_FILE_KINDS.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, gguf: ModuleType, config: Architecture, folder: Path, generation: Path | None) -> None:
    """Vocabulary, merges, special tokens and the chat template. Ids the tokenizer does not use become [PADn]."""
    tokenizer = Tokenizer.from_folder(folder)
    content = json.loads(tokenizer.backend.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = {number: text for text, number in content["model"]["vocab"].items()} | {
        number: token["content"] for number, token in added.items()
    }
    size, kinds = config.vocab_size, gguf.TokenType
    if max(tokens) >= size:
        what, fix = tokenizer.beyond(max(tokens), size)
        raise CheckpointError(what, where=str(folder), fix=fix)

    def kind(number: int) -> int:
        if number not in tokens:
            return kinds.UNUSED
        if number not in added:
            return kinds.NORMAL
        return kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED

    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(config.GGUF_TOKENIZER)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kind(number) for number in range(size)])
    writer.add_token_merges(merges)
    stops = generation_config(config, folder, generation).get("eos_token_id") or [tokenizer.eos_token_id]
    turn_end = _turn_end(tokenizer)
    writer.add_eos_token_id(stops[0] if turn_end is None else turn_end)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    # Left out, llama.cpp takes 11 for it, which is a comma.
    starts = [number for number, token in added.items() if token["content"] == "<|endoftext|>"]
    bos = config.bos_token_id if config.bos_token_id is not None else next(iter(starts), None)
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _turn_end(tokenizer: Tokenizer) -> int | None:
    """The token that the chat template writes after an answer; None without a template, or where it writes none."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    try:
        rendered = render_conversation(tokenizer, Conversation(messages, None, "the model's chat template"))
    except DataError:
        return None
    answer = rendered.text[slice(*rendered.spans[-1])]
    return next(
        (tokenizer.backend.token_to_id(token) for token in tokenizer.special_texts if answer.endswith(token)), None
    )
