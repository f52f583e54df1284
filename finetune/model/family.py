"""What an architecture is: its sizes, its modules and tensors, and what they are called in every layout.

    config = read_config(read_json(folder / "config.json"), folder)     # finetune/model/config.py; once per model
    config.linears["model.layers.0.self_attn.q_proj"]                   # Linear(inputs=896, outputs=896, bias=True)
    config.shapes, config.parameters                                    # of all tensors, in Hugging Face's layout

A family is a subclass of `Architecture` and a row of `FAMILIES`. It says what differs from the base: names, defaults
and bounds of its sizes, the modules of a layer, what it refuses. Nothing is computed here, and nothing heavy imported:
recipes take the names of the modules from here.

Tensors             Hugging Face                    Paddle
    body            model.layers.0. ...             <PADDLE_BODY>.layers.0. ...
    Linear weights  [out, in]                       [in, out]
    head, not tied  lm_head.weight [vocab, hidden]  lm_head.weight [hidden, vocab]
    head, tied      not stored                      not stored (PaddleNLP repeats it, [vocab, hidden])
Adapters' names are in finetune/model/convert.py, those of GGUF in the `gguf` package, under `GGUF`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from math import prod
from typing import Any, ClassVar

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
LAST_NORM = "model.norm"
LAYERS = "model.layers"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Linear:
    """A module that computes x W + b.

    Attributes:
        inputs, outputs: Features.
        bias: Whether there is a b.
    """

    inputs: int
    outputs: int
    bias: bool = False


def _size(default: int, largest: int) -> int:
    """A field of config.json: an integer from 1. The bounds keep a hostile file from asking for more than any model
    needs; the tensors themselves are compared with these numbers before anything is built."""
    return field(default=default, metadata={"largest": largest})


def _share(default: float) -> float:
    """A field of config.json: a number in [0, 1)."""
    return field(default=default, metadata={"share": True})


def _marked(family: type[Architecture], mark: str) -> list[Field[Any]]:
    return [item for item in fields(family) if mark in item.metadata]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model's description. The defaults are those of config.json's readers, in transformers and PaddleNLP alike.

    Attributes:
        head_dim: Dimensions of one head of queries, keys or values; 0 becomes hidden_size / num_attention_heads.
        tie_word_embeddings: Whether the head is the embedding matrix.
        bos_token_id, eos_token_id, pad_token_id: As config.json has them; several end tokens are a tuple.
        dtype: Of the stored weights; None where config.json does not say.

    What a family sets:
        MODELS: Which models these are, for messages.
        MODEL_TYPE, ARCHITECTURE: config.json's `model_type` and the class in transformers and PaddleNLP.
        PADDLE_BODY: What PaddleNLP's model calls its body.
        GGUF, GGUF_TOKENIZER: Its architecture in GGUF, and how its tokenizer cuts text there.
        ACTIVATION: The only `hidden_act`.
    """

    MODELS: ClassVar[str]
    MODEL_TYPE: ClassVar[str]
    ARCHITECTURE: ClassVar[str]
    PADDLE_BODY: ClassVar[str]
    GGUF: ClassVar[str]
    GGUF_TOKENIZER: ClassVar[str]
    ACTIVATION: ClassVar[str] = "silu"

    vocab_size: int = _size(151936, 2**24)
    hidden_size: int = _size(4096, 2**20)
    intermediate_size: int = _size(22016, 2**22)
    num_hidden_layers: int = _size(32, 1024)
    num_attention_heads: int = _size(32, 4096)
    num_key_value_heads: int = _size(32, 4096)
    max_position_embeddings: int = _size(32768, 2**31)
    head_dim: int = 0
    rms_norm_eps: float = _share(1e-6)
    initializer_range: float = _share(0.02)
    attention_dropout: float = _share(0.0)
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @classmethod
    def sizes(cls) -> dict[str, tuple[int, int]]:
        """The integers of config.json: default and largest value of each."""
        return {item.name: (getattr(cls, item.name), item.metadata["largest"]) for item in _marked(cls, "largest")}

    @classmethod
    def shares(cls) -> dict[str, float]:
        """The numbers in [0, 1) of config.json, each with its default."""
        return {item.name: getattr(cls, item.name) for item in _marked(cls, "share")}

    def refused(self, raw: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        """What the model's config.json asks for and the family does not compute: (what, what would be right)."""
        yield from ()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end tokens that config.json names."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Features of all key heads together; the value heads have as many."""
        return self.num_key_value_heads * self.head_dim

    # -- modules and tensors, by their names in Hugging Face's layout ----------------------------------------------

    def layer_linears(self) -> dict[str, Linear]:
        """The Linear modules of one layer, by their names in it."""
        raise NotImplementedError

    def layer_norms(self) -> dict[str, int]:
        """The norms of one layer, by their names in it, each with the size of its weight."""
        return {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """The Linear modules of all layers."""
        layer = self.layer_linears()
        return {
            f"{LAYERS}.{number}.{name}": linear
            for number in range(self.num_hidden_layers)
            for name, linear in layer.items()
        }

    @cached_property
    def adaptable(self) -> Mapping[str, Linear]:
        """The modules that an adapter may target: the embedding reads a one of vocab_size inputs, so it is one too."""
        return {
            EMBEDDING: Linear(self.vocab_size, self.hidden_size),
            **self.linears,
            HEAD: Linear(self.hidden_size, self.vocab_size),
        }

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor, the largest ones first."""
        matrix = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": matrix}
        if not self.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = matrix
        for name, linear in self.linears.items():
            shapes[f"{name}.weight"] = (linear.outputs, linear.inputs)
            if linear.bias:
                shapes[f"{name}.bias"] = (linear.outputs,)
        norms = self.layer_norms()
        for number in range(self.num_hidden_layers):
            shapes |= {f"{LAYERS}.{number}.{name}.weight": (size,) for name, size in norms.items()}
        shapes[f"{LAST_NORM}.weight"] = (self.hidden_size,)
        return shapes

    @property
    def parameters(self) -> int:
        """Numbers in all tensors; a tied head counts once."""
        return sum(map(prod, self.shapes.values()))

    # -- the other layout --------------------------------------------------------------------------------------------

    def paddle_name(self, name: str) -> str:
        """`model.norm.weight` -> `qwen2.norm.weight`. Tensors and modules alike."""
        return f"{self.PADDLE_BODY}.{name[len('model.') :]}" if name.startswith("model.") else name

    def hf_name(self, name: str) -> str:
        """`qwen2.norm.weight` -> `model.norm.weight`. Tensors and modules alike."""
        body = f"{self.PADDLE_BODY}."
        return f"model.{name[len(body) :]}" if name.startswith(body) else name

    def is_transposed(self, name: str) -> bool:
        """Whether the two layouts store this tensor transposed to one another.

        A tied head is the embedding matrix and is not meant here.
        """
        module, _, kind = name.rpartition(".")
        return kind == "weight" and (module == HEAD or module in self.linears)

    def paddle_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, by its Hugging Face name, as Paddle stores it."""
        shape = self.shapes[name]
        return shape[::-1] if self.is_transposed(name) else shape

    def layer_prefix(self, layout: str) -> str:
        """What the names of the layers' tensors begin with; the layer's number follows."""
        return f"{self.paddle_name(LAYERS) if layout == 'paddle' else LAYERS}."


@dataclass(frozen=True, kw_only=True)
class Qwen2(Architecture):
    """Qwen2 and Qwen2.5: biases on queries, keys and values only; a head's size follows from the hidden size."""

    MODELS: ClassVar[str] = "Qwen2 and Qwen2.5 models"
    MODEL_TYPE: ClassVar[str] = "qwen2"
    ARCHITECTURE: ClassVar[str] = "Qwen2ForCausalLM"
    PADDLE_BODY: ClassVar[str] = "qwen2"
    GGUF: ClassVar[str] = "qwen2"
    GGUF_TOKENIZER: ClassVar[str] = "qwen2"

    def layer_linears(self) -> dict[str, Linear]:
        """See `Architecture.layer_linears`."""
        hidden, ffn, kv = self.hidden_size, self.intermediate_size, self.key_value_size
        return {
            "self_attn.q_proj": Linear(hidden, self.query_size, bias=True),
            "self_attn.k_proj": Linear(hidden, kv, bias=True),
            "self_attn.v_proj": Linear(hidden, kv, bias=True),
            "self_attn.o_proj": Linear(self.query_size, hidden),
            "mlp.gate_proj": Linear(hidden, ffn),
            "mlp.up_proj": Linear(hidden, ffn),
            "mlp.down_proj": Linear(ffn, hidden),
        }

    def refused(self, raw: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        """See `Architecture.refused`."""
        if raw.get("attention_bias") is False or raw.get("mlp_bias"):
            yield "another choice of biases than Qwen2's", None
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            what = f"hidden_size {self.hidden_size} with {self.num_attention_heads} heads"
            yield what, "Each head needs an even number of dimensions."
        stored = raw.get("head_dim")
        if stored is not None and stored != self.head_dim:
            yield f"head_dim {str(stored)[:50]} other than hidden_size / heads", None


FAMILIES: dict[str, type[Architecture]] = {family.MODEL_TYPE: family for family in (Qwen2,)}
# Last names of the modules that an adapter may target, of all families.
ADAPTABLE = tuple(dict.fromkeys(name.rpartition(".")[2] for family in FAMILIES.values() for name in family().adaptable))


def supported() -> str:
    """The families, in a sentence."""
    listed = (f"{family.MODELS} (model_type {name!r})" for name, family in FAMILIES.items())
    return f"{', '.join(listed)} are supported."
