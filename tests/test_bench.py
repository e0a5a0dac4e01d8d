"""Result files, seeded workloads and a very small run of the kernel benchmark."""

from __future__ import annotations

import json
import math

import pytest
import torch

from foveate.bench import kernels, results, workloads
from foveate.bench.tables import prefill_table
from foveate.errors import ConfigError
from foveate.kernels.base import Want
from foveate.layout import Layout


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
    assert f"| `{recipes[0]}` | {window['params']['mass']:.3f} |" in prefill_table(again)
    assert results.load(tmp_path / "p.json")["rows"] == again["rows"]
