"""The `generate` command: answers to one prompt or to the rows of a file.

Greedy unless a temperature, top-p or top-k is given: the same command gives the same answers. Of the model's
generation_config.json only the end tokens are used here; its sampling settings are for `chat` and for
`AutoModelForCausalLM.generate`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from finetune.errors import ArgumentError
from finetune.infer.open import open_model, open_tokenizer
from finetune.infer.prompts import Prompt, PromptReader
from finetune.infer.sampling import DEFAULT_BATCH_SIZE, DEFAULT_MAX_NEW_TOKENS, Sampling
from finetune.model.resolve import resolve_model
from finetune.report.console import progress, warn

if TYPE_CHECKING:
    from finetune.infer.engine import Engine, Output

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
) -> None:
    """Answer `prompt`, streaming to stdout, or every row of the JSONL file `input`.

    Args:
        output: JSONL file for rows {prompt, response, tokens, finish_reason} in input order, complete or not there at
            all. Without it, rows of a file go to stdout.
        system: System message of prompts that have none.
        temperature: 0 is greedy; None is 1 if top_p or top_k is given, else 0.
        seed: Row i of a file draws from (seed, i), whatever the batch size.
        raw: Take prompts as plain text, without the chat template.

    Raises:
        UserError: arguments, input rows or the model folder are wrong. All rows are checked before weights load.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p, top_k, seed)
    _check_arguments(prompt, input, output, system, batch_size, raw)
    source = resolve_model(model)
    reader = PromptReader(open_tokenizer(source), source.config["max_position_embeddings"], raw, system)
    if prompt is not None:
        asked = reader.read({"prompt": prompt}, "--prompt")
        engine = open_model(source).engine
        if output is None:
            _stream(engine, asked, sampling)
        else:
            with _replacing(Path(output)) as file:
                _write(file, asked, engine.generate([asked.ids], sampling)[0])
        return
    count = reader.check(Path(input))
    engine = open_model(source).engine
    with _replacing(Path(output)) if output else _stdout() as file:
        _answer_file(engine, reader.file(Path(input)), count, sampling, batch_size, file)


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


def _check_arguments(prompt, input, output, system, batch_size: int, raw: bool) -> None:
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


def _stream(engine: "Engine", asked: Prompt, sampling: Sampling) -> None:
    for delta in engine.stream(asked.ids, sampling):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _answer_file(
    engine: "Engine", prompts: Iterator[Prompt], count: int, sampling: Sampling, batch_size: int, file: IO[str]
) -> None:
    """Answer window by window: within one, the longest first and finished rows replaced; written in input order."""
    first, tokens = 0, 0
    with progress(count, "generate", "row") as bar:

        def count_row(_: int, answer: "Output") -> None:
            nonlocal tokens
            tokens += len(answer.tokens)
            bar.advance(1, **{"tokens": tokens, "tokens_per_second": tokens / max(bar.elapsed, 1e-9)})

        while window := list(islice(prompts, WINDOW)):
            samplings = [_for_row(sampling, first + i) for i in range(len(window))]
            answers = engine.generate(
                [asked.ids for asked in window], samplings, batch_size=batch_size, on_finish=count_row
            )
            for asked, answer in zip(window, answers, strict=True):
                _write(file, asked, answer)
            file.flush()
            first += len(window)


def _for_row(sampling: Sampling, row: int) -> Sampling:
    """A seed of its own for each row, so that equal prompts are not answered alike."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=int(np.random.SeedSequence([sampling.seed, row]).generate_state(1)[0]))


def _write(file: IO[str], asked: Prompt, answer: "Output") -> None:
    row = {
        "prompt": asked.shown,
        "response": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
    }
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A file that takes the place of `path` when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ArgumentError(
            f"the file cannot be written: {error.strerror or error}",
            where=f"--output {path}",
            fix="Choose another place, or free some space.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _stdout() -> Iterator[IO[str]]:
    yield sys.stdout
