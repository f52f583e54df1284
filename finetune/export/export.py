"""`finetune export`: any model written for other programs, adapters merged on the way, and checked where asked.

The weights go from file to file one at a time; paddle is loaded only to verify.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import ArgumentError, FinetuneError
from finetune.export.formats import FORMATS
from finetune.export.gguf import write_gguf
from finetune.files import check_new, new_folder, write_json
from finetune.model.adapted import adapted, open_adapter, short_names, stored_weights
from finetune.model.adapter_config import peft_config
from finetune.model.config import DTYPES
from finetune.model.convert import peft_name
from finetune.model.family import EMBEDDING
from finetune.model.pickled import unpickled
from finetune.model.quantize import Quantization
from finetune.model.resolve import ModelSource, resolve_model
from finetune.model.tensorfile import write_tensors
from finetune.model.write import (
    Companions,
    promise,
    read_companions,
    special_tokens,
    write_companions,
    write_hf,
    write_paddle,
)

if TYPE_CHECKING:
    from finetune.export.verify import Likeness

_WRITERS = {"hf": write_hf, "paddle": write_paddle}  # of whole models; peft and gguf have their own ways below


@dataclass(frozen=True)
class _Asked:
    """What is to be written.

    Attributes:
        format, dtype: As on the command line.
        quantization: Of the base that an adapter is merged into.
    """

    format: str
    dtype: str
    quantization: Quantization | None


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        folder: Where.
        format, dtype: As written; never `auto`.
        tensors, parameters, size: Number of tensors, of numbers in them, and bytes of all files.
        merged: What was folded in, or None.
        likeness: What the verification found; None without it.
    """

    folder: Path
    format: str
    dtype: str
    tensors: int
    parameters: int
    size: int
    merged: str | None
    likeness: Likeness | None = None


def export(
    model: str | Path,
    output_dir: str | Path,
    *,
    format: str = "hf",
    dtype: str = "auto",
    quantization: str = "none",
    verify: bool = False,
    allow_pickle: bool = False,
    say: Callable[[str], None] = print,
) -> Written:
    """Write a model in another layout or number format.

    Args:
        model: A MODEL as on the command line.
        output_dir: Must not exist, or be empty.
        format: hf, paddle, peft (the adapter alone) or gguf.
        dtype: auto (as the model is stored; what is quantized becomes float32), float32, bfloat16, float16; gguf also
            q8_0, q5_1, q5_0, q4_1, q4_0.
        quantization: Merge an adapter into its base as it is (none), or into what its codes in nf4 or int8 stand for.
        verify: Read the result back and compare its tensors, logits and predictions with the model's.
        allow_pickle: Read pickled weights too, see `finetune.model.pickled`.
        say: Where the summary goes, one line each.

    Raises:
        ArgumentError: a format or dtype that does not exist or does not go with the model.
        CheckpointError: the model cannot be read, or the folder not written.
        FinetuneError: what was written differs from the model by more than its number format explains.
    """
    output_dir, asked = Path(output_dir), _Asked(format, dtype, Quantization.named(quantization))
    if allow_pickle:
        with unpickled(model, output_dir.absolute().parent) as source:
            return _export(source, output_dir, asked, verify, say)
    return _export(resolve_model(model), output_dir, asked, verify, say)


def _export(source: ModelSource, output_dir: Path, asked: _Asked, verify: bool, say: Callable[[str], None]) -> Written:
    _check(source, asked)
    check_new(output_dir)
    if beyond := _tokens_beyond(source):
        say(beyond)
    written = _write(source, output_dir, asked)
    say(_summary(written))
    if not verify:
        return written
    from finetune.export.verify import compare

    likeness = compare(source, output_dir, written.format, written.dtype, asked.quantization)
    if likeness.faults:
        raise FinetuneError(
            "; ".join(likeness.faults),
            where=str(output_dir),
            fix="Do not use what was written" + ("; try --dtype float32." if written.dtype != "float32" else "."),
        )
    say(str(likeness))
    return replace(written, likeness=likeness)


def _tokens_beyond(source: ModelSource) -> str:
    """A warning where the tokenizer has tokens that the model has no embedding for."""
    largest = max(special_tokens(source.tokenizer_folder).items(), key=lambda item: item[1], default=("", -1))
    if largest[1] < source.config.vocab_size:
        return ""
    what, fix = Tokenizer.from_folder(source.tokenizer_folder).beyond(largest[1], source.config.vocab_size)
    return f"Warning: {what}. {fix}"


def _check(source: ModelSource, asked: _Asked) -> None:
    """Refuse what does not exist, or does not go with this model."""
    format, dtype = asked.format, asked.dtype
    if format not in FORMATS:
        raise ArgumentError(f"is {format!r}", where="--format", fix=f"One of {', '.join(FORMATS)}.")
    known = ("auto", *FORMATS[format])
    if dtype not in known:
        raise ArgumentError(f"is {dtype!r}", where="--dtype", fix=f"With --format {format}: {', '.join(known)}.")
    if format == "peft" and source.lora is None:
        fix = "Use --format hf or paddle; peft is for models trained with LoRA."
        raise ArgumentError(f"{source.name} is a whole model, not an adapter", where="--format", fix=fix)
    if asked.quantization is not None and (format == "peft" or source.lora is None):
        what = f"is {asked.quantization.kind}, but nothing is merged here"
        fix = "Leave it out: it says which base an adapter is merged into."
        raise ArgumentError(what, where="--quantization", fix=fix)


def _write(source: ModelSource, folder: Path, asked: _Asked) -> Written:
    format, dtype = asked.format, asked.dtype
    if format == "peft":
        return _write_peft(source, folder, dtype)
    weights = stored_weights(source, asked.quantization)
    if dtype == "auto":
        stored = weights[f"{EMBEDDING}.weight"].dtype.name
        dtype = stored if stored in DTYPES else "float32"
    if format == "gguf":
        name, tokenizer, generation = Path(source.name).name, source.tokenizer_folder, source.generation_file
        write_gguf(source.config, weights, folder, dtype=dtype, tokenizer=tokenizer, generation=generation, name=name)
    else:
        _WRITERS[format](source.config, weights, folder, dtype=dtype, tokenizer=_companions(source))
    merged = None
    if source.base and source.lora:
        merged = f"adapter of rank {source.lora.rank} merged into {source.base.name}"
        merged += f" as its {asked.quantization.kind} codes have it" if asked.quantization else ""
    return _written(folder, format, dtype, [weight.shape for weight in weights.values()], merged)


def _write_peft(source: ModelSource, folder: Path, dtype: str) -> Written:
    """An adapter of either layout, as PEFT has it."""
    (adapter, settings), base = open_adapter(source), source.base or source
    if dtype == "auto":
        dtype = next(iter(adapter.values())).dtype.name
    modules = adapted(adapter)
    tensors = {peft_name(name, modules): promise(weight, name, dtype) for name, weight in adapter.items()}
    targets = short_names(modules, source.config.adaptable)
    with new_folder(folder) as partial:
        write_tensors(partial / "adapter_model.safetensors", tensors, {"format": "pt"})
        write_json(partial / "adapter_config.json", peft_config(settings, base.hub_or_folder, targets))
        write_companions(partial, source.config, _companions(source))
    return _written(folder, "peft", dtype, [weight.shape for weight in adapter.values()], None)


def _companions(source: ModelSource) -> Companions:
    """An adapter may have a tokenizer of its own and leave the generation config to its base."""
    return read_companions(source.config, source.tokenizer_folder, source.generation_file)


def _written(folder: Path, format: str, dtype: str, shapes: list[tuple[int, ...]], merged: str | None) -> Written:
    size = sum(path.stat().st_size for path in folder.iterdir())
    return Written(folder, format, dtype, len(shapes), sum(map(prod, shapes)), size, merged)


def _summary(written: Written) -> str:
    gib = written.size / 2**30
    size = f"{gib:.2f} GiB" if gib >= 1 else f"{written.size / 2**20:.1f} MiB"
    merged = f", {written.merged}" if written.merged else ""
    return (
        f"Wrote {written.folder} ({written.format}): {written.tensors} tensors, {written.parameters:,} parameters, "
        f"{written.dtype}, {size}{merged}."
    )
