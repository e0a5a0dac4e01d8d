"""The command `foveate calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..options import Backend, Debug, Device, Dtype, Model, load_model

if TYPE_CHECKING:
    from ..profile import Profile


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("calibrate")(calibrate)


def calibrate(
    method: Annotated[str, typer.Argument(help="A method, such as minference, xattention:block=64 or duo.")],
    model: Model = "smollm2",
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="A UTF-8 text file to calibrate on; repeatable. None: built-in.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="recall=0.95 (mass kept), mass=0.95 (the same, with settings by head), density=0.1 (pairs computed) or "
            "loss=1% (output error)."
        ),
    ] = "recall=0.95",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4096,
    samples: Annotated[
        int | None, typer.Option(help="Prompts to search on (4), or steps of a procedure that trains (duo: 200).")
    ] = None,
    held: Annotated[int, typer.Option(help="Further prompts, on which the result is checked.")] = 2,
    layers: Annotated[str | None, typer.Option(help="Layers to look at, such as 0,4-7; all if not given.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the profile; a second run goes on.")] = Path("profile"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of the choice of prompts and whatever the search draws.")] = 0,
    debug: Debug = False,
) -> None:
    """Search a method's hyperparameters on your model and texts, check them on others, and write a profile."""
    from ..methods.search import Target

    chosen, aim = numbers(layers), Target.parse(target)
    for file in data or []:
        if not file.is_file():
            raise ConfigError(f"data: no file {file}")
    from .loop import _method, run

    _method(method)  # a typing error must not cost the time to load a model
    from ..report.console import progress, stderr

    console = stderr()
    net, tokenizer = load_model(model, device, dtype, console)
    with progress(console) as tick:
        found = run(
            net,
            tokenizer,
            method,
            out=out,
            target=aim,
            data=data or [],
            length=length,
            samples=samples,
            held=held,
            layers=chosen,
            seed=seed,
            name=model,
            backend=None if backend == "auto" else backend,
            progress=tick,
            say=lambda told: console.print(told, style="dim", highlight=False, soft_wrap=True),
        )
    print(summary(found))
    console.print(f"profile: {out} ({found.report['seconds']:g} s)", highlight=False, soft_wrap=True)


def summary(found: Profile) -> str:
    """Target, figures on calibration and held-out prompts, and the recipe that uses the profile."""
    lines = [f"target      {found.target}"]
    lines += [f"searched    {told}"] if (told := _figures(found.report.get("search", {}))) else []
    if (held := found.report["held_out"]) is not None:
        lines.append(f"held out    {_figures(held)}: {'meets' if held['meets'] else 'misses'} the target")
    return "\n".join([*lines, f"recipe      {found.report['recipe']}"])


def _figures(of: dict[str, Any]) -> str:
    names = {"recall": "recall", "loss": "loss", "computed": "density"}
    return ", ".join(f"{told} {of[name]:.4f}" for name, told in names.items() if isinstance(of.get(name), float))


def numbers(text: str | None) -> list[int] | None:
    """[0, 4, 5, 6, 7] of "0,4-7"; None of None. ConfigError for anything else."""
    if text is None:
        return None
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            out += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError as err:
            raise ConfigError(f"layers: expected numbers and ranges such as 0,4-7, got {text!r}") from err
    return out
