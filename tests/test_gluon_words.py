"""What partitions of the Gluon kernels tell each other through shared memory is ordered: checked in the PTX, without a GPU.

A word is stored by all lanes of one partition and read by all lanes of another; between them is an mbarrier on which ONE
lane arrives. Its arrive releases what that lane did before, so the lanes must meet in between:

    stores of lanes -> barrier of the partition -> arrive (release) -> wait of every lane (acquire) -> loads
    loads of lanes -> barrier of the partition -> arrive (release) -> wait of every lane (acquire) -> next stores

`broken` follows every path through the PTX: no access of shared memory may reach an arrive without a barrier of its
partition in between. Copies by cp.async must be fenced by every lane before that barrier (`kernels/gluon/columns.py`).
That arrives and waits meet at the right entry of the ring is a matter of the source: `test_every_access_is_ordered`
runs it under the emulator with vector clocks.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from foveate.kernels import gluon
from tests import gluon_emulator as emulator
from tests import gluon_machine as machine

ACCESS = re.compile(r"(ld|st|atom|red)\.(volatile\.)?shared|ldmatrix|stmatrix")


# ---------------------------------------------------------------------- paths through PTX
class Code:
    """Instructions of a kernel. text: of each one; after: where control goes next; part: which partition it belongs to."""

    def __init__(self, ptx: str):
        body = ptx[ptx.index(".entry") :]
        self.text: list[str] = []
        labels: dict[str, int] = {}
        targets: dict[str, list[str]] = {}
        label, table = "", None
        for line in body.splitlines():
            line = line.split("//")[0].strip().strip("{}").strip()
            if found := re.match(r"([$\w]+):\s*", line):
                label, line = found[1], line[found.end() :]
                labels[label] = len(self.text)  # the wait loops share a name; their branches are not followed
            if line.startswith(".branchtargets"):
                table = label
                targets[table] = []
            if table is not None:
                targets[table] += re.findall(r"\$L\w+", line)
                table = None if line.endswith(";") else table
            elif line.endswith(";") and not line.startswith("."):
                self.text.append(line)
        self.after = [self._next(i, labels, targets) for i in range(len(self.text))]
        self.part = self._parts()
        warps = defaultdict(set)
        for text, part in zip(self.text, self.part):
            if found := re.match(r"bar(?:rier)?\.(warp\.)?sync\S*\s+([^;]*)", text):
                warps[part].add(32 if found[1] else int(found[2].split(",")[-1]) if "," in found[2] else 0)
        self.lanes = {part: max(sizes) for part, sizes in warps.items()}

    def _next(self, i: int, labels: dict[str, int], targets: dict[str, list[str]]) -> list[int]:
        text = self.text[i]
        if found := re.search(r"\bbrx\.idx\s+\S+,\s*(\S+);", text):
            return [labels[name] for name in targets[found[1]]]
        if re.match(r"(ret|exit|trap);", text):
            return []
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", text)
        on = [i + 1] if i + 1 < len(self.text) else []
        if jump is None:
            return on
        return [labels[jump[1]]] if not text.startswith("@") else [labels[jump[1]], *on]

    def _parts(self) -> list[int]:
        """Partitions are what is left of the graph without the barriers of all warps and the jump between partitions."""
        root = list(range(len(self.text)))

        def find(i: int) -> int:
            while root[i] != i:
                root[i] = root[root[i]]
                i = root[i]
            return i

        cut = [bool(re.match(r"barrier\.sync\s+\d+;|brx", text)) for text in self.text]
        for i, after in enumerate(self.after):
            for j in after:
                if not cut[i] and not cut[j]:
                    root[find(i)] = find(j)
        return [find(i) for i in range(len(root))]

    def meets(self, i: int) -> bool:
        """Whether instruction i is a barrier of all lanes of its partition."""
        text = self.text[i]
        if text.startswith("@"):
            return False
        return bool(re.match(r"bar(rier)?\.sync", text)) or (
            text.startswith("bar.warp.sync") and self.lanes[self.part[i]] == 32
        )


def broken(ptx: str) -> list[str]:
    """What is wrong with the order of accesses and arrives; see the top of this file."""
    code, wrong = Code(ptx), []
    state: list[frozenset[tuple[str, int]] | None] = [None] * len(code.text)
    waited: list[bool] = [True] * len(code.text)
    state[0], waited[0] = frozenset(), False
    todo = [0]
    while todo:
        i = todo.pop()
        text, now, seen = code.text[i], state[i], waited[i]
        assert now is not None
        if ACCESS.search(text) and "mbarrier" not in text:
            now |= {("access", i)}
        elif text.startswith("cp.async.wait_"):
            now |= {("copy", i)}
        elif text.startswith("fence.proxy.async"):
            now = frozenset(("access", at) for _, at in now)
        elif code.meets(i):
            now = frozenset(x for x in now if x[0] == "copy")
        if text.startswith("mbarrier.try_wait") or re.match(r"(@\S+ )?st\.shared", text):
            seen = True  # what a partition stores itself, it may read: `meets` is Triton's concern there
        if text.startswith("barrier.sync"):
            seen = False
        for j in code.after[i]:
            merged = now if state[j] is None else state[j] | now
            if merged != state[j] or (waited[j] and not seen):
                state[j], waited[j] = merged, waited[j] and seen
                todo.append(j)
    multiplies = {code.part[i] for i, text in enumerate(code.text) if "wgmma.mma_async" in text}
    for i, text in enumerate(code.text):
        if state[i] is None:
            continue
        if (
            "mbarrier.arrive." in text and "expect_tx" not in text
        ):  # that announces bytes; words have an arrival of their own
            wrong += [f"{code.text[at]} reaches {text} without {'a fence' if kind == 'copy' else 'a barrier'}"
                      for kind, at in sorted(state[i])]  # fmt: skip
        if "mbarrier" in text and re.search(r"relaxed|mbarrier\.test_wait", text):
            wrong.append(f"{text} orders nothing")
        if "mbarrier.try_wait" in text and text.startswith("@"):
            wrong.append(f"{text} is not for every lane")
        if re.match(r"ld\.shared", text) and code.part[i] in multiplies and not waited[i]:
            wrong.append(f"{text} waits for nothing")
    return wrong


# ---------------------------------------------------------------------- the kernels
def meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


FLOAT, BF16 = torch.float32, torch.bfloat16


def forward(kind, d=128):
    from foveate.kernels.gluon.kernel import attend_kernel
    from foveate.kernels.gluon.launch import arguments
    from foveate.kernels.gluon.prepare import Work
    from foveate.layout import Layout

    q, k = meta(1, 4, 4096, d, dtype=BF16), meta(1, 2, 4096, d, dtype=BF16)
    tiles, columns = meta(1, 4, 32, 64), meta(1, 4, 32, 900)
    cover = meta(1, 4, 4225, dtype=torch.uint8)
    work = {
        "fours": Work(meta(1), tiles, meta(1, 4, 32, 2), 1, width=32),
        "pairs and columns": Work(meta(1), tiles, meta(1, 4, 32, 4), 1, columns, 64),
        "factored": Work(meta(1), tiles, meta(1, 4, 32, 4), 1, columns, 64, cover=cover),
        "rule": Work(meta(1), tiles, meta(1, 4, 1, 2), 1, rule=True),
    }[kind]
    layout = Layout((1, 4, 256, 256), block_q=128, tile_width=64, tiles=tiles[..., :2, :4], tile_count=meta(1, 4, 2))
    return attend_kernel, *arguments(q, k, k, q, meta(1, 4, 4096, dtype=FLOAT), layout, work, 0.1)


def private(columns):
    from foveate.kernels.gluon import private
    from foveate.layout import Layout

    q, k = meta(1, 4, 4096, 128, dtype=BF16), meta(1, 2, 4096, 128, dtype=BF16)
    work = private.Private(meta(1), meta(1, 4, 64, 64), meta(1, 4, 64, 2 if columns is None else 4), columns)
    layout = Layout((1, 4, 256, 256), block_q=64, tile_width=64, tiles=work.tiles[..., :4, :4], tile_count=meta(1, 4, 4))
    return private.private_kernel, *private.arguments(q, k, k, q, meta(1, 4, 4096, dtype=FLOAT), layout, work, 0.1)


def backward(width):
    from foveate.kernels.gluon import backward
    from foveate.kernels.gluon.backward_kernel import keys_kernel
    from foveate.kernels.gluon.backward_queries import queries_kernel
    from foveate.kernels.triton.inverse import InverseLists
    from foveate.layout import Layout

    q, k = (meta(1, h, 4096, 128, dtype=BF16) for h in (8, 2))
    lists = dict(tiles=meta(1, 8, 32, 20), tile_count=meta(1, 8, 32))
    layout = Layout((1, 8, 4096, 4096), block_q=128, tile_width=width or 64, **lists)
    sums, words = meta(9, dtype=FLOAT), meta(64)
    if not width:
        return queries_kernel, *backward.arguments_queries(q, k, k, q, q, sums, sums, q, sums, layout, 0.1)
    lists = InverseLists(words, meta(64, dtype=torch.int64), words, words, words, words, width, 4096 // width, 4, 1, 10)
    return keys_kernel, *backward.arguments_keys(q, k, k, q, sums, k, k, sums, layout, lists, 0.1)


def low_bits():
    from foveate.kernels.gluon import lowbit
    from foveate.kernels.gluon.lowbit_kernel import lowbit_kernel

    n, d = 1 << 17, 128
    keys = meta(1, n, d, dtype=lowbit.levels(4)), meta(1, n, dtype=FLOAT), meta(4, n, dtype=FLOAT)
    q, words = meta(4, n, d, dtype=BF16), meta(4, n // 64, n // 1024)
    how = dict(sizes=(64, 32, 256, 128), start=0, scale=0.1, bits=4)
    return lowbit_kernel, *lowbit.arguments(q, meta(4, d, dtype=FLOAT), meta(4, n, dtype=FLOAT), keys, words, **how)[1:]


KERNELS = {  # but for "private", what the tests beside this one compile, too: Triton's cache has them
    "rule": lambda: forward("rule", 64),
    "fours": lambda: forward("fours"),
    "pairs and columns": lambda: forward("pairs and columns"),
    "factored": lambda: forward("factored"),
    "private": lambda: private(None),
    "private columns": lambda: private(meta(1, 4, 64, 900)),
    "backward, keys 128": lambda: backward(128),
    "backward, keys 64": lambda: backward(64),
    "backward, queries": lambda: backward(0),
    "low bits": low_bits,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "private" else n for n in KERNELS])
def test_lanes_meet_before_one_of_them_arrives(name):
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    from foveate.kernels.gluon.shim import compile_sm90

    ptx = compile_sm90(*KERNELS[name]()).asm["ptx"]
    assert broken(ptx) == []
    code = Code(ptx)
    waiting = {p for p, text in zip(code.part, code.text) if "mbarrier.try_wait" in text}
    assert len(waiting) in ((3, 4) if "private" in name else (3,))  # 3.9 gives both producers of gathers one body

    # The same PTX with a fault: the barriers between a word and the arrive that hands it over are gone.
    lines = ptx.splitlines()
    arrives = [i for i, x in enumerate(lines) if "mbarrier.arrive." in x]
    stores = [i for i, x in enumerate(lines) if re.search(r"^\s*st\.shared", x) and i < arrives[-1] and i > arrives[0]]
    upto = min(i for i in arrives if i > stores[-1])
    gap = [x for x in lines[stores[-1] : upto] if not re.match(r"\s*bar\.", x)]
    assert any("reaches" in x for x in broken("\n".join([*lines[: stores[-1]], *gap, *lines[upto:]])))
    assert any(
        "orders nothing" in x for x in broken(ptx.replace("mbarrier.arrive.shared", "mbarrier.arrive.relaxed.cta.shared"))
    )


# ---------------------------------------------------------------------- partitions, under the emulator
class Clocks:
    """Vector clocks of partitions: an arrive releases what its partition did, a wait acquires what completed the phase.

    Watches what partitions load and store themselves (int32 and fp32); tiles that TMA writes and products read are the
    emulator's own concern, which lets copies land late and products read late.
    """

    def __init__(self, patch):
        self.guard, self.local = threading.RLock(), threading.local()
        self.cells, self.held, self.loads = {}, [], 0
        for kind in (machine.Shared, emulator.Line):
            patch.setattr(kind, "load", self._watch(kind.load, self._load))
            patch.setattr(kind, "store", self._watch(kind.store, self._store))
        change, wait = machine.Bar.change, machine.Bar.wait

        def arrive(bar, arrivals=0, size=0):
            with bar.cond:
                seen, parity = vars(bar).setdefault("seen", [{}, {}]), bar.parity  # arrived, and at the last phase's end
                if arrivals and hasattr(machine.Machine.local, "queue"):
                    self._join(seen[0], self.now())
                    self.now()[threading.get_ident()] += 1
                change(bar, arrivals, size)
                if bar.parity != parity:
                    seen[1] = dict(seen[0])

        def acquire(bar, parity):
            with bar.cond:
                wait(bar, parity)
                self._join(self.now(), vars(bar).setdefault("seen", [{}, {}])[1])

        patch.setattr(machine.Bar, "change", arrive)
        patch.setattr(machine.Bar, "wait", acquire)

    def now(self):
        if not hasattr(self.local, "clock"):
            self.local.clock = {threading.get_ident(): 1}
        return self.local.clock

    @staticmethod
    def _join(into, other):
        for who, at in other.items():
            into[who] = max(into.get(who, 0), at)

    def _watch(self, do, check):
        def done(shared, *given):
            with self.guard:
                if shared.dtype in (torch.int32, torch.float32) and hasattr(machine.Machine.local, "queue"):
                    at = (shared.flat.data_ptr(), (shared.at or 0) * shared.rows * shared.cols)
                    if at not in self.cells:
                        self.held.append(shared.flat)  # no other tensor may take its place
                    check(at, self.cells.setdefault(at, [{}, {}]))
                return do(shared, *given)

        return done

    def _ordered(self, before, at, what):
        late = [who for who, when in before.items() if self.now().get(who, 0) < when]
        assert not late, f"a {what} of {at} is not ordered"

    def _load(self, at, cell):
        self.loads += 1
        self._ordered(cell[0], at, "load behind the store")
        cell[1][threading.get_ident()] = self.now()[threading.get_ident()]

    def _store(self, at, cell):
        self._ordered(cell[0], at, "store behind a store")
        self._ordered(cell[1], at, "store behind the loads")
        cell[:] = [{threading.get_ident(): self.now()[threading.get_ident()]}, {}]


def lists(width=64):
    from tests import test_gluon_compile as base

    base.check(base.random_lists(7, 1, 2, 2, 200, 330, width, True, 0.7), 1, 64, ctas=1)


def columns():
    from tests import test_gluon_private as base

    base.check(base.listed(3, 1, 2, 2, 200, 300, columns=90), 1, 64, ctas=1)


def gradients(width):
    from tests import test_gluon_backward as base

    base.emulate(base.random_lists(7, 1, 2, 2, 300, 400, width, causal=True), 1, 64, ctas=1)


def levels(patch):
    from tests import test_gluon_lowbit as base

    base.test_under_the_emulator((1, 1, 600, 7, 64), base.Grid(16, 32, 0, 40, 96), 1.0, 2, {}, patch)


@pytest.mark.parametrize("case", ["lists", "columns", "keys 128", "keys 64 and queries", "low bits"])
def test_every_access_is_ordered(case, monkeypatch):
    clocks = Clocks(monkeypatch)
    {
        "lists": lists,
        "columns": columns,
        "keys 128": lambda: gradients(128),
        "keys 64 and queries": lambda: gradients(64),
        "low bits": lambda: levels(monkeypatch),
    }[case]()
    assert clocks.loads > 10


TILE = "        leave_tile(tile_words, turn * WORDS, one, n, masked, tail, block, b, h)\n"
ENTRY = "                mbarrier.wait(empty.index(slot), phase ^ 1)\n                if WIDTH < 64:"
STEP = "                _leave_words(step_words, slot, one, first, second, prev, WIDTH)\n"
NEXT = "        qt += 1\n        if not COLS:\n"
FAULTS = {  # in feed.py: text and what takes its place
    "a step's words are written before its ring entry is free": {ENTRY: STEP + ENTRY},
    "a tile's words are written behind both its arrivals": {TILE: "", NEXT: TILE + NEXT},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_source_is_found(fault, monkeypatch, tmp_path):
    from tests import test_gluon_compile as base

    folder = tmp_path / "gluon"
    shutil.copytree(Path(gluon.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "feed.py").read_text()
    for old, new in FAULTS[fault].items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "feed.py").write_text(text)
    Clocks(monkeypatch)
    monkeypatch.setattr(base, "KERNEL", emulator.load_kernel(folder / "kernel.py"))
    with pytest.raises(AssertionError, match="is not ordered"):
        lists()
