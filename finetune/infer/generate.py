"""The `generate` command: answers to one prompt or to the rows of a file.

Greedy unless a temperature, top-p or top-k is given: the same command gives the same answers. Of the model's
generation_config.json only the end tokens are used here; its sampling settings are for `chat` and for
`AutoModelForCausalLM.generate`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from finetune.console import progress, warn
from finetune.errors import ArgumentError, DataError
from finetune.files import hash_file
from finetune.infer.open import AS_STORED, Held, open_model, open_tokenizer
from finetune.infer.partial import PartialAnswers, hash_model, output_file, resuming
from finetune.infer.prompts import Prompt, PromptReader
from finetune.infer.sampling import DEFAULT_BATCH_SIZE, DEFAULT_MAX_NEW_TOKENS, Sampling
from finetune.model.resolve import ModelSource, resolve_model

if TYPE_CHECKING:
    from finetune.infer.engine import Engine
    from finetune.infer.row import Output

# Rows held at once: enough to sort by length, few enough for a file of any size.
WINDOW = 2048


def generate(
    model: str,
    *,
    prompt: str | None = None,
    input: str | Path | None = None,
    output: str | Path | None = None,
    system: str | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    raw: bool = False,
    on_bad_row: str = "error",
    held: Held = AS_STORED,
) -> None:
    """Answer `prompt`, streaming to stdout, or every row of the JSONL file `input`.

    Args:
        output: JSONL file for rows {prompt, response, tokens, finish_reason} in input order, complete or not there at
            all: the answers of an interrupted run are kept beside it, and the same call goes on with the rest. Without
            it, rows of a file go to stdout.
        system: System message of prompts that have none.
        temperature: 0 is greedy; None is 1 if top_p or top_k is given, else 0.
        seed: Row i of a file draws from (seed, i), whatever the batch size.
        raw: Take prompts as plain text, without the chat template.
        on_bad_row: What a row that cannot be read does: "error" ends the command, "skip" leaves it out.
        held: How the weights are held in memory.

    Raises:
        UserError: arguments, input rows or the model folder are wrong. All rows are checked before weights load.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p, top_k, seed)
    _check_arguments(prompt, input, output, system, batch_size, raw)
    source = resolve_model(model)
    reader = PromptReader(open_tokenizer(source), source.config.max_position_embeddings, raw, system)
    target = None if output is None else Path(output)
    if prompt is not None:
        _answer_one(source, held, reader.read({"prompt": prompt}, "--prompt"), sampling, target)
    elif input is not None:
        skip = on_bad_row == "skip"
        work = _Work(reader.check(Path(input), skip), sampling, batch_size)
        if target is None:
            work.answer(open_model(source, held, pack=True).engine, reader.file(Path(input), skip), sys.stdout)
            return
        settings = [asdict(sampling), system, raw, on_bad_row, asdict(held)]
        identity = {"input": hash_file(Path(input)), "model": hash_model(source, target), "settings": settings}
        with resuming(target, work.count, json.loads(json.dumps(identity))) as partial:
            if not partial.done.all():
                work.resume(open_model(source, held, pack=True).engine, reader.file(Path(input), skip), partial)


def _sampling(
    max_new_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> Sampling:
    """Greedy, unless something that only drawing can use is asked for."""
    if temperature is None:
        temperature = 0.0 if top_p is None and top_k is None else 1.0
    elif temperature == 0.0 and (top_p is not None or top_k is not None):
        warn("--top-p and --top-k do nothing with --temperature 0, which always takes the likeliest token")
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=0 if top_k is None else top_k,
        seed=seed,
    )


def _check_arguments(
    prompt: str | None,
    input: str | Path | None,
    output: str | Path | None,
    system: str | None,
    batch_size: int,
    raw: bool,
) -> None:
    if (prompt is None) == (input is None):
        raise ArgumentError(
            "both --prompt and --input are given" if prompt is not None else "there is nothing to answer",
            fix="Give either --prompt TEXT or --input FILE.jsonl.",
        )
    if raw and system is not None:
        raise ArgumentError("--system would do nothing with --raw", fix="Leave one of them out.")
    if batch_size < 1:
        raise ArgumentError(f"--batch-size is {batch_size}", fix="Use a whole number of at least 1.")
    if input is not None and not Path(input).is_file():
        raise ArgumentError("there is no such file", where=f"--input {input}", fix="Give a JSONL file.")
    if output is not None:
        if Path(output).is_dir():
            raise ArgumentError("this is a folder", where=f"--output {output}", fix="Give a file name.")
        if input is not None and Path(output).resolve() == Path(input).resolve():
            raise ArgumentError("input and output are the same file", where=f"--output {output}", fix="Give another.")


def _answer_one(source: ModelSource, held: Held, asked: Prompt, sampling: Sampling, output: Path | None) -> None:
    """Answer one prompt: to stdout as the words come, or into a file."""
    engine = open_model(source, held, pack=True).engine
    if output is not None:
        with output_file(output) as file:
            file.write(_line(asked, engine.generate([asked.ids], sampling)[0]))
        return
    for delta in engine.stream(asked.ids, sampling):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


@dataclass
class _Work:
    """Answers the rows of a file, window by window: within one, the longest first and finished rows replaced.

    Attributes:
        count: Rows of the file.
        sampling: For row i with a seed made of its own and i.
    """

    count: int
    sampling: Sampling
    batch_size: int

    def answer(self, engine: Engine, prompts: Iterator[Prompt], file: IO[str]) -> None:
        """Write the answers in input order, a window at a time."""
        with self._bar(0) as count_tokens:
            for window in _windows(enumerate(prompts)):
                answers = self._generate(engine, window, lambda i, answer: count_tokens(answer))
                file.writelines(_line(asked, answer) for (_, asked), answer in zip(window, answers, strict=True))
                file.flush()

    def resume(self, engine: Engine, prompts: Iterator[Prompt], partial: PartialAnswers) -> None:
        """Keep the answers of rows that have none yet, as they come."""
        done = partial.done
        missing = ((row, asked) for row, asked in enumerate(prompts) if row < self.count and not done[row])
        with self._bar(partial.kept) as count_tokens:
            for window in _windows(missing):

                def keep(i: int, answer: Output, window=window) -> None:
                    row, asked = window[i]
                    partial.add(row, _row(asked, answer))
                    count_tokens(answer)

                self._generate(engine, window, keep)
        if not partial.done.all():
            raise DataError("the input changed while it was read", fix="Run the command again.")

    def _generate(self, engine: Engine, window: list[tuple[int, Prompt]], on_finish) -> list[Output]:
        prompts = [asked.ids for _, asked in window]
        samplings = [_for_row(self.sampling, row) for row, _ in window]
        return engine.generate(prompts, samplings, batch_size=self.batch_size, on_finish=on_finish)

    @contextmanager
    def _bar(self, done: int) -> Iterator[Callable[[Output], None]]:
        tokens = 0
        with progress(self.count, "generate", "row", done) as bar:

            def count_tokens(answer: Output) -> None:
                nonlocal tokens
                tokens += len(answer.tokens)
                bar.advance(1, tokens=tokens, tokens_per_second=tokens / max(bar.elapsed, 1e-9))

            yield count_tokens


def _windows(prompts: Iterable[tuple[int, Prompt]]) -> Iterator[list[tuple[int, Prompt]]]:
    prompts = iter(prompts)
    while window := list(islice(prompts, WINDOW)):
        yield window


def _for_row(sampling: Sampling, row: int) -> Sampling:
    """A seed of its own for each row, so that equal prompts are not answered alike."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=int(np.random.SeedSequence([sampling.seed, row]).generate_state(1)[0]))


def _row(asked: Prompt, answer: Output) -> dict[str, Any]:
    return {
        "prompt": asked.shown,
        "response": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
    }


def _line(asked: Prompt, answer: Output) -> str:
    return json.dumps(_row(asked, answer), ensure_ascii=False) + "\n"
