"""What the user calls MODEL, found: hub id, model or adapter folder, checkpoint, run's folder. No paddle here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.errors import CheckpointError, nearest
from finetune.files import read_json
from finetune.model.adapter_config import parse_paddle_config, parse_peft_config
from finetune.model.adapters import LoraSettings
from finetune.model.config import read_config
from finetune.model.convert import parse_adapter_name
from finetune.model.family import EMBEDDING, FAMILIES, HEAD, Architecture
from finetune.model.gguf.container import parts_of
from finetune.model.gguf.describe import companions
from finetune.model.gguf.package import gguf_package
from finetune.model.hubs.fetch import fetch
from finetune.model.hubs.hub import parse_repo
from finetune.model.tensorfile import TensorFolder

MODEL_STEMS = ("model", "model_state")
PEFT_STEMS = ("adapter_model",)
PADDLE_LORA_STEMS = ("peft_model", "lora_model_state")
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja")
_STEP = re.compile(r"step-(\d+)")
_PICKLES = ("*.pdparams", "*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class ModelSource:
    """A model or adapter on disk, with its config read and checked.

    Attributes:
        kind: `hf` or `paddle` (a whole model in that layout), or `adapter`.
        folder: Where its files are.
        base: The model an adapter belongs to; None for a whole model.
        config: The model's description; of the base under its adapter for one.
        name: What the user called it.
        layout: `hf`, `paddle` or `gguf`; for an adapter `peft` or `paddle`.
        stem: Name of the tensor file or index, before `.safetensors`.
        gguf: The file with the weights (of several: the first), and `folder` has what stands in it besides.
        lora: An adapter's settings; None for a whole model.
        base_name: What the adapter's config calls its base, for writing the adapter again.
    """

    kind: str
    folder: Path
    base: ModelSource | None
    config: Architecture
    name: str
    layout: str
    stem: str
    lora: LoraSettings | None = None
    base_name: str | None = None
    gguf: Path | None = None

    @property
    def place(self) -> Path:
        """The file or folder with the weights, for messages and for other programs."""
        return self.gguf or self.folder

    @property
    def weight_files(self) -> list[Path]:
        """The files with the weights, of an adapter its own."""
        return parts_of(self.gguf) if self.gguf else sorted(self.folder.glob("*.safetensors"))

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer: the adapter's own where it has one, as runs write it, else the base's."""
        if self.base and not any((self.folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
            return self.base.tokenizer_folder
        return self.folder

    @property
    def generation_file(self) -> Path | None:
        """generation_config.json: the adapter's own where it has one, else the base's; None where there is none."""
        file = self.folder / "generation_config.json"
        return file if file.is_file() else self.base.generation_file if self.base else None

    @property
    def hub_or_folder(self) -> str:
        """How an adapter trained on this model names it: as a hub names it, or the absolute folder."""
        repo = None if os.path.exists(os.path.expanduser(self.name)) else parse_repo(self.name, "model")
        return str(repo or self.place.resolve())


def resolve_model(name: str | Path) -> ModelSource:
    """Find a model and read its config; weights are not read.

    Args:
        name: Hub id (`PREFIX:OWNER/NAME@REVISION`, prefix and revision may be absent), folder with a model or an
            adapter in any layout, checkpoint folder, run folder, or GGUF file.

    Raises:
        CheckpointError: not found, incomplete, damaged, of another kind, or pickled; the message says what to do.
    """
    name = str(name)
    folder = Path(os.path.expanduser(name))
    if not name or "\0" in name:
        raise CheckpointError("the model's name is empty or has a NUL character", where=repr(name))
    if os.path.isdir(folder):  # unlike Path.is_dir, never raises
        return _from_folder(folder, name)
    if os.path.isfile(folder) and folder.suffix == ".gguf":
        return _from_gguf(folder, name)
    if os.path.exists(folder):
        raise CheckpointError("is a file", where=name, fix="Name the folder it is in; only GGUF files are models.")
    repo = None if _looks_like_path(name) else parse_repo(name, "model")
    if repo is None:
        raise CheckpointError("there is no such folder", where=name, fix=_nearest_folder(folder))
    return _from_folder(fetch(repo, HUB_PATTERNS), name)


def _from_gguf(file: Path, name: str) -> ModelSource:
    gguf_package(name)
    first = parts_of(file)[0]
    folder = companions(first)
    return ModelSource("hf", folder, None, _config(folder), name, "gguf", "", gguf=first)


def _looks_like_path(name: str) -> bool:
    parent = Path(name).parent
    return (parent != Path(".") and os.path.isdir(parent)) or name.startswith("outputs/")


def _nearest_folder(folder: Path) -> str:
    """A hint naming the sibling with the nearest name."""
    try:
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return f"There is no folder {folder.parent} either."
    near = nearest(folder.name, siblings)
    return f"Did you mean {folder.with_name(near)}?" if near else ""


def _from_folder(folder: Path, name: str) -> ModelSource:
    peft, paddle_lora = (folder / "adapter_config.json").exists(), (folder / "lora_config.json").exists()
    stem = _stem(folder, MODEL_STEMS)
    if (peft or paddle_lora) and stem:
        what = "holds a whole model and an adapter"
        raise CheckpointError(what, where=str(folder), fix="Move one of the two into a folder of its own.")
    if peft:
        return _adapter(folder, name, "adapter_config.json", PEFT_STEMS, "peft")
    if paddle_lora:
        return _adapter(folder, name, "lora_config.json", PADDLE_LORA_STEMS, "paddle")
    if stem and (folder / "config.json").exists():
        layout = _layout(folder, stem)
        return ModelSource(layout, folder, None, _config(folder), name, layout, stem)
    return _from_inside(folder, name, stem)


def _from_inside(folder: Path, name: str, stem: str | None) -> ModelSource:
    """A checkpoint or a run; else say what is missing."""
    if (folder / "model").is_dir() and (_STEP.fullmatch(folder.name) or (folder / "state.json").exists()):
        if not (folder / "complete.json").exists():
            raise CheckpointError("the checkpoint is not complete", where=str(folder), fix=_other_steps(folder.parent))
        return _from_folder(folder / "model", name)
    if (folder / "final").is_dir():
        return _from_folder(folder / "final", name)
    steps = folder if folder.name == "checkpoints" else folder / "checkpoints"
    if steps.is_dir():
        raise CheckpointError("the run has no final model yet", where=str(folder), fix=_other_steps(steps))
    if stem:
        raise CheckpointError("config.json is missing", where=str(folder), fix="It comes with the model; copy it too.")
    pickle = next((path for pattern in _PICKLES for path in sorted(folder.glob(pattern))), None)
    if pickle:
        raise CheckpointError(_REFUSED, where=str(pickle), fix=_safe_way(pickle))
    if not (folder / "config.json").exists():
        what = "holds no model: neither config.json nor adapter_config.json is there"
        raise CheckpointError(what, where=str(folder), fix=_folders_inside(folder))
    raise CheckpointError("has a config.json but no weights (model.safetensors or its index)", where=str(folder))


_REFUSED = "is a pickle file, which can run any program when it is opened, and is not read"


def _safe_way(path: Path) -> str:
    """How to turn a pickled weight file into safetensors."""
    return (
        f"Convert it to safetensors once: finetune export {path.parent} NEW_FOLDER --allow-pickle; then name that one."
    )


def _adapter(folder: Path, name: str, config_file: str, stems: tuple[str, ...], layout: str) -> ModelSource:
    path = folder / config_file
    raw = read_json(path)
    stem = _stem(folder, stems)
    if not stem:
        pickle = next((file for pattern in _PICKLES for file in sorted(folder.glob(pattern))), None)
        if pickle:
            raise CheckpointError(_REFUSED, where=str(pickle), fix=_safe_way(pickle))
        raise CheckpointError(f"{stems[0]}.safetensors is missing", where=str(folder), fix="Copy the folder again.")
    settings = parse_peft_config(raw, path) if layout == "peft" else parse_paddle_config(raw, path)
    base_name = raw.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        fix = f'Write the base model into {config_file}: "base_model_name_or_path": "<hub id or folder>".'
        raise CheckpointError("does not say which model it belongs to", where=str(path), fix=fix)
    base = _base(_at_revision(base_name, raw.get("revision")), folder, path)
    config = _under(base.config, folder, stem, layout)
    return ModelSource("adapter", folder, base, config, name, layout, stem, settings, base_name)


def _under(config: Architecture, folder: Path, stem: str, layout: str) -> Architecture:
    """The base's description under an adapter: with a part of its own for one of them, embedding and head are two."""
    if not config.tie_word_embeddings:
        return config
    parsed = [parse_adapter_name(config, name, layout) for name in TensorFolder(folder, stem).entries]
    ends = any(part and part[0] in (EMBEDDING, HEAD) for part in parsed)
    return replace(config, tie_word_embeddings=False) if ends else config


def _at_revision(base_name: str, revision: object) -> str:
    """The base with the revision that PEFT names beside it."""
    return f"{base_name}@{revision}" if isinstance(revision, str) and not _is_there(base_name) else base_name


def _base(base_name: str, folder: Path, config_file: Path) -> ModelSource:
    """The adapter's base: relative to the working directory, then to the adapter's folder, then the hub."""
    beside = folder / base_name
    try:
        chosen = beside if not _is_there(base_name) and _is_there(beside) else base_name
        if os.path.isdir(chosen) and Path(chosen).resolve() == folder.resolve():
            raise CheckpointError("names itself as its base model", where=str(config_file))
        if os.path.isdir(chosen) and (Path(chosen) / config_file.name).exists():
            what = f"its base model {base_name!r} is an adapter itself"
            fix = f"Merge that one first: finetune export {chosen} FOLDER."
            raise CheckpointError(what, where=str(config_file), fix=fix)
        return resolve_model(chosen)
    except CheckpointError as error:
        if _is_there(base_name) or _is_there(beside):
            raise
        fix = f"Put the base model there, or correct base_model_name_or_path in {config_file}."
        raise CheckpointError(f"the adapter's base model cannot be had: {error}", where=str(folder), fix=fix) from error


def _is_there(path: str | Path) -> bool:
    """Whether it can be a model on this machine."""
    return os.path.isdir(path) or (os.path.isfile(path) and Path(path).suffix == ".gguf")


def _config(folder: Path) -> Architecture:
    return read_config(read_json(folder / "config.json"), folder / "config.json")


def _stem(folder: Path, stems: tuple[str, ...]) -> str | None:
    return next((stem for stem in stems if TensorFolder.present(folder, stem)), None)


def _layout(folder: Path, stem: str) -> str:
    """`paddle` where the tensor names are PaddleNLP's; the file names of the two are the same."""
    index = folder / f"{stem}.safetensors.index.json"
    if not (folder / f"{stem}.safetensors").exists():
        names = read_json(index).get("weight_map")
    else:
        names = TensorFolder(folder, stem).entries
    bodies = tuple(f"{family.PADDLE_BODY}." for family in FAMILIES.values())
    return "paddle" if isinstance(names, dict) and any(name.startswith(bodies) for name in names) else "hf"


def _other_steps(steps: Path) -> str:
    found = [path for path in steps.glob("step-*") if _STEP.fullmatch(path.name) and (path / "complete.json").exists()]
    newest = max(found, key=lambda path: int(path.name[5:]), default=None)
    return f"Its newest complete checkpoint is {newest}." if newest else "It has no complete checkpoint."


def _folders_inside(folder: Path) -> str | None:
    """A hint for someone who named the folder above."""
    try:
        for path in sorted(folder.iterdir()):
            inside = (path / "config.json").exists() or (path / "adapter_config.json").exists()
            if (path.is_dir() and inside) or path.suffix == ".gguf":
                return f"Did you mean {str(path)!r}?"
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(folder)) from error
    return None
