"""The command `foveate`. Every error is one line on stderr that says what and how to mend it; `--debug` shows more."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .bench import cli as breakevens
from .calibrate import cli as calibration
from .errors import FoveateError
from .evals import cli as evals
from .options import (
    DEBUG,
    Backend,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Many,
    Model,
    NewTokens,
    One,
    PromptFile,
    Seed,
    Tokens,
    check_output,
    lengths_of,
    load_model,
    names_of,
    prompt_of,
    recipes_of,
    write_json,
)
from .serve import cli as serving


class OneLine(TyperGroup):
    """A command group whose errors are one line and exit code 2; Ctrl-C is 130 and says so."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (FoveateError, OSError, MemoryError) as err:
            if isinstance(err, BrokenPipeError):
                raise
            if ctx.meta.get(DEBUG):
                traceback.print_exc()
            _complain(_sentence(err))
            raise typer.Exit(2) from err

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as err:  # the parser's own: an unknown option, a missing argument
            if not hasattr(err, "format_message"):
                raise
            if text := err.format_message():  # empty after a group without arguments, which printed its help
                _complain(f"{text} (foveate --help lists the commands, foveate COMMAND --help the options)")
            code = getattr(err, "exit_code", 2)
        if code == 130:
            _complain("stopped")
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _sentence(err: BaseException) -> str:
    if isinstance(err, FoveateError):
        return str(err)
    if isinstance(err, MemoryError):
        return "out of memory: use a shorter prompt (--tokens), or --dtype bf16"
    assert isinstance(err, OSError)
    return f"{err.strerror or err}{': ' + str(err.filename) if err.filename else ''}"


def _complain(text: str) -> None:
    print("foveate: " + " ".join(text.split()), file=sys.stderr)


app = typer.Typer(
    cls=OneLine,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Attention only where it matters: run sparse attention on real models and see what it saves and what it loses.",
    epilog="Start with `foveate compare --tokens 2000` (a few minutes on a CPU), `foveate methods` and `foveate doctor`.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed; every command writes JSON with device, versions and spread.")
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"foveate {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")] = False,
) -> None:
    pass


@app.command()
def compare(
    model: Model = "smollm2",
    prompt: PromptFile = None,
    tokens: Tokens = None,
    recipe: One = None,
    recipes: Many = None,
    new_tokens: NewTokens = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    report: Annotated[Path, typer.Option(help="Folder for the HTML page.")] = Path("report"),
    debug: Debug = False,
) -> None:
    """Run dense attention and several recipes on one prompt: speed, memory, agreement, and a report with pictures."""
    from .recipe import Recipe

    asked = recipes_of(recipe, recipes)
    for text in asked:  # a typing error must not cost the time to load a model
        Recipe.of(text)
    check_output(json_file, report)
    from .report.console import stderr

    out = stderr()
    net, tokenizer = load_model(model, device, dtype, out)
    from .measure import DEFAULT_RECIPES, compare
    from .report.console import progress

    made = prompt_of(tokenizer, prompt, tokens, seed)
    with progress(out) as tick:
        result = compare(
            net,
            tokenizer,
            made,
            asked or DEFAULT_RECIPES,
            new_tokens=new_tokens,
            backend=None if backend == "auto" else backend,
            progress=tick,
            seed=seed,
            name=model,
        )
    from .report import summary, write
    from .report.terminal import print_comparison

    if json_file != "-":
        print_comparison(result)
        print(summary(result))
    if json_file is not None:
        write_json(json_file, result.to_json())
    page = write(result, report, command=["foveate", *sys.argv[1:]])
    out.print(f"report, with pictures and what the columns mean: {page}", highlight=False, soft_wrap=True)
    if any(row.error for row in result.rows):
        raise typer.Exit(1)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe, such as flexprefill@8k+quest+cache=snapkv.")],
    model: Model = "smollm2",
    prompt: PromptFile = None,
    tokens: Tokens = None,
    new_tokens: NewTokens = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    seed: Seed = 0,
    gate: Annotated[bool, typer.Option(help="Run dense below the lengths at which a method pays off.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="On CUDA: compile the layers of decode steps (seconds to a minute, once).")
    ] = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt under one recipe, streaming the text."""
    from .recipe import Recipe

    chosen = Recipe.of(recipe)
    from .report.console import stderr

    out = stderr()
    net, tokenizer = load_model(model, device, dtype, out)
    from transformers import TextStreamer

    from .adapters.transformers import use
    from .prompts import check_fits
    from .report.table import seconds, size

    made = prompt_of(tokenizer, prompt, tokens, seed)
    limit = getattr(net.get_decoder().config, "max_position_embeddings", None)
    check_fits(made, None if chosen.extends else limit, new_tokens)
    stamps = [time.perf_counter()]

    class Clocked(TextStreamer):
        """Prints words as they come and remembers when."""

        def put(self, value: Any) -> None:
            super().put(value)
            stamps.append(time.perf_counter())

    ids = made.ids.to(net.device)
    asked = dict(max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
    cuda = net.device.type == "cuda"
    how = dict(backend=None if backend == "auto" else backend, gate=gate, graphs=cuda, compiled=cuda and compiled)
    with use(net, chosen, **how) as handle:
        streamer = Clocked(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stamps[0] = time.perf_counter()
        done = net.generate(ids, attention_mask=ids.new_ones(ids.shape), streamer=streamer, **asked)
    first, rest = stamps[2] - stamps[0], stamps[3:]
    rate = f", {len(rest) / (rest[-1] - stamps[2]):.1f} tokens/s after it" if rest else ""
    held = size(done.past_key_values.nbytes)
    out.print(
        f"{made.tokens} tokens in, first token after {seconds(first)}{rate}, cache {held}", style="dim", highlight=False
    )
    for note in handle.notes:
        out.print(f"note: {note}", style="dim", highlight=False)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[ID]", help="One method, with everything about it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List every method: what it can serve, what it needs, where it comes from; or show one with its options."""
    from .catalogue import entry, print_entry, print_table
    from .registry import METHODS

    found = [entry(n) for n in (METHODS if name is None else [name])]
    if as_json:
        listed = [e.to_dict() for e in found]
        print(json.dumps(listed if name is None else listed[0], indent=1))
    elif name is None:
        print_table(found)
    else:
        print_entry(found[0])


@app.command()
def doctor(
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="The dtype of the self-test.")] = "fp32",
    test: Annotated[bool, typer.Option(help="Compute every sample with every backend and compare with the oracle.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices and the compiler, which backend runs which layout and why, and test them."""
    from .doctor import examine
    from .models import pick_device, pick_dtype
    from .report.terminal import print_checkup

    where = pick_device(device)
    from .report.console import stderr

    out = stderr()
    with out.status("looking around") as status:
        report = examine(where, pick_dtype(dtype, where), test=test, say=status.update)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print_checkup(report)
    if not report.healthy:
        raise typer.Exit(1)


# ---------------------------------------------------------------------- bench
@bench.command("kernels")
def bench_kernels(
    device: Device = "auto",
    lengths: Annotated[str | None, typer.Option(help="Tokens, separated by commas.")] = None,
    cases: Annotated[str | None, typer.Option(help="Workloads to keep, separated by commas.")] = None,
    against: Annotated[str | None, typer.Option(help="Baselines, backends and peers, separated by commas.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="The checkout of a peer, NAME=PATH (fsa, minference).")] = None,
    rounds: Annotated[int, typer.Option(help="Alternating rounds.", min=1)] = 3,
    budget: Annotated[float | None, typer.Option(help="Seconds after which no further problem is started.")] = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Time the attention kernels on seeded workloads against the dense baselines of this machine."""
    from .bench import kernels
    from .models import pick_device
    from .report.console import progress, stderr

    where = pick_device(device)
    shapes = kernels.default_shapes(where, lengths_of(lengths))
    with progress(stderr()) as tick:
        impls = kernels.beside(names_of(against), where)
        options: dict[str, Any] = dict(cases=names_of(cases), impls=impls, rounds=rounds, budget=budget)
        result = kernels.run(device=where, shapes=shapes, progress=tick, paths=kernels.paths_of(peer), **options)
    _emit(result, kernels.table(result), json_file)


@bench.command("prefill")
def bench_prefill(
    model: Model = "smollm2",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8000,
    recipe: One = None,
    recipes: Many = None,
    rounds: Annotated[int, typer.Option(help="Alternating rounds; the order turns round each time.")] = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Time to first token: stock transformers with SDPA, recipe dense, and other recipes, in alternating order."""
    _bench_model("prefill", model, tokens, recipe, recipes, rounds, 0, device, dtype, backend, seed, json_file)


@bench.command("decode")
def bench_decode(
    model: Model = "smollm2",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8000,
    recipe: One = None,
    recipes: Many = None,
    rounds: Annotated[int, typer.Option(help="Alternating rounds; the order turns round each time.")] = 6,
    steps: Annotated[int, typer.Option(help="Tokens of each recipe in a round.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Seconds per token after a long prompt: stock transformers with SDPA, recipe dense, and other recipes."""
    _bench_model("decode", model, tokens, recipe, recipes, rounds, steps, device, dtype, backend, seed, json_file)


def _bench_model(
    what: str,
    model: str,
    tokens: int,
    recipe: list[str] | None,
    recipes: str | None,
    rounds: int,
    steps: int,
    device: str,
    dtype: str,
    backend: str,
    seed: int,
    json_file: str | None,
) -> None:
    from .recipe import Recipe

    asked = recipes_of(recipe, recipes)
    for text in asked:
        Recipe.of(text)
    from .report.console import stderr

    out = stderr()
    net, tokenizer = load_model(model, device, dtype, out)
    from .bench import end_to_end
    from .report.console import progress

    made = prompt_of(tokenizer, None, tokens, seed)
    options: dict[str, Any] = dict(rounds=rounds, backend=None if backend == "auto" else backend, name=model)
    with progress(out) as tick:
        if what == "prefill":
            result = end_to_end.prefill(net, made, asked or end_to_end.PREFILL, progress=tick, **options)
        else:
            result = end_to_end.decode(net, made, asked or end_to_end.DECODE, steps=steps, progress=tick, **options)
    _emit(result, end_to_end.table(result), json_file)


def _emit(result: dict[str, Any], text: str, json_file: str | None) -> None:
    """Print a benchmark as text, and write its result file if asked."""
    if json_file is not None:
        write_json(json_file, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if json_file != "-":
        print(text)


breakevens.register(bench)
evals.register(app)
calibration.register(app)
serving.register(app)


def main() -> None:
    """The console entry point."""
    app()


if __name__ == "__main__":
    main()
