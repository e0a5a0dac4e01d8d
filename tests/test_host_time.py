"""How much the host does before a kernel runs, counted in calls of this library's functions, since clocks are no tests.

The bounds are a little above what was counted when they were written: who passes one has put work into every call.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import foveate
from foveate import attend
from foveate.kernels import dispatch, gluon
from foveate.kv import KV
from foveate.layout import Layout
from tests.tiny import llama

SOURCE = str(Path(foveate.__file__).parent)
try:
    from triton.compiler import CompiledKernel

    from foveate.kernels import relaunch
    from foveate.kernels.gluon import launch, prepare
except (ImportError, AttributeError):  # no Triton, or one whose Gluon the shim does not know
    launch = None

needs_gluon = pytest.mark.skipif(launch is None, reason="this Triton has no Gluon that the kernel knows")


def calls(work) -> int:
    """Calls of functions of this library that `work()` makes."""
    count = 0

    def seen(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(SOURCE)

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def data(n=128, m=256, h=4, g=2, d=64, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return tuple(torch.randn(1, heads, rows, d).to(dtype) for heads, rows in ((h, n), (g, m), (g, m)))


def blocks(n, m, h=4):
    return Layout.from_block_mask(torch.ones(1, h, n // 128, m // 128, dtype=torch.bool), n, m, block_q=128, block_k=128)


# ---------------------------------------------------------------------- attend
def test_attend_decides_in_few_calls():
    q, k, v = data(1)
    kv = KV.dense(k, v)
    with torch.inference_mode():
        attend(q, kv)
        assert calls(lambda: attend(q, kv)) <= 17


def double(kernel, launched):
    """A kernel that only notes its launches in `launched`: ("first" or "again", grid, arguments by name)."""

    class Compiled(CompiledKernel):
        module = None

        def __init__(self):
            pass

        def __getitem__(self, grid):
            return lambda *args: launched.append(("again", grid, dict(zip(kernel.arg_names, args, strict=True))))

    class Kernel:
        params, arg_names, compiled = kernel.params, kernel.arg_names, Compiled()

        def __getitem__(self, grid):
            def first(*args, **options):
                names = {**dict(zip(self.arg_names, args, strict=False)), **options}
                launched.append(("first", (*grid, 1, 1)[:3], {n: x for n, x in names.items() if n in self.arg_names}))
                return self.compiled

            return first

    return Kernel()


@pytest.fixture
def hopper(monkeypatch):
    """The Gluon backend as far as the launch: gives the list of what was launched, as (grid, arguments by name)."""
    launched = []

    class Plan:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.setattr(relaunch, "_HELD", {})
    monkeypatch.setattr(launch, "attend_kernel", double(launch.attend_kernel, launched))
    monkeypatch.setattr(prepare, "plan_kernel", Plan())
    monkeypatch.setattr(gluon, "_hopper", lambda device: True)
    monkeypatch.setattr(gluon, "_on", lambda device: gluon._HERE)
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(dispatch, "AUTO", {"cpu": ("gluon",)})
    return launched


def plain(x):
    """An argument as it can be compared: of tensors and descriptors where they lie and what they say."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr(), x.shape, x.stride(), x.dtype
    if hasattr(x, "block_shape"):
        return (
            type(x),
            plain(x.base),
            [(n, list(f) if isinstance(f, list) else f) for n, f in vars(x).items() if n != "base"],
        )
    return x


@needs_gluon
def test_a_launch_made_before_needs_few_calls(hopper):
    q, k, v = data(256)
    layout = blocks(256, 256)
    with torch.inference_mode():
        attend(q, (k, v), layout)
        assert calls(lambda: attend(q, (k, v), blocks(256, 256))) <= 52
        assert calls(lambda: attend(q, (k, v), layout)) <= 50
    assert [kind for kind, _, _ in hopper] == ["first", "again", "again"]


@needs_gluon
@pytest.mark.parametrize("case", ["tiles", "columns", "dense", "rule"])
def test_a_launch_made_again_gets_the_arguments_of_a_first(hopper, case, monkeypatch):
    def plan(seed):
        if case == "dense":
            return Layout.dense(1, 4, 256, 256)
        if case == "rule":
            return Layout.static((1, 4, 256, 256), sink=4, window=100)
        if case == "tiles":
            return blocks(256, 256)
        e = torch.arange(8, dtype=torch.int32).expand(1, 4, 2, 8) + seed
        return Layout((1, 4, 256, 256), block_q=128, entries=e, entry_count=torch.full((1, 4, 2), 8, dtype=torch.int32))

    made, outs = [], []
    real, opened = prepare.prepare, launch.opened
    monkeypatch.setattr(prepare, "prepare", lambda *a: made.append(real(*a)) or made[-1])
    monkeypatch.setattr(launch, "opened", lambda *a: outs.append(opened(*a)) or outs[-1])
    with torch.inference_mode():
        for seed in range(2):
            q, k, v = (t + seed for t in data(256))
            attend(q, (k, v), plan(seed), scale=0.3)
            want, options = launch.arguments(*outs[-1][:5], plan(seed), made[-1], 0.3)
            want = {**dict(zip(launch.attend_kernel.arg_names, want, strict=False)), **options}
            kind, grid, got = hopper[-1]
            assert kind == ("again" if seed else "first") and grid == (launch.grid(q, made[-1]), 1, 1)
            assert {n: plain(x) for n, x in got.items()} == {n: plain(want[n]) for n in got}


CHANGES = {
    "rows": lambda: (*data(384, 384), blocks(384, 384), 0.3),
    "strides": lambda: (data(256)[0].transpose(1, 2).contiguous().transpose(1, 2), *data(256)[1:], blocks(256, 256), 0.3),
    "dtype": lambda: (*data(256, dtype=torch.float16), blocks(256, 256), 0.3),
    "scale": lambda: (*data(256), blocks(256, 256), 0.2),
    "causality": lambda: (*data(256), _two_sided(), 0.3),
    "alignment": lambda: (*data(256), _shifted(), 0.3),
    "kind": lambda: (*data(256), Layout.dense(1, 4, 256, 256), 0.3),
}


def _two_sided():
    mask = torch.ones(1, 4, 2, 2, dtype=torch.bool)
    return Layout.from_block_mask(mask, 256, 256, block_q=128, block_k=128, causal=False)


def _shifted():
    """The lists of `blocks`, 4 bytes further in memory."""
    layout = blocks(256, 256)
    tiles = layout.tiles.new_zeros(layout.tiles.numel() + 1)[1:].view_as(layout.tiles).copy_(layout.tiles)
    return foveate.Layout((1, 4, 256, 256), block_q=128, tile_width=128, tiles=tiles, tile_count=layout.tile_count)


@needs_gluon
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_is_a_first_launch(hopper, change):
    q, k, v = data(256)
    with torch.inference_mode():
        for _ in range(2):
            attend(q, (k, v), blocks(256, 256), scale=0.3)
        *args, plan, scale = CHANGES[change]()
        attend(args[0], tuple(args[1:]), plan, scale=scale)
    assert [kind for kind, _, _ in hopper] == ["first", "again", "first"]


@needs_gluon
def test_another_mode_of_triton_is_a_first_launch(hopper, monkeypatch):
    q, k, v = data(256)
    with torch.inference_mode():
        attend(q, (k, v))
        monkeypatch.setattr(relaunch.knobs.runtime, "debug", not relaunch.knobs.runtime.debug)
        attend(q, (k, v))
    assert [kind for kind, _, _ in hopper] == ["first", "first"]


@needs_gluon
def test_what_is_remembered_holds_no_tensor_and_is_bounded(hopper, monkeypatch):
    q, k, v = data(256)
    monkeypatch.setattr(relaunch, "MOST", 3)
    with torch.inference_mode():
        for i in range(7):
            attend(q, (k, v), scale=0.1 + i)
            assert 1 <= len(relaunch._HELD) <= 3
    for held in relaunch._HELD.values():
        assert not any(isinstance(getattr(x, "base", x), torch.Tensor) for x in held.args)


@needs_gluon
def test_tensors_that_are_one_are_told_from_two_that_are_alike(hopper):
    kernel, one, two = launch.attend_kernel, torch.zeros(4), torch.zeros(4)

    def start(a, b):
        rest = [0] * (len(kernel.params) - 2)
        relaunch.launch(kernel, (a, b), None, lambda: ((1,), [a, b, *rest], {}))
        return list(hopper[-1][2].values())[:2]

    for a, b in ((one, one), (one, two), (two, one), (two, two)):
        got = start(a, b)
        assert got[0] is a and got[1] is b
    assert [kind for kind, _, _ in hopper] == ["first", "first", "again", "again"]


@needs_gluon
def test_a_launch_with_a_tensor_of_its_own_is_not_remembered(hopper):
    kernel, one = launch.attend_kernel, torch.zeros(4)
    for _ in range(2):
        args = [torch.zeros(4)] + [0] * (len(kernel.params) - 1)
        relaunch.launch(kernel, (one,), None, lambda args=args: ((1,), args, {}))
        assert hopper[-1][0] == "first"


PAGES = {  # of one step over lists: kv heads, entries, tiles, their width, rows of the lists, softmax scale, dtype
    "it": (2, 256, 4, 16, 2, 0.3, torch.float16),
    "entries": (2, 256, 64, 1, 2, 0.3, torch.float16),
    "kv heads": (1, 256, 4, 16, 2, 0.3, torch.float16),
    "room": (2, 320, 4, 16, 2, 0.3, torch.float16),
    "more tiles": (2, 256, 12, 16, 2, 0.3, torch.float16),
    "wider tiles": (2, 256, 4, 32, 2, 0.3, torch.float16),
    "shared lists": (2, 256, 4, 16, 1, 0.3, torch.float16),
    "scale": (2, 256, 4, 16, 2, 0.2, torch.float16),
    "dtype": (2, 256, 4, 16, 2, 0.3, torch.float32),
}


@needs_gluon
def test_steps_over_lists_are_launched_again_with_the_arguments_of_a_first(monkeypatch):
    """Each kind of step over dense and paged storage, with and without lse, twice with tensors of its own, after all others:
    what is launched again is what would be launched if nothing were remembered."""
    from foveate.kernels.triton import arrivals, paging, paging_launch

    launched = []
    for name in ("attend_tiles", "attend_entries"):
        monkeypatch.setattr(paging, name, double(getattr(paging, name), launched))
    monkeypatch.setattr(arrivals, "counters", lambda rows, part: torch.zeros(rows, dtype=torch.int32))
    monkeypatch.setattr(relaunch, "_HELD", {})
    said = lambda x: (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x  # noqa: E731
    for seed in range(2):
        for g, m, many, width, rows, scale, dtype in PAGES.values():
            k, v = (torch.randn(2, g, m, 64, dtype=dtype) for _ in "kv")
            table = torch.randperm(2 * g * m // 32).view(2, g, m // 32).int()
            paged = KV(k.view(-1, 32, 64), v.view(-1, 32, 64), "paged", m, torch.full((2, g), m).int(), table)
            starts = torch.arange(many, dtype=torch.int32).expand(rows, 4, 1, many) * width
            count = torch.full((rows, 4, 1), many, dtype=torch.int32)
            kind = (
                dict(tiles=starts, tile_count=count, tile_width=width)
                if width > 1
                else dict(entries=starts, entry_count=count)
            )
            for kv in (KV.dense(k, v), paged):
                for lse in (False, True):
                    q = torch.randn(2, 4, 1, 64, dtype=dtype)
                    call = (q, kv, Layout((2, 4, 1, m), **kind), scale, lse)
                    out, _ = paging_launch.attend(*call)
                    how, grid, got = launched.pop()
                    assert how == ("again" if seed else "first") and got["q"] is q and got["out"] is out
                    with monkeypatch.context() as afresh:
                        afresh.setattr(relaunch, "_HELD", {})
                        paging_launch.attend(*call)
                    _, plain_grid, want = launched.pop()
                    assert grid == plain_grid and {n: said(x) for n, x in want.items()} == {n: said(got[n]) for n in want}
    assert not launched and len(relaunch._HELD) == 4 * len(PAGES)


@needs_gluon
def test_a_constant_that_changes_is_noticed(hopper):
    """Triton, which is asked again then, raises; here it is a double that counts as a first launch."""
    kernel, one, module = launch.attend_kernel, torch.zeros(4), {"WIDE": (1, 2), "DEEP": 3}
    kernel.used_global_vals = {(name, id(module)): (value, module) for name, value in module.items()}

    def start():
        relaunch.launch(kernel, (one,), None, lambda: ((1,), [one] + [0] * (len(kernel.params) - 1), {}))
        return hopper[-1][0]

    assert [start(), start()] == ["first", "again"]
    module["DEEP"] = 4
    assert [start(), start()] == ["first", "again"]
    module["WIDE"] = [1]
    assert start() == "first"
    del module["WIDE"]
    kernel.used_global_vals = {}
    assert [start(), start()] == ["first", "again"]


@needs_gluon
def test_triton_says_which_constants_a_kernel_reads():
    """Those of the functions it calls too, under the name that `relaunch` looks for."""
    from foveate.kernels.triton import paging, steps

    for kernel, name, value in ((launch.attend_kernel, "HIDDEN", None), (paging.attend_tiles, "FLOOR", steps.FLOOR)):
        assert kernel.cache_key  # what a first launch computes
        found = {n: module[n] for (n, _), (_, module) in kernel.used_global_vals.items()}
        assert name in found and (value is None or found[name] is value)


@needs_gluon
@pytest.mark.parametrize("odd", ["shifted", "last axis", "rows", "expanded"])
def test_what_tma_cannot_walk_is_copied(odd):
    flat = torch.arange(4 * 16 * 64 + 8).to(torch.bfloat16)
    t = flat[: 4 * 16 * 64].view(1, 4, 16, 64)
    assert launch.readable(t) is t and launch.readable(t.transpose(1, 2)).data_ptr() == t.data_ptr()
    t = {
        "shifted": lambda: flat[1 : 1 + 4 * 16 * 64].view(1, 4, 16, 64),
        "last axis": lambda: t.transpose(2, 3),
        "rows": lambda: flat[: 4 * 16 * 60].view(1, 4, 16, 60)[..., :56],
        "expanded": lambda: t[:, :, :1].expand(-1, -1, 16, -1),
    }[odd]()
    got = launch.readable(t)
    assert torch.equal(got, t) and got.is_contiguous() and got.data_ptr() % 16 == 0 and got.data_ptr() != t.data_ptr()


# ---------------------------------------------------------------------- a layer of a model
def _step_and_prompt(layers: int, recipe: str) -> tuple[int, int]:
    """Calls of a decode step and of a prompt."""
    model = llama(layers=layers)
    ids = torch.randint(3, 101, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), foveate.use(model, recipe):
        cache = model(ids).past_key_values
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
        return calls(lambda: model(ids[:, :1], past_key_values=cache)), calls(lambda: model(ids))


@pytest.mark.parametrize(("recipe", "step", "prompt"), [("dense", 58, 72), ("streaming_llm:sink=2,window=16", 108, 138)])
def test_a_layer_of_a_model_costs_few_calls(recipe, step, prompt):
    two, four = (_step_and_prompt(layers, recipe) for layers in (2, 4))
    each = [(b - a) / 2 for a, b in zip(two, four, strict=True)]
    assert each[0] <= step and each[1] <= prompt, each
