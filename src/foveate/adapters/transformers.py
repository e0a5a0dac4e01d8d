"""Hugging Face transformers: a recipe on a model, with one line in and one line out.

One forward pre-hook on the decoder opens a step (cache, real tokens of this call), the attention function registered
under the name "foveate" finds the step of its thread and hands queries, keys and values to the runtime, and a hook
after the forward closes the step. No class is patched; `remove` puts everything back.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import causal_mask_function

from .. import profile
from ..cache import LayerCache
from ..errors import CacheError, ConfigError, ShapeError, UnsupportedError
from ..kernels import dispatch
from ..methods.base import Method
from ..recipe import Recipe
from ..runtime import Info, Meter, Step, attention
from .capability import attention_layers, fingerprint, why_not
from .context import ContextCache, ContextLayer
from .graphs import Graphs
from .rotary import rope_of

NAME = "foveate"


# ---------------------------------------------------------------------- what the user holds
class Handle:
    """A recipe on a model.

    Attributes:
        recipe: what runs. backend: kernel backend by name, or None for the best one. gate: obey the methods' length
        gates. meter: watches every layer's call (see `runtime.Meter`), may be set at any time.
    """

    def __init__(self, model: Any, recipe: Recipe, backend: str | None, gate: bool, meter: Meter | None):
        self.model, self.recipe, self.backend, self.gate, self.meter = model, recipe, backend, gate, meter
        self.note_store: dict[str, None] = {}
        self.decoder = model.get_decoder()
        self.fingerprint = fingerprint(model)
        self.layers = attention_layers(self.decoder)
        self.ropes = {m.layer_idx: rope_of(self.decoder, m) for m in self.layers}
        self._names = list(inspect.signature(self.decoder.forward).parameters)
        self._before = self.decoder.config._attn_implementation
        self._hooks: list[Any] = []
        self._infos: dict[int, tuple[tuple[Any, ...], Info]] = {}
        self.graphs: Graphs | None = None

    @property
    def notes(self) -> list[str]:
        """Sentences worth telling the user, each once: gates that held, layers that keep their own window."""
        return list(self.note_store)

    def __repr__(self) -> str:
        return f"Handle({self.recipe} on {type(self.model).__name__})"

    def remove(self) -> None:
        """Take the recipe off; the model is what it was before `apply`."""
        if self.graphs is not None:
            self.graphs.remove()
            self.graphs = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module in self.layers:
            _HANDLES.pop(module, None)
        self.decoder.set_attn_implementation(self._before)
        _APPLIED.pop(self.decoder, None)

    def _install(self) -> None:
        self.decoder.set_attn_implementation(NAME)
        if self.decoder.config._attn_implementation != NAME:
            raise UnsupportedError(f"model: {type(self.decoder).__name__} does not let its attention function be set")
        self._hooks = [
            self.decoder.register_forward_pre_hook(self._open, with_kwargs=True),
            self.decoder.register_forward_hook(self._close, always_call=True),
        ]
        for module in self.layers:
            _HANDLES[module] = self
        _APPLIED[self.decoder] = self

    # ------------------------------------------------------------------ one forward
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _open(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs  # the model itself says what is missing
        b, n = tokens.shape[:2]
        cache = self._cache(kwargs)
        if cache is not None:
            kwargs["past_key_values"] = cache
        seen = cache.get_seq_length() if cache is not None else 0
        if n == 0:  # what `generate` leaves of a question without the tokens of its document
            before = f"the {seen} tokens of past_key_values and more after them" if seen else "at least one token"
            raise ShapeError(f"input_ids: expected {before}, got no new one")
        valid, counts = _real_tokens(kwargs.get("attention_mask"), b, n, seen)
        if cache is not None and valid is not None:
            cache.pad(seen, valid)
        run = cache.run if cache is not None else {}
        step = Step(valid, counts, run=run, notes=self.note_store, meter=self.meter, gate=self.gate)
        limit = getattr(module.config, "max_position_embeddings", None)
        if limit is not None and seen + n > limit >= seen and not self.recipe.extends:
            step.note(f"{seen + n} tokens are more than the model's {limit} positions; expect nonsense beyond them")
        for layer in cache.layers if cache is not None else ():
            layer.open = True
        _stack().append(Forward(self, cache, step))
        return (), kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _close(self, module: Any, args: Any, output: Any) -> None:
        stack = _stack()
        if not stack or stack[-1].handle is not self:
            return  # the forward never opened
        forward = stack.pop()
        if forward.cache is not None:
            for layer in forward.cache.layers:
                layer.open = False
            if len({layer.columns for layer in forward.cache.layers}) > 1:  # an exception between two layers
                forward.cache.broken = True

    def _cache(self, kwargs: dict[str, Any]) -> ContextCache | None:
        given = kwargs.get("past_key_values")
        use = kwargs.get("use_cache")
        if use is None:
            use = getattr(self.decoder.config, "use_cache", True) and not self.decoder.training
        if isinstance(given, ContextCache):
            if given.broken:
                raise CacheError("past_key_values: a forward over it failed half-way; start again from a fork or a save")
            if len(given.layers) != len(self.layers):
                raise CacheError(f"past_key_values: expected {len(self.layers)} layers, got {len(given.layers)}")
            if given.handle is self:
                return given
            if given.handle is None or given.handle.recipe.describe() != self.recipe.describe():
                for layer in given.layers:  # what other methods remembered beside these entries means nothing here
                    layer.cache.forget()
                given.run = {}
            given.captured = None  # graphs of another recipe's steps, or of another backend's
            given.handle = self
            return given
        if given is None and not use:
            return None
        if given is None or (isinstance(given, DynamicCache) and given.get_seq_length() == 0):
            return ContextCache([ContextLayer() for _ in self.layers], self)
        raise UnsupportedError(
            f"past_key_values: expected None, an empty DynamicCache or a cache filled under a recipe, got "
            f"{type(given).__name__} with {given.get_seq_length()} tokens (do not set cache_implementation)"
        )

    def info(
        self, module: Any, scale: float | None, softcap: float | None, window: int | None, sinks: Tensor | None
    ) -> Info:
        """What the runtime needs to know of a layer: the same as in the last step, unless something was changed."""
        layer = module.layer_idx
        scale = scale if scale is not None else module.head_dim**-0.5
        facts, rope = (scale, softcap, window, self.backend), self.ropes[layer]
        last = self._infos.get(layer)
        if last is not None and last[0] == facts and last[1].sinks is sinks and last[1].rope is rope:
            return last[1]
        info = Info(layer, len(self.layers), scale, softcap, window, sinks, rope, self.backend)
        self._infos[layer] = facts, info
        return info


@dataclass
class Forward:
    """One forward of a decoder, in progress on this thread."""

    handle: Handle
    cache: ContextCache | None
    step: Step


_HANDLES: weakref.WeakKeyDictionary[Any, Handle] = weakref.WeakKeyDictionary()  # attention module -> handle
_APPLIED: weakref.WeakKeyDictionary[Any, Handle] = weakref.WeakKeyDictionary()  # decoder -> handle
_THREAD = threading.local()


def _stack() -> list[Forward]:
    if not hasattr(_THREAD, "stack"):
        _THREAD.stack = []
    return _THREAD.stack  # type: ignore[no-any-return]


def apply(
    model: Any,
    recipe: Recipe | Method | str,
    *,
    backend: str | None = None,
    gate: bool = False,
    meter: Meter | None = None,
    graphs: bool = False,
    compiled: bool | str = False,
) -> Handle:
    """Run `model` under `recipe` from now on; `model.generate` and `model(...)` stay what they were.

    Args:
        model: a transformers causal language model. Models are accepted by what they are (see `capability`).
        recipe: a `Recipe`, a method, or text such as "minference" or "flexprefill@8k+quest+cache=snapkv".
        backend: a kernel backend by name; None picks the first that can serve each call.
        gate: run dense below the lengths from which the methods pay (`payoff.py`).
        meter: watches every call, see `runtime.Meter`.
        graphs: replay decode steps as CUDA graphs where the recipe allows it; `Handle.notes` says where not.
        compiled: with `graphs`, compile the layers of those steps by torch.compile (once for each batch size, which takes a
            minute or so); "tuned" lets it search launch constants as well. Results differ by rounding.

    Raises:
        ConfigError: unknown or impossible recipe, or one is applied already. UnsupportedError: a model that cannot be
        served, with the reason. The model is then as it was.
    """
    recipe = Recipe.of(recipe)
    if compiled not in (False, True, "tuned"):
        raise ConfigError(f"compiled: expected True, False or 'tuned', got {compiled!r}")
    if compiled and not graphs:
        raise ConfigError("compiled: expected graphs=True beside it, since only the layers of captured steps are compiled")
    if backend is not None:
        dispatch.backend(backend)  # an unknown name is an error here, not at the first token
    if (why := why_not(model)) is not None:
        raise UnsupportedError(f"model: {why}")
    if (old := _APPLIED.get(model.get_decoder())) is not None:
        raise ConfigError(f"model: the recipe {old.recipe} is applied already; call foveate.remove(model) first")
    handle = Handle(model, recipe, backend, gate, meter)
    for method in recipe.methods:
        if isinstance(path := getattr(method, "profile", None), str):
            profile.load(path).check(handle.fingerprint)
    try:
        handle._install()
        if graphs:
            handle.graphs = Graphs(handle, compiled)
            handle.graphs.install()
    except Exception:
        handle.remove()
        raise
    return handle


def handle_of(model: Any) -> Handle:
    """The handle of the recipe applied to this model. ConfigError if there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    handle = None if decoder is None else _APPLIED.get(decoder)
    if handle is None:
        raise ConfigError("model: no recipe is applied to it; call foveate.apply(model, recipe) first")
    return handle


def remove(model: Any) -> None:
    """Take the recipe off this model. ConfigError if there is none."""
    handle_of(model).remove()


@contextlib.contextmanager
def use(model: Any, recipe: Recipe | Method | str, **options: Any) -> Iterator[Handle]:
    """`apply` for the length of a with block, also when it is left by an exception. Options as in `apply`."""
    handle = apply(model, recipe, **options)
    try:
        yield handle
    finally:
        handle.remove()


# ---------------------------------------------------------------------- what transformers calls
def _real_tokens(mask: Any, b: int, n: int, seen: int) -> tuple[Tensor | None, list[int]]:
    """(valid `[B, N]` or None if all are, counts) of this call's tokens."""
    if mask is None:
        return None, [n] * b
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"attention_mask: expected the 2-D padding mask [B, tokens], got {got}")
    if tuple(mask.shape) != (b, seen + n):
        raise ShapeError(f"attention_mask: expected [{b}, {seen} seen + {n} new tokens], got {list(mask.shape)}")
    valid = mask[:, -n:].bool()
    counts = valid.sum(-1).tolist()
    return (None, counts) if all(c == n for c in counts) else (valid, counts)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Pads are read in the hook; this exists to see, and refuse, masks that are neither causal nor a window."""
    plain = mask_function is None or mask_function is causal_mask_function or allow_is_causal_skip
    if use_vmap or not plain:
        raise UnsupportedError("attention_mask: packed sequences and overlay masks are not supported under a recipe")
    return attention_mask


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    handle = _HANDLES.get(module)
    if handle is None:
        raise UnsupportedError(f"{type(module).__name__}: attention 'foveate' is set but no recipe is applied to this layer")
    if dropout:
        raise UnsupportedError(f"dropout: attention dropout of {dropout} is not supported under a recipe; use model.eval()")
    if is_causal is False or position_bias is not None:
        raise UnsupportedError("is_causal: recipes describe causal attention without a position bias")
    b, _, n, _ = query.shape
    if key.shape[2] != n:
        raise UnsupportedError(f"key: expected the {n} new keys of self-attention, got {key.shape[2]} (cross-attention?)")
    stack = _stack()
    forward = stack[-1] if stack and stack[-1].handle is handle else None
    info = handle.info(module, scaling, softcap, sliding_window, s_aux)
    if forward is not None and forward.cache is not None:
        layer = forward.cache.layers[module.layer_idx]
        layer.info = info
        try:
            out = attention(handle.recipe, layer.cache, query, key, value, forward.step, info)
        except BaseException:
            forward.cache.broken = True
            raise
        layer.columns += n
    else:  # no cache asked for, or a checkpointed layer run again during backward
        step = forward.step if forward is not None else Step(*_real_tokens(attention_mask, b, n, 0), notes=handle.note_store)
        out = attention(handle.recipe, LayerCache(), query, key, value, step, info)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
