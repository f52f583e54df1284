"""GGUF files, as llama.cpp and what is built on it read them, by way of the `gguf` package (the extra `gguf`).

Names and metadata follow llama.cpp's convert_hf_to_gguf.py for Qwen2: vectors stay float32, a matrix whose rows are no
multiple of 32 is stored as float16 where Q8_0 was asked for.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import ArgumentError, CheckpointError
from finetune.files import new_folder
from finetune.model.family import Architecture
from finetune.model.weights import Weight, numpy_dtype
from finetune.model.write import cast, generation_config

_BLOCK = 32  # Q8_0: 32 numbers share a scale
_FILE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


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
    """Write `folder/model-<DTYPE>.gguf`, one tensor in memory at a time.

    Args:
        config: The model's description.
        weights: By Hugging Face name.
        folder: Must not exist, or be empty.
        dtype: float32, float16, bfloat16 or q8_0.
        tokenizer: Folder with the tokenizer.
        generation: The model's generation_config.json, where it has one.
        name: The model's, for display.

    Raises:
        ArgumentError: the gguf package is missing, or a weight is too large for float16.
        CheckpointError: the tokenizer cannot be read, or the folder not written.
    """
    gguf = _package()
    with new_folder(Path(folder)) as partial:
        writer = gguf.GGUFWriter(partial / f"model-{_FILE_NAMES[dtype]}.gguf", config.GGUF)
        _add_sizes(writer, gguf, config, dtype, name)
        _add_tokenizer(writer, gguf, config, tokenizer, generation)
        names = _names(gguf, config)
        kinds = {name: _kind(name, weight.shape, dtype) for name, weight in weights.items()}
        for name, weight in weights.items():
            kind = gguf.GGMLQuantizationType[_FILE_NAMES[kinds[name]]]
            shape = gguf.quant_shape_to_byte_shape(weight.shape, kind) if kinds[name] in ("q8_0", "bfloat16") else None
            if shape is None:
                item = numpy_dtype(kinds[name])
                size = int(np.prod(weight.shape)) * item.itemsize
                writer.add_tensor_info(names[name], weight.shape, item, size, kind)
            else:
                writer.add_tensor_info(names[name], shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights.items():
            writer.write_tensor_data(_encoded(gguf, weight.read(), kinds[name], name))
        writer.close()


def read_gguf(config: Architecture, folder: Path) -> dict[str, Weight]:
    """The weights of a file that `write_gguf` wrote, made float32 again, by Hugging Face name.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    gguf = _package()
    path = next(folder.glob("*.gguf"))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names, shapes = _names(gguf, config), config.shapes
    if set(tensors) != set(names.values()):
        raise CheckpointError(f"tensors differ: {sorted(set(tensors) ^ set(names.values()))[:5]}", where=str(path))

    def weight(name: str) -> Weight:
        tensor = tensors[names[name]]
        if tuple(int(size) for size in tensor.shape[::-1]) != shapes[name]:
            raise CheckpointError(f"tensor {tensor.name!r} has shape {list(tensor.shape)}", where=str(path))
        read = lambda: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])  # noqa: E731
        return Weight(np.dtype(np.float32), shapes[name], read)

    return {name: weight(name) for name in shapes}


def _package():
    try:
        import gguf
    except ImportError as error:
        fix = "Install it: pip install 'paddle-finetune[gguf]'."
        raise ArgumentError("the gguf package is not installed", where="--format gguf", fix=fix) from error
    return gguf


def _names(gguf, config: Architecture) -> dict[str, str]:
    """Hugging Face name -> GGUF name."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == config.GGUF)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    return {name: table.get_name(name, (".weight", ".bias")) for name in config.shapes}


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1:
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % _BLOCK else dtype


def _encoded(gguf, array: np.ndarray, kind: str, name: str) -> np.ndarray:
    """The tensor as its bytes go into the file."""
    if kind == "q8_0":
        return gguf.quantize(array.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    array = np.ascontiguousarray(cast(array, kind, name))
    return array.view(np.uint8) if kind == "bfloat16" else array


def _add_sizes(writer, gguf, config: Architecture, dtype: str, name: str) -> None:
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
    kind = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[dtype]
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer, gguf, config: Architecture, folder: Path, generation: Path | None) -> None:
    """Vocabulary, merges, special tokens and the chat template. Ids the tokenizer does not use become [PADn]."""
    tokenizer = Tokenizer.from_folder(folder)
    content = json.loads(tokenizer.backend.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens = {number: text for text, number in content["model"]["vocab"].items()} | {
        number: token["content"] for number, token in added.items()
    }
    size, kinds = config.vocab_size, gguf.TokenType
    if max(tokens) >= size:
        raise CheckpointError(f"the tokenizer has ids up to {max(tokens)}, the model knows {size}", where=str(folder))

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
    writer.add_eos_token_id(stops[0])
    # Left out, llama.cpp takes 11 for it, which is a comma.
    starts = [number for number, token in added.items() if token["content"] == "<|endoftext|>"]
    bos = config.bos_token_id if config.bos_token_id is not None else next(iter(starts), None)
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
