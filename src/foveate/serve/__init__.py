"""`foveate serve`: transformers' own OpenAI-compatible server with a recipe on its model.

The server answers one request at a time, in the order in which they come, and never batches them: continuous batching
brings its own attention. What transformers leaves open is closed here: requests are checked before anything runs
(`requests`), and a generation stops when its client is gone, streaming or not (`engine`). `app` puts them together.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from ..recipe import Recipe

EXTRA = ("fastapi", "uvicorn", "openai", "pydantic")


def check_extra() -> None:
    """UnsupportedError with the command that installs what is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"serve: needs {', '.join(missing)}; pip install 'foveate[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to this address (port 0: any free one), before minutes of loading. ConfigError if it is taken."""
    out = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        out.bind((host, port))
    except (OSError, OverflowError) as err:
        out.close()
        raise ConfigError(f"port: cannot listen on {host}:{port}: {getattr(err, 'strerror', None) or err}") from err
    return out


def address(bound: socket.socket) -> str:
    """The address that clients give as their base URL."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def serve(
    model: Any,
    tokenizer: Any,
    recipe: Recipe | str,
    bound: socket.socket,
    *,
    name: str = "foveate",
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve `model` under `recipe` until the process is interrupted; the recipe is taken off again.

    Args:
        model, tokenizer: as `foveate.models.load` gives them.
        bound: a socket from `listen`.
        name: what clients call the model. say: called with a sentence once it listens.
        options: of `foveate.apply`: backend, gate, graphs.

    Raises:
        UnsupportedError: the extra `serve` is not installed, or a model that cannot be served under the recipe.
    """
    check_extra()
    from ..adapters.transformers import use
    from .app import Server, build

    with use(model, recipe, **options) as handle:
        say = say or (lambda text: None)
        text = f"{name} under {handle.recipe} at {address(bound)} (Ctrl-C stops it)"
        Server(build(model, tokenizer, name), lambda: say(text)).run(sockets=[bound])
