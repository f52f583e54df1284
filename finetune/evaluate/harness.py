"""What lm-evaluation-harness asks of a model, answered by the toolkit's own engine and scoring.

Texts, truncation and stop rules follow the harness's own Hugging Face model, so that results are comparable
(tests/parity/test_evaluate_parity.py).
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from finetune.console import progress
from finetune.errors import ArgumentError
from finetune.evaluate.scoring import Score, score_continuations
from finetune.infer.open import Opened
from finetune.infer.sampling import Sampling

# The harness's default for tasks that give none.
_DEFAULT_NEW_TOKENS = 256


class EvaluatedModel(TemplateLM):
    """A loaded model as the harness sees it.

    Args:
        opened: Model, tokenizer and engine.
        batch_size: Answers decoded together.
    """

    def __init__(self, opened: Opened, batch_size: int):
        super().__init__()
        self._opened, self._batch_size = opened, batch_size
        self.tokenizer = opened.tokenizer

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text without context: BOS, or the end of text where there is none."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        return self.eot_token_id if bos is None else self.tokenizer.backend.token_to_id(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self._opened.source.folder)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages. Without a generation prompt the last message stays open, for the model to go on with."""
        text = self.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As lm_eval does with transformers: what begins with BOS already, such as a rendered chat, gets no other."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # its bar; ours follows

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        """requests: ((context, continuation), context ids, continuation ids). Long contexts lose their beginning."""
        longest = self._opened.engine.context
        pairs = []
        for _, context, continuation in requests:
            excess = max(0, len(context) + len(continuation) - (longest + 1))
            pairs.append((context[excess:], continuation))
        scores = self._scores(pairs, "score")
        for request, score in zip(requests, scores):
            self.cache_hook.add_partial("loglikelihood", request[0], (score.logprob, score.greedy))
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context."""
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._opened.engine.context, 1
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, score in zip(owners, self._scores(pairs, "score texts")):
            totals[index] += score.logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop texts."""
        prompts, samplings = [], []
        for request in requests:
            text, settings = request.args
            sampling = _sampling(settings, self._opened.engine.stop_token_ids)
            room = self._opened.engine.context - sampling.max_new_tokens
            if room < 1:
                raise ArgumentError(
                    f"task {request.task_name} asks for {sampling.max_new_tokens:,} new tokens, but the model's "
                    f"context holds {self._opened.engine.context:,} with the question",
                    where="--tasks",
                    fix="Leave the task out, or use a model with a longer context.",
                )
            prompts.append(self.tok_encode(text)[-room:])
            samplings.append(sampling)
        with progress(len(prompts), "answer", unit="question") as bar:
            outputs = self._opened.engine.generate(
                prompts, samplings, batch_size=self._batch_size, on_finish=lambda *_: bar.advance()
            )
        for request, output in zip(requests, outputs):
            self.cache_hook.add_partial("generate_until", request.args, output.text)
        return [output.text for output in outputs]

    def _scores(self, pairs: list[tuple[list[int], list[int]]], title: str) -> list[Score]:
        with progress(len(pairs), title, unit="answer") as bar, self._opened.engine.evaluating():
            return score_continuations(self._opened.engine.model, pairs, on_scored=bar.advance)


def _sampling(settings: dict[str, Any], stop_token_ids: frozenset[int]) -> Sampling:
    """The harness's generation settings, which are transformers' beside `until` and `max_gen_toks`."""
    until = settings.get("until") or []
    draws = settings.get("do_sample", settings.get("temperature", 0) > 0)
    return Sampling(
        max_new_tokens=int(settings.get("max_gen_toks", settings.get("max_new_tokens", _DEFAULT_NEW_TOKENS))),
        temperature=float(settings.get("temperature") or 1.0) if draws else 0.0,
        top_p=float(settings.get("top_p") or 1.0) if draws else 1.0,
        top_k=int(settings.get("top_k") or 0) if draws else 0,
        seed=0,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        stop_token_ids=tuple(stop_token_ids),
    )
