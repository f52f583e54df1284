"""The `finetune` command: arguments in, one function of the package called, errors to one plain message.

Only the standard library and typer are loaded here; what a command needs is imported in its body, so that help,
`recipes` and every recipe error come at once. `main` is the only place that turns errors into exit codes.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune import __version__
from finetune.arguments import (
    check_master,
    check_name,
    check_sampling,
    check_utf8,
    choice,
    number,
    piped_prompt,
    read_api_key,
    whole,
)
from finetune.errors import ArgumentError, FinetuneError, Interrupted, UserError
from finetune.export.formats import DTYPES, FORMATS

app = typer.Typer(
    name="finetune",
    help="Fine-tune Qwen2-family models on PaddlePaddle: SFT and DPO, full or LoRA.\n\n"
    "MODEL is a hub id, a model folder (Hugging Face or PaddleNLP), an adapter folder, a checkpoint, a run's folder "
    "or a GGUF file. "
    "A hub id may name its hub and revision: hf:OWNER/NAME@REVISION, modelscope:, aistudio:, paddlenlp:.",
    epilog="Example: finetune train qwen2-0.5b-instruct_sft_lora --dry-run",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
recipes_app = typer.Typer(help="List, show or copy the recipes that come with the package.", rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")

_UsageError: Any = typer.BadParameter.__base__  # its module's name depends on typer's version


def _positive(*names: str, metavar: str, help: str) -> Any:
    return typer.Option(*names, parser=whole(1), metavar=metavar, help=help)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, checkpoint or run.")]
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or a shipped recipe's name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe keys to set, e.g. training.max_steps=10", show_default=False),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt; the model's own when not given.")]
MaxNewTokens = Annotated[int, _positive(metavar="N", help="Most tokens to add to a prompt.")]
Temperature = Annotated[
    float | None, typer.Option(parser=number, metavar="T", help="Above 0 draws tokens, 0 is greedy.")
]
TopP = Annotated[
    float | None,
    typer.Option(parser=number, metavar="P", help="Draw from the likeliest tokens that sum to P, in (0, 1]."),
]
TopK = Annotated[
    int | None, typer.Option(parser=whole(0), metavar="K", help="Draw from the K likeliest tokens; 0: from all.")
]
Dtype = Annotated[
    str, typer.Option(parser=choice("auto", "float32", "bfloat16", "float16"), metavar="D", help="Of the weights.")
]
Quantization = Annotated[
    str,
    typer.Option(
        parser=choice("none", "nf4", "int8"),
        metavar="none|nf4|int8",
        help="Of the layers: less memory, slower.",
    ),
]
Seed = Annotated[int | None, typer.Option(parser=whole(0), metavar="S", help="Makes the draws repeatable.")]


def _held(dtype: str, quantization: str) -> Any:
    from finetune.infer.open import Held

    return Held(dtype, quantization)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    if version:
        typer.echo(f"paddle-finetune {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog="Example: finetune train recipes/qwen2-0.5b_sft_lora.yaml training.max_steps=100 --dry-run")
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would happen: steps, tokens, memory.")
    ] = False,
    nproc: Annotated[int, _positive(metavar="N", help="Processes: one per GPU, or CPU processes.")] = 1,
    nnodes: Annotated[int, _positive(metavar="N", help="Machines.")] = 1,
    master: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="First machine, with --nnodes.")] = None,
) -> None:
    """Train by a recipe. The same command again goes on where a run was interrupted."""
    from finetune.recipe.load import load_recipe
    from finetune.recipe.rules import check_world_size

    loaded = load_recipe(recipe, overrides or ())
    check_master(nnodes, master)
    check_world_size(loaded, nproc * nnodes)
    from finetune.train.run import train as run

    run(loaded, dry_run=dry_run, nproc=nproc, nnodes=nnodes, master=master, answer=_answer)


@app.command(epilog='Example: finetune generate outputs/my-run --prompt "What is a kernel?" --max-new-tokens 64')
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One prompt; else read from a pipe.")] = None,
    input: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Prompts or conversations.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Answers, in input order.")] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    batch_size: Annotated[int, _positive(metavar="B", help="Prompts decoded together.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    on_bad_row: Annotated[
        str, typer.Option(parser=choice("error", "skip"), metavar="error|skip", help="Rows of FILE that are wrong.")
    ] = "error",
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
) -> None:
    """Answer one prompt, or every row of a file. The same command again goes on where a file was interrupted."""
    if prompt is not None and input is not None:
        raise ArgumentError("--prompt and --input are both given", fix="Keep one.")
    check_sampling(temperature, top_p)
    if prompt is None and input is None:
        prompt = piped_prompt()
    from finetune.infer.generate import generate as run

    run(
        model,
        prompt=prompt,
        input=input,
        output=output,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_size=batch_size,
        raw=raw,
        on_bad_row=on_bad_row,
        held=_held(dtype, quantization),
    )


@app.command(epilog="Example: finetune chat Qwen/Qwen2-0.5B-Instruct")
def chat(
    model: ModelArgument,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    compare: Annotated[
        str | None, typer.Option(metavar="BASE", help="A second model that answers too, such as the one tuned.")
    ] = None,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
) -> None:
    """Talk to a model in the terminal."""
    check_sampling(temperature, top_p)
    from finetune.infer.chat import chat as run

    run(
        model,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        compare=compare,
        held=_held(dtype, quantization),
    )


@app.command(epilog="Example: finetune serve outputs/my-run --port 8000")
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(parser=whole(0, 65535), metavar="PORT", help="0 takes any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What requests call the model; MODEL's last part if not given.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A further name that requests may call the server by; again for more."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="A page's origin, http://HOST:PORT, that may use the server; again for more."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="FINETUNE_API_KEY", help="Asked of every request; safer as the variable."),
    ] = None,
    max_batch: Annotated[int, _positive(metavar="N", help="Answers decoded together.")] = 32,
    max_queue: Annotated[
        int, typer.Option(parser=whole(0), metavar="N", help="Answers that may wait; more are refused.")
    ] = 256,
    max_new_tokens: Annotated[
        int | None, _positive(metavar="N", help="Most tokens of an answer; the model's context when not given.")
    ] = None,
    prefix_cache: Annotated[
        int,
        typer.Option(parser=whole(0), metavar="N", help="Tokens remembered of prompts, for those that begin alike."),
    ] = 16_384,
    split_special_tokens: Annotated[
        bool, typer.Option("--split-special-tokens", help="Special tokens in messages are text, as any other words.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every request.")] = False,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
) -> None:
    """Answer over HTTP, with OpenAI's interface."""
    from finetune.serve.app import serve as run

    run(
        model,
        host=host,
        port=port,
        name=check_name(name),
        api_key=read_api_key(api_key),
        allowed_hosts=allowed_host or (),
        allowed_origins=allowed_origin or (),
        max_batch=max_batch,
        max_queue=max_queue,
        max_new_tokens=max_new_tokens,
        prefix_cache=prefix_cache,
        split_special_tokens=split_special_tokens,
        verbose=verbose,
        held=_held(dtype, quantization),
    )


@app.command(epilog="Example: finetune export outputs/my-run outputs/my-model --verify")
def export(
    model: ModelArgument,
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="Folder to write; must not hold files yet.")],
    format: Annotated[
        str, typer.Option(parser=choice(*FORMATS), metavar="|".join(FORMATS), help="Layout to write.")
    ] = "hf",
    dtype: Annotated[
        str,
        typer.Option(
            parser=choice(*DTYPES),
            metavar="|".join(DTYPES),
            help="Weights' numbers; auto keeps them, q8_0 is for gguf only.",
        ),
    ] = "auto",
    quantization: Annotated[
        str,
        typer.Option(
            parser=choice("none", "nf4", "int8"),
            metavar="none|nf4|int8",
            help="Merge a QLoRA run into what these codes of its base stand for, as it was trained, and not the base.",
        ),
    ] = "none",
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and compare it.")] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read pickled weights (.bin, .pdparams) too. A pickle can hold a program; this takes tensors out of "
            "it and refuses the rest, but a hostile file may still crash it or fill the memory.",
        ),
    ] = False,
) -> None:
    """Write a model for other programs: Hugging Face, PaddleNLP, PEFT, GGUF."""
    from finetune.export.export import export as run

    run(
        model,
        output_dir,
        format=format,
        dtype=dtype,
        quantization=quantization,
        verify=verify,
        allow_pickle=allow_pickle,
    )


@app.command(epilog="Example: finetune evaluate outputs/my-run --tasks gsm8k,mmlu --limit 100")
def evaluate(
    model: ModelArgument,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="mmlu, humaneval, gsm8k, ceval, ifeval, or any of lm-evaluation-harness; with commas between.",
        ),
    ],
    limit: Annotated[
        int | None, _positive(metavar="N", help="Only the first N questions of each task or subject.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="All figures, settings and versions.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(parser=whole(0), metavar="N", help="Examples before each question, if not the usual.")
    ] = None,
    batch_size: Annotated[int, _positive(metavar="B", help="Answers decoded together.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="Without the chat template, as for base models.")] = False,
    include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Tasks of your own, in the harness's YAML. Python they name is run."),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that the model writes, here, as you (HumanEval, MBPP).")
    ] = False,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
) -> None:
    """Run benchmarks: those of the Qwen2 model page, or any other of lm-evaluation-harness."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ArgumentError("--tasks names no task", fix="For example --tasks gsm8k,mmlu")
    from finetune.evaluate.run import evaluate as run

    run(
        model,
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        output=output,
        batch_size=batch_size,
        raw=raw,
        include=include,
        allow_code=allow_code,
        held=_held(dtype, quantization),
    )


@app.command(epilog="Example: finetune preview recipes/quickstart_sft_lora.yaml -n 2")
def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    n: Annotated[
        int | None, _positive("-n", metavar="N", help="Rows to show; 3 when not given, all with --json.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per row, on stdout.")] = False,
) -> None:
    """Show what the model will see, and which tokens are trained on."""
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from finetune.rows.preview import preview as run

    run(loaded, 3 if n is None and not json else n, json)


@app.command()
def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also try to reach the model hub.")] = False,
) -> None:
    """Check this machine's installation; each failure comes with its fix."""
    from finetune.doctor import doctor as run

    raise typer.Exit(run(network=network))


@recipes_app.command("list", epilog="Example: finetune recipes list")
def list_recipes() -> None:
    """Name the shipped recipes and what each does."""
    from finetune.recipe.shipped import shipped_recipes, summary

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, file in recipes.items():
        typer.echo(f"{name:<{width}}  {summary(file)}")


@recipes_app.command("show", epilog="Example: finetune recipes show qwen2-0.5b_sft_lora")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a shipped recipe."""
    from finetune.recipe.shipped import shipped_recipe

    typer.echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy", epilog="Example: finetune recipes copy qwen2-0.5b_sft_lora my-recipe.yaml")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    force: Annotated[bool, typer.Option("--force", help="Replace FILE when it exists.")] = False,
) -> None:
    """Copy a shipped recipe to a file of yours, to edit."""
    from finetune.recipe.shipped import copy_shipped, to_edit

    written = copy_shipped(name, file, replace=force)
    keys = to_edit(written)
    width = max(map(len, keys))
    listed = "".join(f"  {key:<{width}}  {what}\n" for key, what in keys.items())
    typer.echo(f"Wrote {written}. What usually needs editing:\n{listed}Then: finetune train {written} --dry-run")


def _answer(model, tokenizer, prompts) -> list[str]:
    """Answers for a run's report. Loaded only when a run has ended, so that none starts later for it."""
    from finetune.infer.samples import answer

    return answer(model, tokenizer, prompts)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit: 0 done, 2 the user's input is wrong, 130 interrupted, 1 anything else."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own
    if debug:
        arguments.remove("--debug")
    sys.exit(_run(arguments, debug))


def _run(arguments: list[str], debug: bool) -> int:
    try:
        check_utf8(arguments)
        code = app(arguments, prog_name="finetune", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        from finetune.console import printable
        from finetune.report.manifest import redact  # an address in a message may hold a password

        said = _describe(error) if isinstance(error, Interrupted) else f"error: {_describe(error)}"
        text = traceback.format_exc().rstrip() if debug else said
        print(printable(redact(text)), file=sys.stderr)
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    if isinstance(error, _UsageError):
        return UserError.exit_code
    return error.exit_code if isinstance(error, FinetuneError) else 1


def _describe(error: Exception) -> str:
    """One plain message for an error, several lines only for several faults."""
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "finetune"
        text = " ".join(error.format_message().replace("Value error, ", "").split())
        return f"{text}{'' if text.endswith(('.', '?')) else '.'} See `{command} --help`."
    if isinstance(error, FinetuneError):
        lines = str(error).splitlines()
        head = [f"{len(error.faults)} things are wrong"] if len(error.faults) > 1 else []
        return "\n  ".join([*head, *lines])
    if isinstance(error, ModuleNotFoundError) and error.name in ("paddle", "paddlenlp"):
        from finetune.doctor import how_to_install

        return f"{error.name} is not installed. Run {how_to_install(sys.version_info[:2])}, then `finetune doctor`."
    if isinstance(error, MemoryError):
        return "out of memory. Lower data.max_length or the batch size."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first = (str(error).strip().splitlines() or [""])[0][:200]
    kind = type(error).__name__
    return f"this is a fault of the program, not of your input ({kind}: {first}). Add --debug to see where."
