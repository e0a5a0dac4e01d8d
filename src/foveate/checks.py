"""What a layout given by a user must fulfil. Every error names the argument, the value and its place.

Each check waits for the device; layouts that the library builds are trusted and skip them. At the end: the tensors that
arguments of `Layout`'s builders become, for which nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import LayoutError
from .kv import KV
from .lists import BUDGET, INDEX_FIELDS, NO_LIMIT, RULE_FIELDS, covered, repeat_heads, used_slots

if TYPE_CHECKING:
    from .layout import Layout

_AXES = {2: ("batch row", "head"), 3: ("batch row", "head", "slot"), 4: ("batch row", "head", "query block", "slot")}


def place(wrong: Tensor, axes: tuple[str, ...] | None = None) -> str:
    """Where the first True is, in words."""
    at = wrong.nonzero()[0].tolist()
    return ", ".join(f"{axis} {i}" for axis, i in zip(axes or _AXES[len(at)], at, strict=True))


def shape_fits(shape: Sequence[int]) -> None:
    """(B, H, N, M), whole numbers from 1 on."""
    if len(shape) != 4 or not all(hasattr(n, "__index__") and n >= 1 for n in shape):
        raise LayoutError(f"shape: expected four whole numbers B, H, N, M >= 1, got {shape}")


def lists_fit(layout: Layout) -> None:
    """Shapes, ranges and order of every part. One synchronisation, and more only to name the place of an error."""
    shape_fits(layout.shape)
    b, h, n, m = layout.shape
    if layout.block_q < 1 or layout.tile_width < 1 or not 0 <= layout.q_offset < layout.block_q:
        raise LayoutError(
            f"expected block_q >= 1, tile_width >= 1 and 0 <= q_offset < block_q, "
            f"got {layout.block_q}, {layout.tile_width}, {layout.q_offset}"
        )
    q_pos = layout.q_pos
    if q_pos is not None and (tuple(q_pos.shape) != (b, n) or q_pos.is_floating_point()):
        raise LayoutError(f"q_pos: expected int [B, N] = [{b}, {n}], got {q_pos.dtype} {list(q_pos.shape)}")
    rule = {name: t for name in RULE_FIELDS if (t := getattr(layout, name)) is not None}
    for name, t in rule.items():
        _lead(name, t, b, h, 2)
    listed = []
    for name, count_name in INDEX_FIELDS.items():
        index, count = getattr(layout, name), getattr(layout, count_name)
        if index is None:
            continue
        blocked = name in ("tiles", "entries")
        _lead(name, index, b, h, 4 if blocked else 3)
        if blocked and index.shape[2] != layout.num_blocks:
            raise LayoutError(f"{name}: expected {layout.num_blocks} query blocks, got {index.shape[2]}")
        _counted(name, index, count)
        listed.append((name, index, count, m + layout.block_q if name == "diagonals" else m))
    wrong = [(t < 0).any() for t in rule.values()] + [_wrong(index, count, most) for _, index, count, most in listed]
    if wrong and bool(torch.stack([w.to(layout.device) for w in wrong]).any()):
        for name, t in rule.items():
            rule_fits(name, t)
        for name, index, count, most in listed:
            in_range(name, index, count, most)
            ascending(name, index, count)


def _wrong(index: Tensor, count: Tensor, m: int) -> Tensor:
    """bool `[]`: whether `in_range` or `ascending` would raise."""
    used = used_slots(index, count)
    out = (used & ((index < 0) | (index >= m))).any() | ((count < 0) | (count > index.shape[-1])).any()
    return out | (used[..., 1:] & (index[..., 1:] <= index[..., :-1])).any()


def named_once(layout: Layout) -> None:
    """No entry lies inside a tile of its row, and no head has both lists per block and the factored form."""
    if layout.tiles is not None and layout.entries is not None and bool((inside := covered(layout)).any()):
        raise LayoutError(f"entries: an entry lies inside a tile of its row ({place(inside)})")
    both = _heads_with(layout, "tiles", "entries") & _heads_with(layout, "diagonals", "columns")
    if bool(both.any()):
        raise LayoutError(f"a head has lists per block or diagonals and columns, not both ({place(both)})")


def share(layout: Layout) -> int:
    """`Layout.share` of a layout of tiles alone whose tiles lie on the grid, else -1 (one host synchronisation)."""
    tiles, count = layout.tiles, layout.tile_count
    others = any(getattr(layout, name) is not None for name in (*RULE_FIELDS, "entries", "diagonals", "columns", "q_pos"))
    if tiles is None or count is None or others:
        return -1
    _, _, n, m = layout.shape
    off = (used_slots(tiles, count) & (tiles % layout.tile_width != 0)).any()
    listed, off_grid = (int(x) for x in torch.stack([count.sum(), off.to(count.dtype)]).tolist())
    rows = min(n, m) if layout.causal else n  # rows before the first key see none
    visible = rows * m - (rows * (rows - 1) // 2 if layout.causal else 0)
    pairs = listed * layout.block_q * layout.tile_width
    if layout.causal and n == m and layout.block_q == layout.tile_width:  # half of a block on the diagonal is hidden
        last = torch.arange(layout.num_blocks, device=tiles.device) * layout.tile_width
        pairs -= (
            int((used_slots(tiles, count) & (tiles == last[:, None])).sum()) * layout.block_q * (layout.block_q - 1) // 2
        )
    return -1 if off_grid else min(1000, 1000 * pairs // (visible * count.shape[0] * count.shape[1]))


def _heads_with(layout: Layout, *names: str) -> Tensor:
    """bool `[B|1, H]`: heads with anything in these lists."""
    out = torch.zeros(1, layout.shape[1], dtype=torch.bool, device=layout.device)
    for count in (getattr(layout, INDEX_FIELDS[name]) for name in names):
        if count is not None:
            some = (count > 0).flatten(2).any(-1) if count.dim() == 3 else count > 0
            out = out | repeat_heads(some, layout.shape[1])
    return out


def rule_fits(name: str, t: Tensor) -> None:
    """Numbers of the static rule, `[Hl]` or `[B|1, Hl]`, are not negative."""
    if bool((t < 0).any()):
        wrong = (t if t.dim() == 2 else t.view(1, -1)) < 0
        raise LayoutError(f"{name}: expected numbers >= 0, got {int(t.min())} ({place(wrong)})")


def _lead(name: str, t: Tensor, b: int, h: int, dims: int) -> None:
    if t.dim() != dims or t.shape[0] not in (1, b) or t.shape[1] < 1 or h % t.shape[1]:
        raise LayoutError(f"{name}: expected {dims} dimensions [1 or {b}, a divisor of {h}, ...], got {list(t.shape)}")


def _counted(name: str, index: Tensor, count: Tensor | None) -> None:
    if count is None or count.shape != index.shape[:-1]:
        got = None if count is None else list(count.shape)
        raise LayoutError(f"{name}: expected counts of shape {list(index.shape[:-1])}, got {got}")


def in_range(name: str, index: Tensor, count: Tensor | None, m: int) -> None:
    """Counts fit the width, and used indices lie in 0..m-1."""
    width = index.shape[-1]
    _counted(name, index, count)
    assert count is not None
    if bool((wrong := (count < 0) | (count > width)).any()):
        at = place(wrong, _AXES[index.dim()][:-1])
        raise LayoutError(f"{name}: expected counts of 0 to the width {width}, got {int(count[wrong][0])} ({at})")
    if bool((wrong := used_slots(index, count) & ((index < 0) | (index >= m))).any()):
        raise LayoutError(f"{name}: index {int(index[wrong][0])} is outside 0 to {m - 1} ({place(wrong)})")


def ascending(name: str, index: Tensor, count: Tensor) -> None:
    """Used indices rise strictly along each row."""
    step = index[..., 1:].long() - index[..., :-1]
    wrong = used_slots(index, count)[..., 1:] & (step <= 0)
    if bool(wrong.any()):
        what = "duplicated" if int(step[wrong][0]) == 0 else "not ascending"
        *lead, slot = wrong.nonzero()[0].tolist()
        at = torch.zeros_like(index, dtype=torch.bool)
        at[(*lead, slot + 1)] = True
        raise LayoutError(f"{name}: index {int(index[at])} is {what} ({place(at)})")


def disjoint(same: list[tuple[int, Layout]], kv: KV | None) -> None:
    """Layouts over one view (with their part numbers) name no pair twice. Time N x M, memory a few rows of it."""
    b, h, n, m = same[0][1].shape
    for i, layout in same:
        if layout.shape[3] != m:
            raise LayoutError(f"parts: expected M = {m} in part {i} over the same view, got {layout.shape[3]}")
    if len(same) == 1:
        return
    device = max((layout.device for _, layout in same), key=lambda d: d.type != "cpu") if kv is None else kv.device
    for rows in torch.arange(n, device=device).split(max(1, BUDGET // (b * h * m))):
        seen = torch.zeros(b, h, len(rows), m, dtype=torch.bool, device=device)
        for i, layout in same:
            mask = layout.to_mask(kv, rows).to(device)
            if bool((twice := seen & mask).any()):
                at = twice.nonzero()[0].tolist()
                where = f"batch row {at[0]}, head {at[1]}, query {int(rows[at[2]])}, key {at[3]}"
                raise LayoutError(f"parts: part {i} names a pair that an earlier part names ({where})")
            seen |= mask


# ---------------------------------------------------------------------- arguments as tensors
def rule(name: str, x: int | Tensor | None, device: torch.device | str, validate: bool) -> Tensor | None:
    """int32 `[B|1, Hl]` from a number or a tensor `[Hl]` or `[B|1, Hl]`, which `validate` checks."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        if x < 0 or x % 1:
            raise LayoutError(f"{name}: expected a whole number >= 0, got {x}")
        return torch.full((1, 1), min(x, NO_LIMIT), dtype=torch.int32, device=device)
    if validate:
        rule_fits(name, x)
    x = x.to(device, torch.int32)
    return x if x.dim() == 2 else x.view(1, -1)


def int32(name: str, t: Tensor | None) -> Tensor | None:
    """The same indices as int32."""
    if t is not None and t.is_floating_point():
        raise LayoutError(f"{name}: expected integers, got {t.dtype}")
    return None if t is None else t.to(torch.int32)


def counts_of(index: Tensor | None, count: Tensor | None) -> Tensor | None:
    """int32 counts of the rows of `index`: as given, or the whole width."""
    if index is None:
        return None
    if count is None:
        return torch.full(index.shape[:-1], index.shape[-1], dtype=torch.int32, device=index.device)
    return count.to(torch.int32)
