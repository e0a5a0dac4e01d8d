"""MInference's own search: what it compares, what it chooses, what it writes down."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import ConfigError
from foveate.layout import Layout
from foveate.methods.base import State
from foveate.methods.minference import PATTERNS, MInference
from foveate.methods.minference_search import GRID, KernelAware, candidates, choose, kernel_cost
from foveate.methods.search import Target
from foveate.profile import Profile
from foveate.scores.kept import Sampled, loss, some_rows
from tests.prompts import call, prompt


def capture(shape="random", m=260, layer=0, layers=1, **sizes):
    q, k, v = (t.float() for t in prompt(shape, m=m, **sizes))
    return call(q, k, v, layer=layer, layers=layers)


def dense_rows(x, mask):
    """(lse, out) over mask `[H, N, M]`, with one softmax in fp64."""
    r = x.q.shape[1] // x.groups
    k, v = (t[0].double().repeat_interleave(r, 0) for t in (x.kv.k, x.kv.v))
    s = (x.q[0].double() @ k.transpose(-1, -2) * x.scale).masked_fill(~mask, float("-inf"))
    return s.logsumexp(-1), s.softmax(-1) @ v


# ---------------------------------------------------------------------- the yardstick
def test_recall_and_loss_are_those_of_two_softmaxes():
    x = capture("peaked")
    layout = Layout.static(x.shape, sink=3, window=40)
    rows = torch.tensor([0, 5, 77, 200, 259])
    got = Sampled(x.q, x.kv, x.q_pos, scale=x.scale, rows=rows)
    recall, wrong = got.judge(layout)
    full = torch.ones(260, 260, dtype=torch.bool).tril()
    lse, out = dense_rows(x, full.expand(4, -1, -1))
    some, near = dense_rows(x, layout.to_mask().expand(1, 4, -1, -1)[0])
    torch.testing.assert_close(recall.double(), (some - lse).exp()[:, rows].mean(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.out.double(), out[:, rows], atol=1e-5, rtol=1e-5)
    gap = (near - out)[:, rows].abs().sum((1, 2)) / out[:, rows].abs().sum((1, 2))
    torch.testing.assert_close(wrong.double(), gap, atol=1e-5, rtol=1e-4)
    assert float(recall.min()) > 0.01 and float(recall.max()) < 0.99


def test_dense_keeps_everything_and_nothing_keeps_nothing():
    x = capture()
    got = Sampled(x.q, x.kv, x.q_pos, scale=x.scale)
    for layout in (x.dense(), Layout.static(x.shape, window=260)):
        recall, wrong = got.judge(layout)
        assert float(recall.min()) > 1 - 1e-6 and float(wrong.max()) < 1e-5
    none = Layout.lists(x.shape, block_q=260, tile_width=1, entries=torch.full((1, 1, 1, 1), 259))
    recall, wrong = got.judge(none)
    assert float(recall.max()) < 0.05 and torch.isfinite(wrong).all()


def test_rows_are_spread_and_seeded():
    rows = some_rows(1000, 10, seed=3)
    assert [int(r) // 100 for r in rows] == list(range(10))
    assert torch.equal(rows, some_rows(1000, 10, seed=3)) and not torch.equal(rows, some_rows(1000, 10, seed=4))
    assert some_rows(3, 64).tolist() == [0, 1, 2]
    assert float(loss(torch.ones(1, 2, 2), torch.full((1, 2, 2), 2.0))) == pytest.approx(0.5)


# ---------------------------------------------------------------------- the candidates
def test_the_published_grid_is_there_at_its_length():
    assert set(GRID) <= set(candidates(30_000))
    assert ("vertical_slash", 30, 2048) in GRID and ("a_shape", 1024, 4096) in GRID and ("block_sparse", 100, 0) in GRID
    assert len(candidates(4096)) == len(set(candidates(4096))) == 30


@pytest.mark.parametrize("shape", ["peaked", "diagonal"])
@pytest.mark.parametrize("pattern", [dict(columns=40, diagonals=110), dict(pattern="block_sparse", blocks=2)])
def test_cost_is_what_the_kernel_computes(shape, pattern):
    """Block by block from the meaning of a layout; over all heads it is the library's own count."""
    x = capture(shape, m=300)
    layout = MInference(**pattern).plan(x, State())
    got = kernel_cost(layout)
    assert int(got.sum()) == layout.computed()
    assert got.shape == (4,) and (got >= layout.pairs()[0]).all()


def test_cost_of_a_rule_counts_blocks():
    layout = Layout.static((1, 2, 256, 256), sink=1, window=1, block_q=64)
    assert kernel_cost(layout).tolist() == [(4 + 3) * 64 * 64] * 2


# ---------------------------------------------------------------------- the choice
def test_a_head_takes_the_closest_output_within_the_cost():
    figures = torch.tensor([[[[0.5, 0.4, 0.1], [0.6, 0.3, 0.2], [0.9, 0.1, 0.4], [0.8, 0.2, 0.4]]]])
    for level, want in ((0.05, 0), (0.1, 0), (0.3, 1), (0.4, 2), (9.0, 2)):
        assert choose(figures, level).tolist() == [[want]]


def slow_choice(search, level):
    """(mean recall, candidates) of one cost, head by head, of the layers seen."""
    picked, recall = [], []
    for layer in range(2):
        for head in (search.sums[layer] / search.seen[layer]).tolist():
            fits = [i for i, c in enumerate(head) if c[2] <= level]
            fits = fits or [i for i, c in enumerate(head) if c[2] == min(c[2] for c in head)]
            picked.append(min(fits, key=lambda i: (head[i][1], i)))
            recall.append(head[picked[-1]][0])
    return sum(recall) / len(recall), picked


@pytest.fixture(scope="module")
def searched():
    search = KernelAware(MInference(), Target("recall", 0.9))
    for layer, shape in enumerate(("peaked", "diagonal")):
        search.see(capture(shape, m=700, layer=layer, layers=3), None, None)
    search.end_pass()
    return search


def test_the_least_cost_that_holds(searched):
    found = searched.finish()
    level = found.report["level"]
    recall, picked = slow_choice(searched, level)
    assert found.report["recall"] == pytest.approx(recall) and recall >= 0.9
    step = (float(searched.sums[:2, ..., 2].max()) / found.report["least_cost"]) ** (1 / 255)
    assert slow_choice(searched, level / step * (1 - 1e-6))[0] < 0.9
    grid = candidates(700)
    want = torch.tensor([[PATTERNS.index(grid[i][0]), *grid[i][1:]] for i in picked]).view(2, 4, 3)
    assert torch.equal(torch.cat([found.tensors["pattern"][..., None], found.tensors["sizes"]], -1)[:2], want)


def test_layers_never_seen_keep_the_methods_own_sizes(searched):
    found = searched.finish()
    assert found.tensors["pattern"].shape == (3, 4) and found.tensors["sizes"].shape == (3, 4, 2)
    assert found.tensors["pattern"][2].tolist() == [0] * 4
    assert found.tensors["sizes"][2].tolist() == [[1000, 6096]] * 4
    with pytest.raises(ConfigError, match="shown no layer"):
        KernelAware(MInference(), Target()).finish()


@pytest.mark.parametrize("text,held", [("density=0.5", "computed"), ("loss=20%", "loss"), ("recall=0.7", "recall")])
def test_targets(searched, text, held):
    target = Target.parse(text)
    search = KernelAware(MInference(), target)
    search.resume(searched.state())
    got = search.finish().report[held]
    assert got >= target.value if held == "recall" else got <= target.value


def test_a_winner_keeps_its_own_pattern():
    """The published code stores winning A-shape and block-sparse heads as vertical-slash."""
    x = capture("random", m=300)
    search = KernelAware(MInference(), Target("density", 0.9))
    search.see(x, None, None)
    grid = candidates(300)
    for name, number in (("a_shape", 1), ("block_sparse", 2)):
        at = next(i for i, e in enumerate(grid) if e[0] == name)
        search.sums[..., 1] = 1.0
        search.sums[:, :, at, 1:] = 0.01
        found = search.finish()
        assert (found.tensors["pattern"] == number).all()
        assert found.tensors["sizes"][0, 0].tolist() == list(grid[at][1:])


def test_resumed_equals_uninterrupted(searched):
    search = KernelAware(MInference(), Target("recall", 0.9))
    search.see(capture("peaked", m=700, layer=0, layers=3), None, None)
    again = KernelAware(MInference(), Target("recall", 0.9))
    again.resume(search.state())
    again.see(capture("diagonal", m=700, layer=1, layers=3), None, None)
    for name, t in again.finish().tensors.items():
        assert torch.equal(t, searched.finish().tensors[name])


# ---------------------------------------------------------------------- the profile
def save(tmp_path, pattern, sizes):
    return str(
        Profile("minference", tensors={"pattern": torch.tensor(pattern), "sizes": torch.tensor(sizes)}).save(tmp_path)
    )


def test_a_folder_equals_the_tuple(tmp_path):
    pattern, sizes = [[0, 1, 2, 0]], [[[12, 110], [5, 40], [2, 0], [40, 120]]]
    entries = (("vertical_slash", 12, 110), ("a_shape", 5, 40), ("block_sparse", 2, 0), ("vertical_slash", 40, 120))
    x = capture("peaked", m=300)
    one = MInference(profile=save(tmp_path, pattern, sizes)).plan(x, State())
    two = MInference(profile=(entries,)).plan(x, State())
    assert torch.equal(one.to_mask(), two.to_mask())


def test_bad_profiles(tmp_path):
    x = capture(m=100)
    with pytest.raises(ConfigError, match=r"expected a folder with profile\.json"):
        MInference(profile="nowhere")
    with pytest.raises(ConfigError, match="profile expected 1 layers with 4 heads each, got 2 layers, 1 heads"):
        MInference(profile=save(tmp_path / "a", [[0], [0]], [[[1, 1]], [[1, 1]]])).plan(x, State())
    with pytest.raises(ConfigError, match="expected tensors pattern"):
        MInference(profile=save(tmp_path / "b", [[0]], [[1, 1]])).plan(x, State())
    with pytest.raises(ConfigError, match="expected patterns 0 to 2 and sizes >= 0"):
        MInference(profile=save(tmp_path / "c", [[7]], [[[1, 1]]])).plan(x, State())
    with pytest.raises(ConfigError, match="share='group' does not go with a profile"):
        MInference(profile="nowhere", share="group")
    other = str(Profile("xattention").save(tmp_path / "d"))
    with pytest.raises(ConfigError, match="was made for xattention, expected one for minference"):
        MInference(profile=other)
