"""The decoder's layers through torch.compile, for steps that become CUDA graphs.

Norms, rotary embedding, activation and residual sums of a layer are chains of small kernels; the compiler makes a few of
them. The attention function stays outside (`torch.compiler.disable`), so a layer is four pieces of code, compiled once for
all layers that look alike. What the compiled code checks and where it breaks costs the host only at the capture. The norm
behind the last layer is compiled as well, and with `tuned` the head: for batches of one the compiler may then make its
product a kernel of its own, as it may those of the layers.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .transformers import Handle

TUNED = {"coordinate_descent_tuning": True}  # products of one row become kernels of their own, launch constants are tried


class Layers:
    """A with block in which the decoder's layers run compiled; outside of it the model is what it was.

    Args:
        handle: the recipe on the model. tuned: let Inductor search launch constants (slower to compile).
        backend: of torch.compile; tests name a cheap one.
    """

    def __init__(self, handle: Handle, tuned: bool = False, backend: Any = "inductor"):
        self.handle, self.options = handle, TUNED if tuned and backend == "inductor" else None
        self.layers = [m for m in getattr(handle.decoder, "layers", ()) if isinstance(m, torch.nn.Module)]
        self.modules = [*self.layers, *self._beside(tuned)]
        self.tried: set[tuple[int, ...]] = set()
        code: dict[type, Any] = {}
        for m in self.modules:
            if type(m) not in code:
                code[type(m)] = torch.compile(type(m).forward, backend=backend, dynamic=False, options=self.options)
        self.forwards = [functools.partial(_call, code[type(m)], m) for m in self.modules]

    def _beside(self, tuned: bool) -> list[torch.nn.Module]:
        """The norm and the head, where nobody else has replaced their forward."""
        norm, head = getattr(self.handle.decoder, "norm", None), self.handle.model.get_output_embeddings()
        found = [norm] if isinstance(norm, torch.nn.Module) else []
        if tuned and type(head) is torch.nn.Linear:
            found.append(head)
        return [m for m in found if "forward" not in vars(m)]

    def why_not(self) -> str | None:
        """Why these layers cannot be compiled, or None."""
        if len(self.layers) != len(self.handle.layers):
            return f"{type(self.handle.decoder).__name__} keeps its layers elsewhere than in `layers`"
        if any("forward" in vars(m) for m in self.layers):
            return "another library has replaced the forward of its layers"
        return None

    def trial(self, forward: Any, ids: Tensor, at: Tensor) -> str | None:
        """Compile for this shape `[B, 1]` in a step without a cache; why that failed, or None.

        Nothing of it stays: an error half-way through a real step would leave a cache that layers disagree about.
        """
        if tuple(ids.shape) in self.tried:
            return None
        notes = dict(self.handle.note_store)
        try:
            with self:
                forward(input_ids=ids, position_ids=at, use_cache=False, logits_to_keep=ids.shape[1])
        except Exception as err:
            said = [line.strip() for line in str(err).splitlines() if line.strip()]
            return f"torch.compile failed: {type(err).__name__}: {' '.join(said[:2])}"
        finally:
            self.handle.note_store.clear()
            self.handle.note_store.update(notes)
        self.tried.add(tuple(ids.shape))
        return None

    def __enter__(self) -> Layers:
        for module, forward in zip(self.modules, self.forwards, strict=True):
            module.forward = forward
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        for module in self.modules:
            vars(module).pop("forward", None)


def _call(code: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward without its cache, which our attention function finds by itself.

    With one, every layer would ask for its own entry by number, and be compiled for that number.
    """
    for name, value in (("past_key_values", None), ("use_cache", False)):
        if kwargs.get(name) is not None:
            kwargs[name] = value
    return code(module, *args, **kwargs)
