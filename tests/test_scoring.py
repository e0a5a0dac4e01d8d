"""The metrics on outputs written by hand, the ones that look right and are not included."""

from __future__ import annotations

import pytest

from foveate.evals.scoring import GROWS, METRICS

KEY = "4f0c1d2e-8a3b-4c5d-9e6f-0123456789ab"

CASES = [
    # metric, prediction, references, score
    ("all", "It is ALPHA, and then beta.", ("alpha", "beta"), 1.0),
    ("all", "alpha only", ("alpha", "beta"), 0.5),
    ("all", "", ("alpha",), 0.0),
    ("all", "al\x00pha", ("alpha",), 0.0),  # a control character parts words, as upstream
    ("any", "beta", ("alpha", "beta"), 1.0),
    ("any", "gamma", ("alpha", "beta"), 0.0),
    ("starts", f' "{KEY}", and more', (KEY,), 1.0),
    ("starts", f"\n`{KEY}`", (KEY,), 1.0),
    ("starts", KEY[:-1], (KEY,), 0.0),
    ("starts", f"The value is {KEY}", (KEY,), 0.0),
    ("starts", KEY.upper(), (KEY,), 0.0),
    ("starts", "", (KEY,), 0.0),
    ("first_integer", " 01234. Remember it.", ("01234",), 1.0),
    ("first_integer", " 1234", ("01234",), 0.0),  # a string of digits, not a number
    ("first_integer", "12,345", ("12345",), 0.0),  # the run ends at the comma
    ("first_integer", "123456", ("12345",), 0.0),
    ("first_integer", "-3", ("3",), 1.0),  # digits only
    ("first_integer", "first 1, then 12345", ("12345",), 0.0),
    ("first_integer", "none", ("12345",), 0.0),
    ("words", f'is "{KEY}".', (KEY,), 1.0),
    ("words", f"{{{KEY}}}", (KEY,), 1.0),
    ("words", f"{KEY}0", (KEY,), 0.0),
    ("words", KEY.replace("-", " "), (KEY,), 0.0),
    ("words", f"({KEY})", (KEY,), 0.0),  # brackets are not among the marks that part words
    ("words", "", ("",), 1.0),
    ("first_number", " 49.5, 3", ("49.5",), 1.0),
    ("first_number", "49", ("49.5",), 0.0),
    ("first_number", "49.0", ("49",), 1.0),
    ("first_number", "99.", ("99",), 1.0),
    ("first_number", "the 2nd is 98", ("98",), 0.0),
    ("first_number", "ninety", ("90",), 0.0),
    ("last_integer", "func_3(2) is:\n `-12`.", ("-12",), 1.0),
    ("last_integer", " 12", ("-12",), 0.0),
    ("last_integer", "12 is the value", ("12",), 0.0),
    ("last_integer", "10 + 2", ("2",), 1.0),
    ("last_integer", "1_2", ("12",), 0.0),
    ("last_integer", "9" * 5000, ("12",), 0.0),
    ("last_integer", " .", ("12",), 0.0),
]


@pytest.mark.parametrize("metric, prediction, answers, score", CASES)
def test_by_hand(metric, prediction, answers, score):
    assert METRICS[metric](prediction, answers) == score


def test_every_metric_has_cases_for_both_outcomes():
    for metric in METRICS:
        scores = {score for name, _, _, score in CASES if name == metric}
        assert {0.0, 1.0} <= scores or metric not in {name for name, *_ in CASES}


@pytest.mark.parametrize("metric", sorted(GROWS))
def test_a_growing_metric_never_falls(metric):
    whole = f' "{KEY}" alpha and beta, 12345 or 99.5 at last: 7'
    answers = (KEY, "alpha")
    scores = [METRICS[metric](whole[:n], answers) for n in range(len(whole) + 1)]
    assert scores == sorted(scores) and scores[-1] == 1.0


@pytest.mark.parametrize(
    "metric, early, late, answers",
    [
        ("first_integer", "12345", "123456", ("12345",)),
        ("words", KEY, KEY + "0", (KEY,)),
        ("first_number", "4", "49", ("4",)),
        ("last_integer", "12", "12 is the value", ("12",)),
    ],
)
def test_the_others_can_fall(metric, early, late, answers):
    assert METRICS[metric](early, answers) > METRICS[metric](late, answers)
    assert metric not in GROWS
