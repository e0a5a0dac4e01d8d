"""The commands `foveate eval`, `frontier`, `recommend` and `train needle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..options import (
    Backend,
    Debug,
    Device,
    Dtype,
    Many,
    Model,
    One,
    Seed,
    lengths_of,
    load_model,
    names_of,
    recipes_of,
)

Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder of results; what is there is not computed again.")]
Made = Annotated[Path, typer.Option("--out", "-o", help="Folder of results that foveate eval wrote.")]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="NAME=FILE, a data file of a task that needs one (qa_1, qa_2); repeatable."),
]
train = typer.Typer(no_args_is_help=True, help="Train the small models that come with Foveate.")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("eval")(evaluate)
    app.command()(frontier)
    app.command()(recommend)
    app.add_typer(train, name="train")


def evaluate(
    model: Model = "smollm2",
    recipe: One = None,
    recipes: Many = None,
    suites: Annotated[
        str, typer.Option(help="Suites, streams or tasks (ruler/vt), separated by commas.")
    ] = "ruler,needle,threads,infinite,mqar,perplexity,agreement",
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer, separated by commas.")] = "4096",
    samples: Annotated[int, typer.Option(help="Samples of each task; streams take a tenth.")] = 100,
    protocols: Annotated[
        str, typer.Option(help="seen, unseen, chunked, turns: whether a cache policy has seen the question, and how.")
    ] = "seen",
    out: Folder = Path("eval"),
    report: Annotated[Path | None, typer.Option(help="Folder of the HTML page; the results folder if not given.")] = None,
    text: Annotated[str | None, typer.Option(help="A UTF-8 text file to take prose from instead of the essays.")] = None,
    data: Data = None,
    batch: Annotated[int | None, typer.Option(help="Samples at once (by length if not given).")] = None,
    looks: Annotated[int, typer.Option(help="Samples of each cell watched for density, mass and needles.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of the cost measurement; 0 for none.")] = 3,
    longppl: Annotated[bool, typer.Option(help="Perplexity of key tokens as well (LongPPL).")] = False,
    beyond: Annotated[bool, typer.Option(help="Allow lengths beyond the model's positions.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Score recipes on long-context suites beside dense attention; safe to stop and start again."""
    from ..recipe import Recipe

    asked = recipes_of(recipe, recipes)
    for one in asked:
        Recipe.of(one)
    sizes = lengths_of(lengths) or []
    names = names_of(suites) or []
    from ..report.console import progress, stderr
    from .suites import choose
    from .text import Source

    choose(names)  # a typing error must not cost the time to load a model
    source = Source.of(text, _files(data))
    console = stderr()
    net, tokenizer = load_model(model, device, dtype, console)
    from ..measure import DEFAULT_RECIPES
    from .runner import run

    options: dict[str, Any] = dict(batch=batch, looks=looks, rounds=rounds, longppl=longppl, beyond=beyond, seed=seed)
    with progress(console) as tick:
        results = run(
            net,
            tokenizer,
            out=out,
            recipes=asked or DEFAULT_RECIPES,
            suites=names,
            lengths=sizes,
            samples=samples,
            protocols=names_of(protocols) or [],
            name=model,
            source=source,
            backend=None if backend == "auto" else backend,
            progress=tick,
            say=lambda told: console.print(told, style="dim", highlight=False, soft_wrap=True),
            **options,
        )
    from ..report import evals
    from ..report.eval_terminal import print_results

    print_results(results)
    page = evals.write(results, report or out)
    console.print(f"results: {out}, page: {page}", highlight=False, soft_wrap=True)


def _files(given: list[str] | None) -> dict[str, Path]:
    files = {}
    for item in given or []:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"data: expected NAME=FILE, got {item!r}")
        if not Path(path).is_file():
            raise ConfigError(f"data: no file {path} (for {name})")
        files[name] = Path(path)
    return files


def frontier(
    out: Made = Path("eval"),
    report: Annotated[Path | None, typer.Option(help="Folder of page and tables; the results folder if not given.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Also write a compact JSON summary to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Quality against density, time and memory from the results of foveate eval: tables, drawings, the Pareto front."""
    from ..report import evals
    from ..report.console import stderr, stdout
    from . import frontier as front
    from .pareto import points
    from .results import Results

    results = Results.load(out)
    found = points(results)
    if not found:
        raise ConfigError(f"results: {out} holds no finished samples yet; foveate eval --out {out} goes on")
    for shown in front.terminal(found):
        stdout().print(shown)
    where = report or out
    for kind in front.KINDS:
        front.write(found, where / f"frontier.{kind}")
    if summary is not None:
        front.write_summary(results, summary)
    page = evals.write(results, where)
    stderr().print(f"tables: {where}/frontier.md, .csv, .json; page: {page}", highlight=False, soft_wrap=True)


def recommend(
    length: Annotated[int, typer.Option(help="Tokens of the prompts you have.")],
    max_loss: Annotated[str, typer.Option(help="Loss of score against dense you accept: 1% or 0.01.")] = "1%",
    by: Annotated[str, typer.Option(help="What to make small: first_token, step or kv_bytes.")] = "first_token",
    model: Annotated[str | None, typer.Option(help="Refuse results of another model.")] = None,
    protocols: Annotated[str | None, typer.Option(help="Only scores under these protocols.")] = None,
    out: Made = Path("eval"),
    debug: Debug = False,
) -> None:
    """The recipe on the front whose measured loss you can live with, and the reason."""
    from .choice import recommend as choose
    from .results import Results

    results = Results.load(out)
    if model is not None and results.facts.get("model") != model:
        raise ConfigError(f"model: {out} holds results of {results.facts.get('model')!r}, not of {model!r}")
    chosen = choose(results, length, _share(max_loss), by, names_of(protocols))
    print(chosen.point.recipe)
    print(chosen.reason)
    for warning in chosen.warnings:
        print(f"note: {warning}")


def _share(text: str) -> float:
    """0.01 of "1%" or "0.01"."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as err:
        raise ConfigError(f"max_loss: expected a share such as 1% or 0.01, got {text!r}") from err


@train.command("needle")
def train_needle(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model; must not hold one yet.")] = Path("needle"),
    minutes: Annotated[float, typer.Option(help="Time of the training; the best checkpoint is kept.")] = 7.0,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    debug: Debug = False,
) -> None:
    """Train the needle model: a few million parameters that solve retrieval at 32K tokens with dense attention."""
    from ..models import pick_device
    from ..report.console import stderr
    from .needle_model.train import train as learn

    console = stderr()
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    learn(out, minutes, seed, str(pick_device(device)), say)
    console.print(f"model: {out} (foveate eval --model {out})", highlight=False, soft_wrap=True)
