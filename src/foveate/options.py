"""Options and small helpers that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from .prompts import Prompt

DEBUG = "foveate.debug"  # key in the click context


def set_debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        import logging

        ctx.meta[DEBUG] = True
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("foveate").setLevel(logging.DEBUG)
    return value


Model = Annotated[
    str, typer.Option(help="A Hugging Face id or folder, a .gguf file, smollm2 (in the demo extra) or needle (built in).")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32; auto times one product on the CPU and chooses.")]
Seed = Annotated[int, typer.Option(help="Order of the essays and choice of the sampled rows.")]
Backend = Annotated[str, typer.Option(help="Kernel backend by name; auto takes the best that can (see doctor).")]
PromptFile = Annotated[str | None, typer.Option("--prompt", "-p", help="A text file, or - for standard input.")]
Tokens = Annotated[
    int | None, typer.Option(help="Length of the built-in prompt: essays with a planted fact (7000 if not given).")
]
JsonFile = Annotated[str | None, typer.Option("--json", help="Write every figure to this file (- for standard output).")]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate.")]
Debug = Annotated[bool, typer.Option("--debug", callback=set_debug, is_eager=True, help="Show tracebacks.")]
One = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe", "-r", help="A recipe, such as flexprefill@8k or flexprefill@8k+quest+cache=snapkv; repeatable."
    ),
]
Many = Annotated[str | None, typer.Option(help="Several recipes, separated by semicolons or commas.")]


# ---------------------------------------------------------------------- what they mean
def recipes_of(one: list[str] | None, many: str | None) -> list[str]:
    """Recipes of --recipe and --recipes, in order. ConfigError if the options are there but name none."""
    found = [*(one or []), *_split(many or "")]
    cleaned = [text.strip() for text in found if text.strip()]
    if not cleaned and (one or many):
        raise ConfigError("recipes: expected at least one recipe; foveate methods lists the parts")
    return cleaned


def _split(many: str) -> list[str]:
    """Recipes separated by semicolons or commas; "key=value" after a comma is an option of the recipe before it."""
    if ";" in many:
        return many.split(";")
    out: list[str] = []
    for piece in many.split(","):
        head = piece.partition("=")[0].strip()
        option = "=" in piece and not set(head) & set("+:@") and head not in ("prefill", "decode", "cache", "heads")
        if option and out:
            out[-1] += "," + piece
        else:
            out.append(piece)
    return out


def load_model(model: str, device: str, dtype: str, out: Console) -> tuple[Any, Any]:
    with out.status(f"loading {model}") as status:
        from .models import load

        return load(model, device=device, dtype=dtype, say=status.update)


def prompt_of(tokenizer: Any, file: str | None, tokens: int | None, seed: int) -> Prompt:
    from .prompts import needle_prompt, read_text, text_prompt

    if file is None:
        return needle_prompt(tokenizer, 7000 if tokens is None else tokens, seed=seed)
    if tokens is not None:
        raise ConfigError("tokens: sets the length of the built-in prompt; leave it out with --prompt")
    if file == "-":
        return text_prompt(tokenizer, sys.stdin.read(), "standard input")
    return text_prompt(tokenizer, read_text("prompt", file), Path(file).name)


def check_output(json_file: str | None, report: Path) -> None:
    """Complain about unusable places before minutes of work, not after."""
    if report.exists() and not report.is_dir():
        raise ConfigError(f"report: {report} is a file; give a folder")
    if json_file not in (None, "-") and Path(json_file or "").is_dir():
        raise ConfigError(f"json: {json_file} is a folder; give a file")
    for place in [report, *([Path(json_file).parent] if json_file not in (None, "-") and json_file else [])]:
        near = next(p for p in (place, *place.absolute().parents) if p.exists())
        if not os.access(near, os.W_OK):
            raise ConfigError(f"cannot write below {near}: permission denied")


def write_json(path: str, text: str) -> None:
    if path == "-":
        print(text, end="")
        return
    from .report.files import write_atomic

    write_atomic(path, text)


def names_of(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def lengths_of(text: str | None) -> list[int] | None:
    names = names_of(text)
    try:
        return None if names is None else [int(name) for name in names]
    except ValueError as err:
        raise ConfigError(f"lengths: expected whole numbers separated by commas, got {text!r}") from err
