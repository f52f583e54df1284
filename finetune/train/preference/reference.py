"""The reference of preference training: where its log-probabilities come from.

| case | reference |
| --- | --- |
| LoRA, new adapter | the policy with its adapter switched off; no second copy of the weights |
| LoRA, adapter trained further | the policy with the adapter as `model.path` holds it |
| full fine-tuning | the policy before its first step; `model.path` loaded again if that has passed or if live |
| `dpo.reference` | that model |
| simpo, orpo, `reference_free` | none |

With `precompute_ref_log_probs` they are computed once, in the micro-batches in which each pair is trained first, so
that they equal the policy's to the last bit at step 1; then whatever was loaded for it is freed. They are kept in
output_dir/reference/ (safetensors and JSON) under a key of model, data, template and precision.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors.numpy import load, save

from finetune import console
from finetune.compute.losses import LOSSES
from finetune.files import json_text, replace_file
from finetune.model.adapted import open_adapter
from finetune.model.identity import model_digest
from finetune.model.load import load_model
from finetune.model.lora import adapter_disabled, lora_layers, merge_lora, paddle_state, saved_tensors
from finetune.model.resolve import ModelSource
from finetune.model.runtime import paddle as _bring_up
from finetune.model.tensors import copy_of, set_parameter
from finetune.rows.plan import EpochPlan
from finetune.train.estimate import quantization_of
from finetune.train.preference.pairs import PairBatch, PairBatcher, evaluating, response_logps
from finetune.train.task import evaluation_batches

_bring_up()
import paddle

if TYPE_CHECKING:
    from finetune.recipe.schema import DpoSection, Recipe
    from finetune.rows.table import PairDataset
    from finetune.train.prepare import RowSet
    from finetune.train.processes.parallel import World
    from finetune.train.task import Ready

_SAVE_SECONDS = 60.0
_FORMAT = 2


class Reference(Protocol):
    """Anything that knows the reference's log-probabilities."""

    def logps(self, batch: PairBatch) -> paddle.Tensor:
        """float64 [2P] without gradient, chosen of pair p at 2p and rejected at 2p+1."""
        ...


class NoReference:
    """Log-probabilities of 0: the policy is compared with nothing."""

    def logps(self, batch: PairBatch) -> paddle.Tensor:
        """Zeros, float64 [2P]."""
        return paddle.zeros([2 * len(batch.pairs)], dtype="float64")


class LiveReference:
    """A forward pass each time.

    Args:
        model: The policy, or a model of its own.
        switched: Turns the policy into the reference for a while.
    """

    def __init__(self, model, switched: Callable[[], AbstractContextManager] = nullcontext):
        self._model, self._switched = model, switched

    def logps(self, batch: PairBatch) -> paddle.Tensor:
        """See `Reference`."""
        with evaluating(self._model), self._switched():
            return response_logps(self._model, batch.layout)


class CachedReference:
    """Log-probabilities computed before.

    Args:
        values: float64 [n, 2], chosen and rejected of every pair of the dataset; NaN where the run never asks.
    """

    def __init__(self, values: np.ndarray):
        self._values = values

    def logps(self, batch: PairBatch) -> paddle.Tensor:
        """See `Reference`."""
        return paddle.to_tensor(self._values[batch.pairs].reshape(-1))


def make_references(ready: Ready, section: DpoSection) -> list[Reference]:
    """One reference for each set of pairs: training, and evaluation if there is one.

    Raises:
        CheckpointError: `dpo.reference` cannot be loaded.
        ValueError: the pairs are streamed, so that nothing can be computed before; the recipe's rules refuse that.
    """
    prepared, world = ready.prepared, ready.world
    sets = [prepared.train] if prepared.eval is None else [prepared.train, prepared.eval]
    if section.reference_free or not LOSSES[section.loss_type].has_reference:
        return [NoReference() for _ in sets]
    if not section.precompute_ref_log_probs:
        return [_open_live(ready, section)] * len(sets)
    if not isinstance(prepared.plan, EpochPlan):
        raise ValueError("dpo.precompute_ref_log_probs is true, but the pairs of a stream are not known beforehand")
    opener = _Once(partial(_open_live, ready, section))
    identity = _identity(ready) if world.is_main else {}
    output = Path(prepared.recipe.training.output_dir)
    found: list[Reference] = [
        _precomputed(_Scored(prepared.train, _training_batches(prepared.plan)), world, output, identity, opener)
    ]
    if prepared.eval is not None:
        size = prepared.recipe.training.per_device_eval_batch_size
        scored = _Scored(prepared.eval, _evaluation_batches(len(prepared.eval.packs), size, world.size), ", evaluation")
        found.append(_precomputed(scored, world, output, identity, opener))
    return found


class _Once:
    """Opens the live reference when it is first needed, once."""

    def __init__(self, build: Callable[[], LiveReference]):
        self._build = build
        self._made: LiveReference | None = None

    def __call__(self) -> LiveReference:
        if self._made is None:
            self._made = self._build()
        return self._made


# -- live ------------------------------------------------------------------------------------------------------


def _open_live(ready: Ready, section: DpoSection) -> LiveReference:
    prepared, model = ready.prepared, ready.model
    recipe, source = prepared.recipe, prepared.source
    if prepared.reference is not None:
        return LiveReference(_load(prepared.reference, recipe))
    if recipe.lora is not None and source.kind == "adapter":
        return LiveReference(model, partial(_adapter_as, _initial_adapter(model, source)))
    if recipe.lora is not None:
        return LiveReference(model, partial(adapter_disabled, model))
    if section.precompute_ref_log_probs and not ready.resumed:
        return LiveReference(model)
    return LiveReference(_load(source, recipe))


def _load(source: ModelSource, recipe: Recipe):
    quantization = quantization_of(recipe)
    loaded = load_model(source, dtype=recipe.model.dtype, quantization=quantization)
    return loaded.model if loaded.lora is None or quantization is not None else merge_lora(loaded.model)


def _initial_adapter(model, source: ModelSource) -> list[tuple[paddle.nn.Layer, str, paddle.Tensor]]:
    """The adapter's tensors as its folder holds them, each with the layer and the name that they have there."""
    layers, saved, found = lora_layers(model), saved_tensors(model), []
    adapter, _ = open_adapter(source)
    for name, array in paddle_state(adapter, source.config).items():
        module, _, part = name.rpartition(".")
        layer = saved[name][0] if name in saved else layers[module]
        tensor = copy_of(getattr(layer, part))
        set_parameter(tensor, array)
        found.append((layer, part, tensor))
    return found


@contextmanager
def _adapter_as(tensors: list[tuple[paddle.nn.Layer, str, paddle.Tensor]]) -> Iterator[None]:
    """Other adapter tensors for a while. Exchanged, not written, so that an earlier forward pass keeps its gradient."""
    current = [(layer, part, getattr(layer, part)) for layer, part, _ in tensors]
    for layer, part, tensor in tensors:
        layer._parameters[part] = tensor
    try:
        yield
    finally:
        for layer, part, tensor in current:
            layer._parameters[part] = tensor


# -- precomputed -----------------------------------------------------------------------------------------------


Micro = tuple[int, list[int]]


@dataclass(frozen=True)
class _Scored:
    """Pairs to be scored.

    Attributes:
        pairs: All of them.
        schedule: (rank, units) of each micro-batch that scores some of them, over all ranks.
        title: What the bar calls them, behind "reference".
    """

    pairs: RowSet[Any]
    schedule: list[Micro]
    title: str = ""


def _training_batches(plan: EpochPlan) -> list[Micro]:
    """(rank, units) of each micro-batch that trains some pack for the first time, over all ranks."""
    seen: set[int] = set()
    batches: list[Micro] = []
    for steps in zip(*(own.steps() for own in plan.of_ranks())):
        for rank, step in enumerate(steps):
            for units in step.batches:
                if not seen.issuperset(units.tolist()):
                    seen.update(units.tolist())
                    batches.append((rank, units.tolist()))
        if len(seen) == plan.n:
            break
    return batches


def _evaluation_batches(units: int, size: int, ranks: int) -> list[Micro]:
    """(rank, units) as the evaluation takes them."""
    return [(rank, own) for rank in range(ranks) for own in evaluation_batches(units, size, rank, ranks)]


def _precomputed(
    scored: _Scored, world: World, output: Path, identity: dict[str, Any], live: Callable[[], LiveReference]
) -> CachedReference:
    """Read the cache; compute what it lacks; write it."""
    batcher, count = PairBatcher(scored.pairs.rows, scored.pairs.packs), len(scored.pairs.rows)
    cache = _Cache(output, scored.pairs.rows, identity) if world.is_main else None
    values = _joined(cache.read() if cache else np.full((count, 2), np.nan), world)
    missing = []
    for rank, units in scored.schedule:
        pairs = [i for unit in units for i in batcher.packs[unit]]
        if np.isnan(values[pairs]).any():
            missing.append((rank, units, pairs))
    if not missing:
        return CachedReference(values)
    done = values.copy()
    own = [(units, pairs) for rank, units, pairs in missing if rank == world.rank]
    saved = time.monotonic()
    with console.progress(sum(len(pairs) for _, pairs in own), f"reference{scored.title}", unit="pair") as bar:
        for units, pairs in own:
            fresh = live().logps(batcher.batch(units)).numpy().reshape(-1, 2)
            # A pair that an earlier micro-batch has had keeps its value
            first = np.isnan(done[pairs]).any(axis=1)
            done[np.array(pairs)[first]] = fresh[first]
            bar.advance(len(pairs))
            if cache and world.size == 1 and time.monotonic() - saved > _SAVE_SECONDS:
                cache.write(done)
                saved = time.monotonic()
    if world.size > 1:
        fresh = np.where(np.isnan(values), done, np.nan)
        values = np.where(np.isnan(values), _joined(fresh, world), values)
    else:
        values = done
    if cache:
        cache.write(values)
    world.barrier()
    return CachedReference(values)


def _joined(values: np.ndarray, world: World) -> np.ndarray:
    """Values of all ranks in one array: the mean of those that are numbers."""
    if world.size == 1:
        return values
    known = ~np.isnan(values)
    flat = world.all_sum(np.where(known, values, 0.0).ravel().tolist() + known.astype(float).ravel().tolist())
    total, count = np.array(flat).reshape(2, *values.shape)
    return np.where(count > 0, total / np.maximum(count, 1.0), np.nan)


class _Cache:
    """output_dir/reference/<key>.safetensors and .json."""

    def __init__(self, output: Path, pairs: PairDataset, identity: dict[str, Any]):
        self.record = identity | {"data": _data_digest(pairs), "pairs": len(pairs)}
        key = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:20]
        folder = output / "reference"
        self.tensors, self.json = folder / f"{key}.safetensors", folder / f"{key}.json"
        self.shape = (len(pairs), 2)

    def read(self) -> np.ndarray:
        """float64 [n, 2], NaN where nothing is known; a cache that is damaged or of something else counts as none."""
        empty = np.full(self.shape, np.nan)
        if not self.tensors.exists() or not self.json.exists():
            return empty
        try:
            content = self.tensors.read_bytes()
            good = json.loads(self.json.read_text(encoding="utf-8")) == self._record(content)
            found = load(content) if good else {}
            values = np.stack([found["chosen"], found["rejected"]], axis=1) if good else empty
        except (OSError, ValueError):
            good = False
        if not good or values.shape != self.shape or values.dtype != np.float64:
            console.warn(f"{self.tensors} is damaged; the reference log-probabilities are computed again")
            return empty
        return values

    def write(self, values: np.ndarray) -> None:
        """Replace the cache. Values without the record that knows their hash do not count."""
        self.tensors.parent.mkdir(parents=True, exist_ok=True)
        content = save({"chosen": values[:, 0].copy(), "rejected": values[:, 1].copy()})
        replace_file(self.tensors, content)
        replace_file(self.json, json_text(self._record(content), sort_keys=False))

    def _record(self, content: bytes) -> dict[str, Any]:
        return self.record | {"sha256": hashlib.sha256(content).hexdigest()}


def _identity(ready: Ready) -> dict[str, Any]:
    """Everything but the pairs that the log-probabilities depend on."""
    prepared, recipe = ready.prepared, ready.prepared.recipe
    source = prepared.reference or prepared.source
    template = prepared.tokenizer.chat_template or ""
    identity: dict[str, Any] = {
        "format": _FORMAT,
        "model": model_digest(source),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "dtype": ready.dtype,
    }
    if recipe.lora is not None and recipe.lora.variant == "pissa" and prepared.reference is None:
        # The base is then residual + starting factors, which is the same weight only up to rounding
        identity["pissa_rank"] = recipe.lora.rank
    if recipe.model.quantization != "none":
        identity["quantization"] = [recipe.model.quantization, recipe.model.double_quantization]
    return identity


def _data_digest(pairs: PairDataset) -> str:
    """SHA-256 over the tokens of all pairs and which of them are scored."""
    digest = hashlib.sha256()
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            digest.update(len(side.input_ids).to_bytes(8, "little"))
            digest.update(side.input_ids.tobytes())
            digest.update(side.labels.tobytes())
    return digest.hexdigest()
