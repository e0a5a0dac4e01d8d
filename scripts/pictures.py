"""Pictures of the layouts that methods make, as small PNG files of four colours, drawn without a plotting library.

Every method reads the same 256 tokens, synthetic queries and keys in which two heads have what sparse methods look for:
a few keys that everyone looks at, one distance, runs of rows that look at runs of keys, and recent tokens. It runs with
the small budget of its row in tests/test_methods.py.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.drive import Drive
from tests.test_methods import TABLE
from torch import Tensor

from foveate.errors import FoveateError
from foveate.layout import Layout, Part, Parts
from foveate.recipe import Recipe
from foveate.registry import get

TOKENS, PROMPT, D, HEADS, GROUPS, GAP = 256, 192, 16, 4, 2, 8
LATER, LEFT, TAKEN, READ = range(4)  # what a pixel is
COLOURS = ((255, 255, 255), (226, 229, 234), (59, 118, 181), (186, 207, 230))
ROWS = {row.id: row for row in TABLE}


def case() -> tuple[Tensor, Tensor, Tensor]:
    """q `[1, H, N, D]`, k and v `[1, G, N, D]`, fp32, always the same."""
    gen = torch.Generator().manual_seed(7)
    make = lambda *s: torch.randn(*s, generator=gen)  # noqa: E731
    n, q, k, v = TOKENS, make(1, HEADS, TOKENS, D), make(1, GROUPS, TOKENS, D), make(1, GROUPS, TOKENS, D)
    for at in (3, 61, 150):  # keys that head 0 looks at from everywhere
        k[0, 0, at] = 0.0
        k[0, 0, at, 0] = 5.0
    q[0, 0, :, 0] = 3.0
    q[0, 1] = 0.4 * q[0, 1] + 2.5 * torch.roll(k[0, 0], 40, 0)  # head 1: the key 40 tokens ago
    codes, at = make(6, D), torch.arange(n)
    k[0, 1] = 0.5 * k[0, 1] + 2.0 * codes[at // 32 * 5 % 6]  # head 2: runs of rows and runs of keys
    q[0, 2] = 0.5 * q[0, 2] + 1.5 * codes[at // 48 % 6]
    smooth = torch.cumsum(make(n, D), 0) / 6  # head 3: what is near
    q[0, 3], k[0, 1] = smooth, k[0, 1] + smooth
    return q, k, v


class Canvas:
    """A meter that paints the pairs of every call: rows and columns are positions in the text."""

    def __init__(self) -> None:
        self.pixels = torch.full((HEADS, TOKENS, TOKENS), LATER, dtype=torch.uint8)
        for i in range(TOKENS):
            self.pixels[:, i, : i + 1] = LEFT
        self.colour = TAKEN

    def planned(self, x: Any, plan: Any, seconds: float) -> None:
        pass

    def attended(self, x: Any, plan: Layout | Parts, out: Tensor) -> None:
        rows = x.start + torch.arange(x.q.shape[2]) if x.q_pos is None else x.q_pos[0]
        for part in plan.parts if isinstance(plan, Parts) else [Part(plan)]:
            kv = x.kv if part.kv is None else part.kv
            if kv.pos is None and kv.capacity != x.kv.capacity:
                raise FoveateError("parts of their own views")  # whose entry numbers say nothing about the text
            where = x.kv.pos if kv.pos is None else kv.pos
            at = torch.arange(kv.capacity) if where is None else where[0]
            at = at.expand(GROUPS, -1).repeat_interleave(HEADS // GROUPS, 0)  # [H, M], text position of each entry
            mask = part.layout.to_mask(kv)[0].expand(HEADS, -1, -1)
            if kv.bias is not None:
                mask = mask & (kv.bias[0].repeat_interleave(HEADS // GROUPS, 0) > float("-inf"))[:, None]
            head, row, entry = mask.nonzero(as_tuple=True)
            i, j = rows[row], at[head, entry].long()
            real = (j >= 0) & (j <= i)  # an entry that stands for several has no place of its own
            self.pixels[head[real], i[real], j[real]] = self.colour


@dataclass(frozen=True)
class Picture:
    """uint8 `[heads, rows, keys]` of LATER, LEFT, TAKEN and READ, and the (role, recipe part) that made it."""

    pixels: Tensor
    role: str
    part: str


def draw(name: str) -> Picture | None:
    """The first of a method's roles in which it leaves something out of this text, or None if there is none."""
    for role in get(name).roles if name in ROWS else ():
        pixels = paint(role, ROWS[name].small)
        if pixels is not None and bool((pixels == LEFT).any()):
            return Picture(pixels, role, re.sub(r"profile=[^,]+", "profile=...", ROWS[name].small))
    return None


@torch.no_grad()
def paint(role: str, part: str) -> Tensor | None:
    """What a method computes in this role, or None where that cannot be seen here.

    In prefill it reads all tokens in one call; otherwise it reads `PROMPT` of them and takes the rest one by one.
    """
    torch.manual_seed(0)
    q, k, v = case()
    canvas = Canvas()
    try:
        drive = Drive(Recipe.of(f"{role}={part}"), d=D)
        drive.watch = canvas
        call: Callable[..., Tensor] = lambda a, b: drive(*(t[:, :, a:b] for t in (q, k, v)))  # noqa: E731
        if role in ("prefill", "heads"):
            call(0, TOKENS)
        else:
            canvas.colour = READ
            call(0, PROMPT)
            canvas.colour = TAKEN
            for i in range(PROMPT, TOKENS):
                call(i, i + 1)
    except FoveateError:
        return None
    return canvas.pixels


# ---------------------------------------------------------------------- files
def png(pixels: Tensor) -> bytes:
    """The heads side by side as a PNG with two bits a pixel."""
    gap = torch.full((TOKENS, GAP), LATER, dtype=torch.uint8)
    wide = torch.cat([part for head in pixels for part in (head, gap)][:-1], 1)
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[1] % 4))
    quads = wide.unflatten(1, (-1, 4)).int()
    rows = (quads[..., 0] << 6 | quads[..., 1] << 4 | quads[..., 2] << 2 | quads[..., 3]).to(torch.uint8)
    raw = b"".join(b"\0" + bytes(row.tolist()) for row in rows)
    head = struct.pack(">IIBBBBB", wide.shape[1], TOKENS, 2, 3, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"PLTE", bytes(c for colour in COLOURS for c in colour)), (b"IDAT", zlib.compress(raw, 9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in [*chunks, (b"IEND", b"")])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def read(data: bytes) -> Tensor:
    """The pixels of a file that `png` made. ValueError for any other."""
    at, packed, width = 8, b"", 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, *rest = struct.unpack(">IIBBBBB", body)
            if height != TOKENS or rest != [2, 3, 0, 0, 0]:
                raise ValueError(f"png: expected {TOKENS} rows of two bits a pixel, got {height} and {rest}")
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    rows = torch.tensor(list(zlib.decompress(packed)), dtype=torch.uint8).view(TOKENS, -1)[:, 1:].int()
    flat = torch.stack([rows >> 6, rows >> 4 & 3, rows >> 2 & 3, rows & 3], -1).flatten(1).to(torch.uint8)
    return torch.stack([flat[:, i : i + TOKENS] for i in range(0, width - TOKENS + 1, TOKENS + GAP)])


def same(data: bytes, pixels: Tensor) -> bool:
    """Whether a file shows these pixels. Near ties may fall otherwise on another processor, so one in 500 may differ."""
    there = read(data)
    return there.shape == pixels.shape and bool((there != pixels).float().mean() <= 0.002)
