"""The quickstart's interface: load a model and a tokenizer by name, and generate as with transformers.

    from finetune import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-1.5B-Instruct", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-1.5B-Instruct")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pd")
    generated_ids = model.generate(model_inputs.input_ids, max_new_tokens=512)[0]

The model is PaddleNLP's own object. Its `generate` is ours: it takes a prompt without an attention mask, reads
generation_config.json as transformers does and returns a pair as PaddleNLP does, whose sequences hold prompt and answer
together. PaddleNLP's stays reachable as `model.paddle_generate`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.chat.tokenizer import Tokenizer
from finetune.errors import ArgumentError
from finetune.infer.open import open_tokenizer, read_generation_config
from finetune.infer.sampling import Sampling
from finetune.model.resolve import resolve_model
from finetune.model.runtime import paddle

if TYPE_CHECKING:
    from finetune.infer.row import Output

DEFAULT_NEW_TOKENS = 20  # transformers' default when neither max_new_tokens nor max_length is given

# Arguments of transformers' generate that are honoured, in kwargs and in generation_config.json.
_HONOURED = frozenset(
    "do_sample temperature top_p top_k min_p repetition_penalty max_new_tokens max_length min_new_tokens "
    "eos_token_id pad_token_id num_return_sequences stop_strings".split()
)
# Settings that change the result and are not ours: refused unless they have the value that does nothing.
_NEUTRAL: dict[str, tuple] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
}


class AutoTokenizer:
    """Opens tokenizers. Not to be made."""

    @staticmethod
    def from_pretrained(model: str) -> Tokenizer:
        """The tokenizer of any MODEL: hub id, model folder, adapter, checkpoint or run."""
        tokenizer = open_tokenizer(resolve_model(str(model)))
        tokenizer.tensors["pd"] = lambda array: paddle().to_tensor(array)
        return tokenizer


class AutoModelForCausalLM:
    """Opens models. Not to be made."""

    @staticmethod
    def from_pretrained(model: str, dtype: str = "auto"):
        """PaddleNLP's Qwen2ForCausalLM (a LoRAModel for an adapter), in evaluation mode, with `generate` as below.

        Args:
            model: Hub id, model folder, adapter, checkpoint or run.
            dtype: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16 or float16.
        """
        from finetune.model.load import load_model

        source = resolve_model(str(model))
        causal = load_model(source, dtype=dtype).model
        causal.eval()
        return attach_generate(causal, read_generation_config(source))


def attach_generate(model, generation_config: dict[str, Any]):
    """Replace a model's `generate` by ours; its own becomes `paddle_generate`. Returns the model."""
    model.paddle_generate = model.generate
    model.generate = Generate(model, generation_config)
    return model


class Generate:
    """`model.generate`.

    Attributes:
        generation_config: Defaults for every call, as in generation_config.json. May be edited.
    """

    def __init__(self, model, generation_config: dict[str, Any]):
        from finetune.infer.engine import Engine

        self._engine = Engine(model)
        self.generation_config = dict(generation_config)

    def __call__(self, input_ids, attention_mask=None, *, tokenizer: Tokenizer | None = None, seed=None, **settings):
        """Continue prompts.

        Args:
            input_ids: int64 [B, L], a Paddle tensor, an array or lists; left-padded if lengths differ.
            attention_mask: [B, L], 0 for padding. Left out, it follows from the padding token as in transformers:
                only when that token is set, occurs, and is not an end token.
            tokenizer: Needed for `stop_strings`.
            seed: With do_sample, makes the draws repeatable; else `paddle.seed` does.
            **settings: do_sample, temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, max_length,
                min_new_tokens, eos_token_id, pad_token_id, num_return_sequences, stop_strings; they win over
                generation_config.

        Returns:
            sequences: Paddle int64 [B * num_return_sequences, L + new]: the prompts as given, the answers with their
                end token, and the padding token behind shorter answers.
            scores: Paddle float32 [B * num_return_sequences, 1], as PaddleNLP's: the mean of the answer's logits; where
                tokens are drawn, of their log-probabilities, nats, before penalties.

        Raises:
            ArgumentError: a setting is unknown, out of range or not supported here.
            DataError: a prompt is empty or fills the model's context.
        """
        if unknown := sorted(settings.keys() - _HONOURED - _NEUTRAL.keys()):
            raise ArgumentError(
                f"generate does not know {', '.join(unknown)}", fix="model.paddle_generate is PaddleNLP's own."
            )
        config = {**self.generation_config, **settings}
        _refuse_unsupported(config)
        ids = np.atleast_2d(_array(input_ids))
        ends = config.get("eos_token_id")
        ends = [] if ends is None else [int(token) for token in np.atleast_1d(_array(ends))]
        pad = config.get("pad_token_id")
        pad = (ends[0] if ends else None) if pad is None else int(pad)
        mask = _mask(ids, attention_mask, pad, ends)
        sampling = _sampling(config, ids.shape[1], ends)
        if sampling.stop and tokenizer is None:
            raise ArgumentError("stop_strings needs a tokenizer", fix="Pass tokenizer=tokenizer as well.")
        samplings = [replace(sampling, seed=row_seed) for row_seed in _seeds(len(ids), sampling, seed)]
        self._engine.tokenizer = tokenizer if sampling.stop else None
        prompts = [row[keep] for row, keep in zip(ids, mask)]
        outputs = self._engine.generate(prompts, samplings, batch_size=max(1, len(ids) * sampling.n))
        sequences = _joined(ids, [output.tokens for output in outputs], sampling.n, pad or 0)
        scores = np.array([[_score(output)] for output in outputs], dtype=np.float32)
        return paddle().to_tensor(sequences), paddle().to_tensor(scores)


def _array(values) -> np.ndarray:
    return np.asarray(values.numpy() if hasattr(values, "numpy") else values, dtype=np.int64)


def _mask(ids: np.ndarray, attention_mask, pad: int | None, ends: list[int]) -> np.ndarray:
    """Which tokens count, bool [B, L]."""
    if attention_mask is not None:
        mask = np.atleast_2d(_array(attention_mask)) != 0
        if mask.shape != ids.shape:
            raise ArgumentError(
                f"attention_mask has shape {list(mask.shape)} and input_ids {list(ids.shape)}",
                fix="Give one number per token.",
            )
        return mask
    if pad is None or pad in ends:
        return np.ones(ids.shape, dtype=bool)
    return ids != pad


def _sampling(config: dict[str, Any], prompt_length: int, ends: list[int]) -> Sampling:
    new_tokens = config.get("max_new_tokens")
    if new_tokens is None:
        most = config.get("max_length")
        new_tokens = DEFAULT_NEW_TOKENS if most is None else most - prompt_length
        if most is not None and new_tokens <= 0:
            raise ArgumentError(
                f"the prompt has {prompt_length} tokens and max_length is {most}",
                where="max_length",
                fix="max_length counts the prompt as well; use max_new_tokens.",
            )
    stop = config.get("stop_strings") or ()
    sampling = Sampling.from_generation_config(
        config,
        max_new_tokens=new_tokens,
        min_new_tokens=config.get("min_new_tokens") or 0,
        n=config.get("num_return_sequences") or 1,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(ends),
    )
    return sampling if sampling.temperature == 0.0 else replace(sampling, logprobs=0)


def _score(output: Output) -> float:
    if output.logprobs is None:
        return output.score
    return sum(token.logprob for token in output.logprobs) / len(output.logprobs)


def _seeds(rows: int, sampling: Sampling, seed: int | None) -> list[int | None]:
    """A seed for each row: from the caller's, or from Paddle's generator, which `paddle.seed` sets."""
    if sampling.temperature == 0.0:
        return [None] * rows
    if seed is None:
        return [int(value) for value in paddle().randint(0, 2**31 - 1, [rows])]
    return [int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) for row in range(rows)]


def _refuse_unsupported(config: dict[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        value = config.get(name)
        if value is not None and value not in neutral:
            raise ArgumentError(
                f"{name} is {value!r}, which generate does not support",
                where=name,
                fix="Leave it out; model.paddle_generate is PaddleNLP's own.",
            )


def _joined(ids: np.ndarray, answers: list[list[int]], n: int, pad: int) -> np.ndarray:
    longest = max(len(answer) for answer in answers)
    joined = np.full([len(answers), ids.shape[1] + longest], pad, dtype=np.int64)
    for row, answer in enumerate(answers):
        joined[row, : ids.shape[1]] = ids[row // n]
        joined[row, ids.shape[1] : ids.shape[1] + len(answer)] = answer
    return joined
