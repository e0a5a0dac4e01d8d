"""Paired differences, cells and which tasks count: against plain arithmetic on small made-up records."""

from __future__ import annotations

import random
import statistics

import pytest

from foveate.errors import ConfigError
from foveate.evals.results import Record, Results
from foveate.evals.statistics import cells, counting, paired, stratified


def record(
    recipe: str, task: str, index: int, score: float, text: str = "", protocol: str = "seen", length: int = 100
) -> Record:
    return Record(recipe, f"s {recipe}", "ruler", task, length, protocol, index, 90, {"score": score}, text)


def test_paired_is_the_mean_gap_with_an_interval_around_it():
    rng = random.Random(0)
    base = [rng.random() for _ in range(200)]
    ours = [b + rng.gauss(0.1, 0.5) for b in base]
    gaps = [a - b for a, b in zip(ours, base, strict=True)]
    found = paired(ours, base)
    half = 1.96 * statistics.stdev(gaps) / 200**0.5  # the normal interval, which a bootstrap of 200 is close to
    assert found.mean == pytest.approx(statistics.fmean(gaps)) and found.n == 200
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)
    assert found == paired(ours, base)  # deterministic
    narrow = paired(ours, base, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_pairing_removes_what_samples_share():
    """Hard and easy samples: a constant gap has no spread, however much the samples differ."""
    base = [0.0, 1.0] * 20
    found = paired([b - 0.25 for b in base], base)
    assert (found.low, found.mean, found.high) == (-0.25, -0.25, -0.25)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = random.Random(1), 0
    for trial in range(200):
        gaps = [rng.gauss(0.3, 1.0) for _ in range(60)]
        found = paired(gaps, [0.0] * 60, seed=trial)
        hits += found.low <= 0.3 <= found.high
    assert 176 <= hits <= 199, hits  # 95 % of 200, and four standard deviations


def test_strata_weigh_the_same_and_are_drawn_apart():
    """Two tasks, one of 10 samples with gap 1, one of 1000 with gap 0: the mean is a half, and drawing inside of tasks
    leaves no spread; pooled samples would say 0.01."""
    found = stratified([([1.0] * 10, [0.0] * 10), ([0.0] * 1000, [0.0] * 1000)])
    assert (found.low, found.mean, found.high, found.n) == (0.5, 0.5, 0.5, 1010)
    one = ([0.1, 0.9, 0.4], [0.0, 0.2, 0.6])
    assert stratified([one]) == paired(*one)


@pytest.mark.parametrize("ours, base", [([], []), ([1.0], [1.0, 2.0])])
def test_bad_samples_are_refused(ours, base):
    with pytest.raises(ConfigError, match="same samples"):
        paired(ours, base)
    with pytest.raises(ConfigError, match="same samples"):
        stratified([([1.0], [1.0]), (ours, base)])


def test_no_strata_are_refused():
    with pytest.raises(ConfigError, match="got none"):
        stratified([])


def test_a_cell_compares_on_common_samples_only():
    """Dense has samples 0..2, the recipe 1..3: means are over their own samples, the difference over 1 and 2."""
    dense = [record("dense", "vt", i, s, t) for i, (s, t) in enumerate([(0.0, "a"), (1.0, "b"), (1.0, "c")])]
    ours = [record("x", "vt", i, s, t) for i, (s, t) in enumerate([(1.0, "b"), (0.0, "d"), (0.0, "e")], 1)]
    base, cell = cells(Results({}, dense + ours))
    assert (base.recipe, base.mean, base.n, base.against, base.same) == ("dense", pytest.approx(2 / 3), 3, None, None)
    assert (cell.mean, cell.n, cell.same) == (pytest.approx(1 / 3), 3, 0.5)
    assert cell.against is not None and cell.against.mean == -0.5 and cell.against.n == 2


def test_cells_keep_tasks_lengths_and_protocols_apart():
    found = cells(Results({}, [
        record("dense", "vt", 0, 1.0), record("dense", "cwe", 0, 0.2), record("x", "vt", 0, 0.5, protocol="unseen"),
        record("x", "vt", 0, 0.5, length=200), record("x", "vt", 0, 0.5),
    ]))  # fmt: skip
    assert [(c.task, c.length, c.protocol) for c in found if c.against is not None] == [("vt", 100, "seen")]
    assert len(found) == 5 and cells(Results({}, []), "score") == []
    assert cells(Results({}, [record("dense", "vt", 0, 1.0)]), "nll") == []  # another value


def test_a_task_counts_where_dense_is_good_enough():
    found = cells(Results({}, [
        record("dense", "good", 0, 1.0), record("dense", "good", 1, 0.2), record("x", "good", 0, 0.0),
        record("dense", "bad", 0, 0.5), record("x", "bad", 0, 1.0), record("x", "alone", 0, 1.0),
    ]))  # fmt: skip
    assert counting(found, 0.6) == {("good", 100, "seen")}  # at the threshold; a recipe's own score does not matter
    assert counting(found, 0.61) == set()
