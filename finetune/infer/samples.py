"""A few answers of a model that is in memory, for the report of the run that trained it."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.chat.tokenizer import Tokenizer
from finetune.infer.engine import Engine
from finetune.infer.sampling import Sampling
from finetune.model.build import config_of

MAX_NEW_TOKENS = 64


def answer(model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Greedy answers, at most 64 tokens each.

    Args:
        model: Qwen2ForCausalLM, with or without adapter. Left in the mode it was in.
        prompts: Token ids, each ending with the generation header.
    """
    room = config_of(model).max_position_embeddings - MAX_NEW_TOKENS
    outputs = Engine(model, tokenizer).generate(
        [list(map(int, prompt))[-room:] for prompt in prompts], Sampling(max_new_tokens=MAX_NEW_TOKENS)
    )
    return [output.text for output in outputs]
