"""ContextCache: Foveate's stores behind transformers' cache interface.

transformers sees a logical cache: columns seen, padding included. What is really stored (which entries, at which
positions, in which storage) is the business of `LayerCache`. `update` hands back only the new keys and values: there
is no rectangular tensor of all keys to return once heads keep different entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..cache import LayerCache
from ..errors import CacheError
from ..runtime import Info, Step, compress

if TYPE_CHECKING:
    from .graphs import Captured
    from .transformers import Handle


class ContextLayer(CacheLayerMixin):
    """One layer, as transformers sees it. `cache` holds the entries; `open` is True inside a forward of ours."""

    is_compileable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self, cache: LayerCache | None = None, columns: int = 0):
        super().__init__()
        self.cache = cache if cache is not None else LayerCache()
        self.columns = columns
        self.info: Info | None = None
        self.open = False

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self.cache.evicted

    @property
    def batch_size(self) -> int:
        return len(self.cache.seen) or -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.open:
            raise CacheError(
                "past_key_values: this cache was filled under a Foveate recipe; call foveate.apply(model, recipe) "
                "before using it again, or start without it"
            )
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache, self.columns, self.is_initialized = LayerCache(), 0, False

    def crop(self, tokens_to_remove: int, pads: int = 0) -> None:
        """Forget the last -tokens_to_remove tokens (negative, as transformers counts), of which `pads` are padding in every
        row. CacheError after an eviction."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts in a tensor
        if tokens_to_remove > 0:
            raise CacheError(f"tokens_to_remove: expected a negative number of tokens or 0, got {tokens_to_remove}")
        if tokens_to_remove < 0:
            self.cache.truncate(-tokens_to_remove - pads)
            self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.reorder(torch.arange(len(self.cache.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.reorder(indices)

    def offload(self) -> None:
        raise CacheError("offloading: Foveate's caches stay on the device of the model")

    prefetch = offload  # type: ignore[assignment]


class ContextCache(Cache):
    """Everything a recipe remembers of a context, for all layers. What `past_key_values` is under a recipe.

    Attributes:
        run: the methods' memory for a whole generation. broken: a forward failed half-way, so layers disagree.
        captured: graphs over these stores, see `graphs.py`. padding: (first column, real tokens bool `[B, n]`) of each call
        in which a row had padding; stores know nothing of it.
    """

    layers: list[ContextLayer]  # type: ignore[assignment]

    def __init__(self, layers: list[ContextLayer], handle: Handle | None = None):
        super().__init__(layers=layers)
        self.run: dict[str, Any] = {}
        self.handle = handle
        self.broken = False
        self.captured: Captured | None = None
        self.padding: list[tuple[int, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values and side arrays in all layers."""
        return sum(layer.cache.nbytes for layer in self.layers)

    @property
    def seen(self) -> list[int]:
        """Real tokens each row has seen, evicted ones included."""
        return list(self.layers[0].cache.seen)

    @property
    def evicted(self) -> bool:
        return any(layer.cache.evicted for layer in self.layers)

    def compress(self) -> ContextCache:
        """Apply the recipe's cache policy now instead of at the first decode step: compress once, ask many."""
        if self.handle is None:
            raise CacheError("compress: this cache was not filled under a recipe yet")
        step = Step(run=self.run, notes=self.handle.note_store)
        try:
            for layer in self.layers:
                if layer.cache.pending and layer.info is not None:
                    compress(self.handle.recipe, layer.cache, step, layer.info)
        except BaseException:
            self.broken = True
            raise
        return self

    def skip_compression(self) -> None:
        """Leave the tokens since the last compression as they are: a question about a context compressed before it."""
        for layer in self.layers:
            layer.cache.pending = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens in all layers, or CacheError and none of them is changed: some layers
        may have evicted entries where others keep all, some rows padding among these tokens where others have none."""
        pads, done = self._pads(-int(tokens_to_remove)), 0
        try:
            for layer in sorted(self.layers, key=lambda x: not x.cache.evicted):  # those that refuse come first
                layer.crop(tokens_to_remove, pads)
                done += 1
        except BaseException:
            self.broken = self.broken or done > 0
            raise
        end = self.get_seq_length()
        self.padding = [(first, real[:, : end - first]) for first, real in self.padding if first < end]

    def _pads(self, n: int) -> int:
        """How many of the last n columns are padding, in every row alike."""
        end, found = self.get_seq_length(), [0] * len(self.seen)
        for first, real in self.padding:
            if first < end:
                new = (~real[:, max(0, end - n - first) : end - first]).sum(1).tolist()
                found = [a + b for a, b in zip(found, new, strict=True)]
        if len(set(found)) > 1:
            raise CacheError(
                f"tokens_to_remove: the rows have {found} tokens of padding among the last {n}, so they would lose "
                "different numbers of real ones; take back what is behind the padding, or go on from a fork made before"
            )
        return found[0] if found else 0

    def pad(self, first: int, real: Tensor) -> None:
        """A call whose first token is this column has rows with padding: real tokens bool `[B, n]`."""
        self.padding = [part for part in self.padding if part[0] < first] + [(first, real)]

    def reset(self) -> None:
        super().reset()
        self.run, self.broken, self.captured, self.padding = {}, False, None, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.seen)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._reorder(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._reorder(indices)

    def _reorder(self, rows: Tensor) -> None:
        self.padding = [(first, real[rows.to(real.device)]) for first, real in self.padding]

    def fork(self) -> ContextCache:
        """An independent copy, for asking several questions about one context."""
        layers = []
        for layer in self.layers:
            copy = ContextLayer(layer.cache.fork(), layer.columns)
            copy.info, copy.is_initialized = layer.info, layer.is_initialized
            layers.append(copy)
        out = ContextCache(layers, self.handle)
        out.run, out.broken, out.padding = dict(self.run), self.broken, list(self.padding)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextCache:
        """A fork: the model behind the cache is not copied, nor are graphs."""
        out = memo[id(self)] = self.fork()
        return out

    def save(self, path: str | Path) -> list[str]:
        """Write the entries to one safetensors file, bound to this model's shape and to the recipe's text.

        Returns the names of what methods remembered that a file cannot hold: they compute it again, or do without.
        """
        if self.handle is None:
            raise CacheError("save: this cache was not filled under a recipe yet")
        from ..cache import persist

        layers, recipe = [layer.cache for layer in self.layers], str(self.handle.recipe)
        padding = [(first, [_runs(row) for row in real]) for first, real in self.padding]
        return persist.save(
            path, layers, self.handle.fingerprint, recipe, {"columns": self.get_seq_length(), "padding": padding}
        )

    @staticmethod
    def load(path: str | Path, model: Any) -> ContextCache:
        """Read what `save` wrote, on the model's device; under another recipe than the one that saved it without what
        methods remembered. CacheError if it belongs to another model; ConfigError if no recipe is applied."""
        from ..cache import persist
        from .transformers import handle_of

        handle = handle_of(model)
        layers = []
        caches, about = persist.load(path, handle.fingerprint, device=model.device), persist.inspect(path)
        for cache in caches:
            if about["recipe"] != str(handle.recipe):
                cache.forget()
            layer = ContextLayer(cache, about["extra"].get("columns", max(cache.seen)))
            layer.is_initialized = True
            layers.append(layer)
        out = ContextCache(layers, handle)
        for first, rows in about["extra"].get("padding", []):
            out.padding.append((first, torch.stack([_row(runs) for runs in rows])))
        return out


def _runs(row: Tensor) -> list[int]:
    """Lengths of the runs of a bool `[n]`, beginning with one of False, which may have none."""
    values, counts = row.unique_consecutive(return_counts=True)
    return [0] * bool(values[0]) + counts.tolist()  # type: ignore[no-any-return]


def _row(runs: list[int]) -> Tensor:
    """The inverse of `_runs`."""
    return (torch.arange(len(runs)) % 2).bool().repeat_interleave(torch.tensor(runs))
