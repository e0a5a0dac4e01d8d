"""The command `foveate serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Backend, Debug, Device, Dtype, Model, load_model


def register(app: typer.Typer) -> None:
    """Add `foveate serve`."""

    @app.command("serve")
    def command(
        model: Model = "smollm2",
        recipe: Annotated[str, typer.Option("--recipe", "-r", help="The recipe every answer runs under.")] = "dense",
        host: Annotated[str, typer.Option(help="Address to listen on; who reaches it may use the model.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.", min=0, max=65535)] = 8000,
        device: Device = "auto",
        dtype: Dtype = "auto",
        backend: Backend = "auto",
        gate: Annotated[bool, typer.Option(help="Run dense below the lengths at which a method pays off.")] = False,
        compiled: Annotated[
            bool, typer.Option("--compile", help="On CUDA: compile the layers of decode steps (seconds to a minute, once).")
        ] = False,
        debug: Debug = False,
    ) -> None:
        """Serve one model under one recipe: transformers' OpenAI-compatible server, one answer at a time."""
        from ..recipe import Recipe
        from . import check_extra, listen, serve

        chosen = Recipe.of(recipe)
        check_extra()
        bound = listen(host, port)
        from ..report.console import stderr

        out = stderr()
        net, tokenizer = load_model(model, device, dtype, out)
        name = Path(model).name if Path(model).exists() else model
        cuda = net.device.type == "cuda"
        how: dict[str, Any] = dict(
            backend=None if backend == "auto" else backend, gate=gate, graphs=cuda, compiled=cuda and compiled
        )
        say = lambda text: out.print(f"serving {text}", highlight=False, soft_wrap=True)  # noqa: E731
        serve(net, tokenizer, chosen, bound, name=name, say=say, **how)
