"""Result files, seeded workloads and a very small run of the kernel benchmark."""

from __future__ import annotations

import json
import math

import pytest
import torch

from foveate.bench import kernels, peers, results, workloads
from foveate.bench.tables import prefill_table
from foveate.errors import ConfigError, UnsupportedError
from foveate.kernels.base import Want
from foveate.layout import Layout
from tests.test_fa4 import installed  # noqa: F401


def row(**extra) -> results.Row:
    return results.Row("blocks", "torch", {"n": 64}, results.spread([3.0, 1.0, 2.0]), 0.5, 0.25, 1e-6, **extra)


def test_a_result_survives_the_file(tmp_path):
    data = results.result("kernels", [row()], "cpu", notes=["one"])
    path = results.write(tmp_path / "sub" / "r.json", data)
    assert results.load(path) == data == results.load_all(path.parent)[0]
    assert data["rows"][0]["ms"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_result_that_cannot_be_read_back_is_not_written(tmp_path):
    path = results.write(tmp_path / "r.json", results.result("kernels", [row()], "cpu"))
    before = path.read_text()
    with pytest.raises(results.ResultError, match="schema 1, got 2"):
        results.write(path, {"schema": 2})
    bad = results.result("kernels", [row()], "cpu")
    bad["rows"][0]["max_error"] = math.nan
    with pytest.raises(ValueError):
        results.write(path, bad)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text,why", [("{", "not JSON"), ("[]", "got list"), ('{"schema": 1}', "missing bench")])
def test_other_files_are_refused(tmp_path, text, why):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(results.ResultError, match=why):
        results.load(tmp_path / "x.json")
    lacking = results.result("kernels", [row()], "cpu")
    del lacking["rows"][0]["ms"]["min"]
    (tmp_path / "x.json").write_text(json.dumps(lacking))
    with pytest.raises(results.ResultError, match="row 0 lacks min"):
        results.load(tmp_path / "x.json")


MADE = [
    ("random", lambda **x: workloads.random_blocks(3, 700, 0.3, block_q=64, block_k=32, **x)),
    ("tiles", lambda **x: workloads.tiles_and_columns(2, 700, tiles=3, columns=40, block=64, **x)),
    ("factored", lambda **x: workloads.diagonals_and_columns(2, 700, diagonals=4, columns=30, **x)),
    ("realistic", lambda **x: workloads.realistic(2, 1500, 0.3, block_q=32, block_k=32, **x)),
]


@pytest.mark.parametrize("make", [m for _, m in MADE], ids=[n for n, _ in MADE])
def test_workloads_are_valid_seeded_and_keep_the_diagonal(make):
    layout = make(seed=3)
    layout.validate()
    mask = layout.to_mask()
    assert bool(mask.diagonal(dim1=-2, dim2=-1).all())
    assert torch.equal(mask, make(seed=3).to_mask()) and not torch.equal(mask, make(seed=4).to_mask())


def test_tiles_and_columns_has_what_it_says():
    layout = workloads.tiles_and_columns(2, 1024, tiles=4, columns=60)
    assert int(layout.tile_count.max()) == 4 and layout.tile_count[0, 0, :3].tolist() == [1, 2, 3]
    assert (layout.entry_count[:, :, 8:] == 60).all() and (layout.entry_count[:, :, 0] == 0).all()
    pairs = layout.to_mask()[:, :, 15 * 64 + 63].sum(-1)  # the last row: nothing counted twice
    assert (pairs == 4 * 64 + 60).all()


def test_neighbours_of_the_realistic_workload_share_most_of_their_lists():
    layout = workloads.realistic(2, 8192, 0.2, block_q=64, block_k=64)
    touched = layout.to_block_mask(64, 64)[:, :, 64:]
    both = (touched[:, :, 1:] & touched[:, :, :-1]).sum() / touched[:, :, 1:].sum()
    assert float(both) > 0.6
    assert 0.1 < layout.density() < 0.25


def test_realistic_names_unknown_shares():
    with pytest.raises(ConfigError, match="shares"):
        workloads.realistic(1, 256, 0.2, shares={"sink": 1.0})


def small(case: str = "tiny") -> kernels.Problem:
    shape = kernels.Shape(96, h=4, g=2, d=16, dtype=torch.float32)
    make = lambda dev: workloads.random_blocks(4, 96, 0.3, block_q=32, block_k=32, device=dev)  # noqa: E731
    return kernels.Problem(case, shape, make, {"density": 0.3})


def test_a_run_reports_times_errors_and_reasons(tmp_path):
    out = tmp_path / "k.json"
    said = []
    data = kernels.run(
        device="cpu", layouts=[small()], impls=("sdpa", "torch", "triton"), rounds=2, json=str(out),
        progress=lambda text, share: said.append(text),
    )  # fmt: skip
    assert [r["impl"] for r in data["rows"]] == ["sdpa", "torch"] and said == ["tiny, 96 tokens"]
    for r in data["rows"]:
        assert r["max_error"] < 1e-5 and 0 < r["ms"]["min"] <= r["ms"]["median"] <= r["ms"]["max"]
    assert data["rows"][0]["density"] == 1.0 > data["rows"][1]["density"]
    assert any("triton" in note and "CUDA" in note for note in data["notes"])
    assert results.load(out)["rows"] == data["rows"]
    assert "tiny" in kernels.table(data)


def test_one_implementation_that_fails_does_not_stop_the_others(monkeypatch):
    from foveate.kernels import torch_gather

    def broken(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(torch_gather, "forward", broken)
    data = kernels.run(device="cpu", layouts=[small()], impls=("torch", "sdpa"), rounds=1)
    assert [r["impl"] for r in data["rows"]] == ["sdpa"] and "no such luck" in data["notes"][0]


def test_a_wrong_result_is_seen():
    q, k, v = (torch.randn(1, h, 96, 16) for h in (4, 2, 2))
    layout = small().make(torch.device("cpu"))
    from foveate.kernels import reference
    from foveate.kv import KV

    out, _, _ = reference.forward(q, KV.dense(k, v), layout, scale=0.25, softcap=0.0, want=Want())
    assert kernels.error(out, q, k, v, layout) < 1e-5 < 0.1 < kernels.error(out, q, k, v, None)
    out[0, 1, 95, 3] = math.nan
    assert kernels.error(out, q, k, v, layout) == math.inf


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'cudnn'"):
        kernels.run(device="cpu", impls=("cudn",))
    with pytest.raises(ConfigError, match="unknown name 'blokcs'"):
        kernels.run(device="cpu", cases=["blokcs"])


def test_a_spent_budget_is_said():
    data = kernels.run(device="cpu", layouts=[small(), small("later")], impls=("sdpa",), rounds=1, budget=0.0)
    assert any("were not run" in note for note in data["notes"])


def test_problems_of_every_length_build():
    shape = kernels.Shape(1024, h=2, g=1, d=16, dtype=torch.float32)
    for problem in kernels.problems(shape):
        layout = problem.make(torch.device("cpu"))
        assert isinstance(layout, Layout) and layout.shape == (1, 2, 1024, 1024)
        layout.validate()


def test_decode_problems_run():
    shape = kernels.Shape(256, b=2, h=4, g=2, d=16, dtype=torch.float32, rows=1)
    data = kernels.run(device="cpu", layouts=kernels.decode_problems(shape), impls=("sdpa", "torch"), rounds=1)
    assert not data["notes"]
    assert [r["case"] for r in data["rows"]] == ["decode dense"] * 2 + ["decode pages"] * 4
    assert all(r["max_error"] < 1e-5 for r in data["rows"]) and data["rows"][-1]["density"] == 0.25


def test_the_prefill_benchmark_measures_what_it_can_and_goes_on(tmp_path):
    from benchmarks import prefill_run

    with torch.inference_mode():
        few = dict(shape=(4, 2, 32), rounds=1, device="cpu", dtype=torch.float32, out=tmp_path / "p.json")
        recipes = ["streaming_llm:sink=4,window=64", "nobody", "flexprefill:block=16,min_budget=16,gamma=0.5"]
        data = prefill_run.run([300], recipes, **few)
        rows = {r["impl"]: r for r in data["rows"]}
        assert list(rows) == [recipes[0], "dense, SDPA", "dense, ours", recipes[2]] and len(data["notes"]) == 1
        window, flex = (rows[recipes[i]] for i in (0, 2))
        # The mass kept against a softmax over all pairs.
        q, k, _ = prefill_run.made(300, 4, 2, 32, device="cpu")
        i, j = torch.arange(300)[:, None], torch.arange(300)
        p = (q[0] @ k[0].repeat_interleave(2, 0).mT / 32**0.5).masked_fill(j > i, -math.inf).softmax(-1)
        kept = (p * ((j < 4) | (i - j < 64))).sum(-1)[:, torch.linspace(18, 299, 282).long()]
        assert window["params"]["mass"] == pytest.approx(float(kept.mean()), abs=1e-3)
        assert window["params"]["mass_least_head"] == pytest.approx(float(kept.mean(-1).min()), abs=1e-3)
        for r in (window, flex):
            assert 0.1 < r["params"]["mass_least_head"] <= r["params"]["mass"] < 1 and r["params"]["error"] > 0
            assert 0 < r["density"] <= r["params"]["density_computed"] and r["params"]["speedup"] > 0
            assert r["ms"]["median"] == pytest.approx(r["params"]["plan_ms"] + r["params"]["attend_ms"], abs=2e-3)
        again = prefill_run.run([300], [*recipes[:1], "dense"], **few)
        assert [r for r in again["rows"] if r["impl"] == recipes[0]] == [window]
        assert {r["impl"]: r for r in again["rows"]}["dense"]["params"]["mass"] == pytest.approx(1, abs=1e-4)
    table = prefill_table(again)
    assert f"| `{recipes[0]}` | {window['params']['mass']:.3f} |" in table
    kind = window["params"]["kinds"]["diagonal"]  # heads 2 and 3 of 4: the second half of the kv heads has diagonals first
    assert set(window["params"]["kinds"]) == {"peaked", "diagonal"} and kind["mass"] < window["params"]["mass"] + 0.3
    assert kind["density"] == pytest.approx(window["density"], abs=1e-3) and f"{kind['mass']:.3f} of " in table
    assert "| an oracle, units of 128 x 128 | 0.950 of " in table
    assert results.load(tmp_path / "p.json")["rows"] == again["rows"]


# ---------------------------------------------------------------------- peers
def blocks_of(block_q: int, width: int, g: int = 2, n: int = 256, heads: int = 4) -> Layout:
    gen = torch.Generator().manual_seed(0)
    mask = torch.rand(1, g, -(-n // block_q), -(-n // width), generator=gen) < 0.4
    rows, keys = torch.arange(mask.shape[2])[:, None] * block_q, torch.arange(mask.shape[3]) * width
    mask = (mask | (keys + width > rows) | (keys == 0)) & (keys <= rows + block_q - 1)
    layout = Layout.from_block_mask(mask, n, n, block_q=block_q, block_k=width, heads=heads)
    unused = torch.arange(layout.tiles.shape[-1]) >= layout.tile_count[..., None]
    layout.tiles.masked_fill_(unused, 1 << 28)
    return layout


def drawn(layout: Layout, g: int = 2, d: int = 16):
    b, h, n, m = layout.shape
    gen = torch.Generator().manual_seed(1)
    return [torch.randn(b, x, n, d, generator=gen).bfloat16() for x in (h, g, g)]


def truth(q, k, v, layout):
    from foveate.kernels import reference
    from foveate.kv import KV

    wide = KV.dense(k.float(), v.float())
    return reference.forward(q.float(), wide, layout, scale=q.shape[-1] ** -0.5, softcap=0.0, want=Want())[0]


def attended(q, k, v, keys):
    """Rows `[N, D]` of one head, row i over keys(i), differentiable."""
    rows = [torch.softmax(q[i] @ k[keys(i)].T * q.shape[-1] ** -0.5, -1) @ v[keys(i)] for i in range(len(q))]
    return torch.stack(rows)


class SelectedAttention:
    """What `fla` calls, on `[B, N, heads, D]`, with lists `[B, N, G, S]` and their counts."""

    @staticmethod
    def apply(q, k, v, block, count, size, scale, _):
        def head(h):
            g = h * k.shape[2] // q.shape[2]

            def of(i):
                return torch.cat([int(x) * size + torch.arange(size) for x in block[0, i, g, : count[0, i, g]]])

            return attended(*(t[0, :, j].float() for t, j in ((q, h), (k, g), (v, g))), lambda i: of(i)[of(i) <= i])

        assert block.dtype == count.dtype == torch.int64 and scale == q.shape[-1] ** -0.5
        return torch.stack([head(h) for h in range(q.shape[2])], 1)[None].to(q.dtype)


FSA = """
import torch
from tests.test_bench import SelectedAttention
def FSA_topk_sparse_attention(q, k, v, lists, size, ends):
    assert lists.dtype == ends.dtype == torch.int32 and lists.min() == -1 and ends.tolist() == [0, q.shape[0]]
    count = (lists >= 0).sum(-1)
    x = [t[None] for t in (q, k, v)]
    lists = lists.transpose(0, 1)[None].long(), count.T[None].long()
    return SelectedAttention.apply(*x, *lists, size, q.shape[-1] ** -0.5, None)[0]
"""

MINFERENCE = """
import torch
from ..cuda import convert_vertical_slash_indexes
print("install something")
def _triton_mixed_sparse_attention(q, k, v, lengths, count, tiles, used, entries, scale, rows, keys):
    from tests.test_bench import attended
    assert k.shape == q.shape and lengths.tolist() == [q.shape[2]] and rows == keys == 64
    def seen(h, i):
        at = (0, h, i // 64)
        there = [torch.arange(int(x), int(x) + 64) for x in tiles[at][: count[at]]]
        there = torch.cat(there)
        return torch.cat([there[there <= i], entries[at][: used[at]].long()])
    heads = [attended(q[0, h].float(), k[0, h].float(), v[0, h].float(), lambda i: seen(h, i)) for h in range(q.shape[1])]
    return torch.stack(heads)[None].to(q.dtype)
"""


def folder(tmp_path, name, text):
    for parent in reversed(list((tmp_path / name).parents)[:-1]):
        parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def clean(monkeypatch):
    """Adapters without paths, modules or search paths from other tests."""
    import sys

    monkeypatch.setattr(peers, "_paths", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    peers._minference_module.cache_clear()
    yield sys
    peers._minference_module.cache_clear()
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("fsa", "fla", "_foveate_peer_minference"):
            del sys.modules[name]


def near(got, want):
    torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)


def gradients_of(q, k, v, layout, dout):
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    wide = [t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in leaves]
    s = (wide[0] @ wide[1].mT * q.shape[-1] ** -0.5).masked_fill(~layout.to_mask(), -math.inf)
    return torch.autograd.grad(s.softmax(-1) @ wide[2], leaves, dout.double())


def test_fsa_and_fla_get_lists_per_token(clean, tmp_path):
    import types

    layout = blocks_of(1, 32, n=96)
    q, k, v = drawn(layout)
    assert "--peer fsa=PATH" in peers.why_not("fsa")
    peers.at("fsa", folder(tmp_path, "fsa/ops/FSA_topk_sparse_attention.py", FSA))
    run = peers.build("fsa", q, k, v, layout)
    near(run.call(), truth(q, k, v, layout))
    for a, b in zip(run.gradients(q)(), gradients_of(q, k, v, layout, q), strict=True):
        near(a, b)

    nsa = types.ModuleType("fla.ops.nsa.parallel")
    nsa.ParallelNSAFunction = SelectedAttention
    clean.modules["fla.ops.nsa.parallel"] = nsa
    wide = blocks_of(1, 32, g=1, n=96, heads=16)
    for made, g in ((wide, 1), (blocks_of(1, 32, n=96, heads=32), 2)):
        x = drawn(made, g)
        run = peers.build("fla", *x, made)
        near(run.call(), truth(*x, made))
    for a, b in zip(run.gradients(x[0])(), gradients_of(*x, made, x[0]), strict=True):
        near(a, b)
    with pytest.raises(UnsupportedError, match=r"fla: it needs groups of 16, 32 \.\. query heads"):
        peers.build("fla", q, k, v, layout)
    with pytest.raises(UnsupportedError, match="fsa: it walks a list of blocks per token"):
        peers.build("fsa", q, k, v, blocks_of(64, 64))


def test_minference_gets_tiles_and_columns(clean, tmp_path, capsys):
    assert "--peer minference=PATH" in peers.why_not("minference")
    peers.at("minference", folder(tmp_path, "minference/ops/pit_sparse_flash_attention_v2.py", MINFERENCE))
    layout = workloads.tiles_and_columns(4, 256, tiles=2, columns=20)
    q, k, v = drawn(layout)
    run = peers.build("minference", q, k, v, layout)
    near(run.call(), truth(q, k, v, layout))
    near(peers.minference(q, k, v, blocks_of(64, 64)).call(), truth(q, k, v, blocks_of(64, 64)))
    assert run.gradients is None and capsys.readouterr().out == ""
    with pytest.raises(UnsupportedError, match="minference: it is asked for square causal layouts of 64-row blocks"):
        peers.build("minference", q, k, v, blocks_of(128, 64))


def test_fa4_gets_its_lists(installed, monkeypatch):  # noqa: F811
    from foveate.kernels import fa4

    layout = blocks_of(128, 128, g=4, n=300)
    q, k, v = drawn(layout)
    with pytest.raises(UnsupportedError, match=r"fa4: (it needs a Hopper GPU|it has head dims)"):
        peers.build("fa4", q, k, v, layout)
    monkeypatch.setattr(fa4, "_unserved", lambda *_: None)
    run = peers.build("fa4", q, k, v, layout)
    near(run.call(), truth(q, k, v, layout))
    for a, b in zip(run.gradients(q)(), gradients_of(q, k, v, layout, q), strict=True):
        near(a, b)
    assert [c["mask_mod"].__name__ for c in installed.calls] == ["causal_square"] * 3 and set(run.prepare()) > {"pack_gqa"}


def test_flex_gets_whole_and_causal_blocks(monkeypatch):
    seen = {}

    def attention(*tensors, **named):
        seen.update(named)
        return tensors[0]

    monkeypatch.setattr(peers, "_flex", lambda: attention)
    layout = blocks_of(128, 128, g=4, n=500)
    q, k, v = drawn(layout)
    peers.build("flex", q, k, v, layout).call()
    mask = seen["block_mask"]  # without a compiler FlexAttention looks at the function alone, so this looks at the blocks
    assert torch.equal(mask.to_dense() > 0, layout.to_block_mask(128, 128)) and seen["enable_gqa"]
    assert int(mask.full_kv_num_blocks.sum()) > 0 and int(mask.kv_num_blocks.sum()) == 4 * 4
    assert bool((mask.full_kv_indices < 4).all()) and bool((mask.kv_indices < 4).all())
    at = torch.arange(500)
    assert bool(mask.mask_mod(0, 0, at, at).all()) and not bool(mask.mask_mod(0, 0, at, at + 1).any())
    with pytest.raises(UnsupportedError, match="flex: it is asked for square causal layouts of blocks of 128 x 128"):
        peers.build("flex", q, k, v, blocks_of(128, 64, n=500))


def test_peers_that_are_not_here_are_noted_once():
    data = kernels.run(device="cpu", layouts=[small(), small("later")], impls=("sdpa", "fla", "fa4"), rounds=1)
    assert data["notes"] == ["fla: a peer for GPUs", "fa4: a peer for GPUs"]
    assert [r["impl"] for r in data["rows"]] == ["sdpa", "sdpa"]


def test_a_peer_is_timed_and_its_lists_apart(monkeypatch):
    from foveate.kernels import torch_gather

    def build(q, k, v, layout):
        if layout.full:
            raise UnsupportedError("fsa: not this one")
        plain = kernels.backend("torch")
        assert plain is torch_gather
        call = kernels._call("torch", q, k, v, layout)
        return peers.Run(lambda: torch.zeros(1), call)

    monkeypatch.setitem(peers.PEERS, "fsa", peers.Peer(lambda: None, build))
    monkeypatch.setattr(kernels, "PEERS", ("fsa",))
    rows, notes = [], []
    for problem in (small(), kernels.Problem("dense", small().shape, lambda dev: Layout.dense(1, 4, 96, 96), {})):
        rows += kernels._problem(problem, ("sdpa", "fsa"), torch.device("cpu"), 1, notes)
    assert [(r.case, r.impl) for r in rows] == [("tiny", "sdpa"), ("tiny", "fsa"), ("dense", "sdpa")]
    assert rows[1].max_error < 1e-5 and rows[1].params["lists_ms"] > 0 and "lists_ms" not in rows[0].params
    assert notes == ["dense 96 fsa: not this one"]
    assert "lists ms" in kernels.table(results.result("kernels", rows, "cpu"))


def test_names_and_paths_of_the_command(tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernels.beside(None, cpu) is None
    assert kernels.beside(["cudnn", "fa4"], cuda) == ("gluon", "triton", "cudnn", "fa4")
    assert kernels.beside(["sdpa"], cpu) == ("torch", "sdpa") and kernels.beside(["triton", "fa2"], cuda) == (
        "triton",
        "fa2",
    )
    assert kernels.paths_of(["fsa=/a=b", "minference=c"]) == {"fsa": "/a=b", "minference": "c"}
    with pytest.raises(ConfigError, match="expected NAME=PATH, got 'fsa'"):
        kernels.paths_of(["fsa"])
    with pytest.raises(ConfigError, match="did you mean 'fsa'"):
        kernels.run(device="cpu", paths={"fsaa": str(tmp_path)})
    with pytest.raises(ConfigError, match="expected the folder of a checkout of fsa"):
        kernels.run(device="cpu", paths={"fsa": str(tmp_path / "no")})


def test_blocks_per_token_hold_their_own_and_the_first_block():
    layout = kernels.blocks_per_token(kernels.Shape(300, h=4, g=2), keep=3, block=16)
    layout.validate()
    mask = layout.to_mask()
    assert bool(mask.diagonal(dim1=-2, dim2=-1).all()) and bool(mask[..., 0].all())
    assert layout.tile_count[0, 0, :40].tolist() == [1] * 16 + [2] * 16 + [3] * 8
    assert int(mask[0, 0, 299].sum()) == 16 * 2 + 12
