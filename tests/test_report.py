"""The page: complete, self-contained, loads in a browser, and is written whole or not at all."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import re
import shutil
import subprocess
import zlib
from dataclasses import replace

import pytest
import torch

from foveate import measure, report
from foveate.diagnosis import GRID, Picture
from foveate.errors import FoveateError
from foveate.measure import Comparison, Row
from foveate.report import plots
from foveate.report.table import percent, seconds, size

COMMAND = ["foveate", "compare", "--prompt", "a file.txt"]


def picture(layer: int, head: int, computed: float) -> Picture:
    lower = [[computed if k <= q else 0.0 for k in range(GRID)] for q in range(GRID)]
    mass = [[1 / (q + 1) if k <= q else 0.0 for k in range(GRID)] for q in range(GRID)]
    return Picture(layer, head, lower, mass, computed)


def row(name: str, scale: float = 1.0, computed: float = 1.0, **more) -> Row:
    values = dict(
        settings=f"settings of {name}",
        first_token=10.0 * scale,
        first_token_cpu=18.0,
        tokens_per_second=5.0 / scale,
        first_step=0.3,
        prefill_density=computed / 2,
        prefill_computed=computed,
        decode_density=computed,
        decode_computed=computed,
        estimator=0.02,
        decode_estimator=0.01,
        kv_bytes=int(100 * 2**20 * scale),
        same_tokens=30,
        same_greedy=12,
        tokens=32,
        kl=0.0 if name == "dense" else 0.01,
        kl_max=0.2,
        mass=0.98,
        decode_mass=0.97,
        answer="bluebird",
        answered=True,
        backends=["flex"],
        head_density=[[computed] * 3] * 2,
        head_mass=[[0.9] * 3] * 2,
        pictures=[picture(0, 0, computed), picture(1, 2, computed)],
    )
    return Row(name, **(values | more))


@pytest.fixture
def comparison():
    facts = {
        "model": "a <model> & more", "class": "LlamaForCausalLM", "parameters": 134_000_000, "layers": 2, "heads": 3,
        "kv_heads": 1, "positions": 8192, "prompt": "7,000 tokens of essays", "prompt_tokens": 7000, "needle": (1, 5),
        "answer": "bluebird", "new_tokens": 32, "dtype": "bfloat16", "device": "CPU", "threads": 2, "backend": "auto",
        "seed": 0, "date": "2026-01-01 00:00 UTC", "system": "Linux", "versions": {"torch": "2.13.0", "gguf": None},
    }  # fmt: skip
    rows = [
        row("dense"),
        row("flexprefill@8k", 0.7, 0.35, notes=["<script>alert(1)</script> is escaped"]),
        row("snapkv@8k", 0.2, 1.0, answer="no idea", answered=False),
        row("flexprefill@8k+quest", 0.75, 0.35),
        Row("broken", "broken", error="it <failed> & says why"),
    ]
    return Comparison(facts, rows)


class Links(html.parser.HTMLParser):
    """Every address a browser might fetch, and whether tags are balanced."""

    void = frozenset({"meta", "link", "img", "br", "wbr", "path", "use", "line", "rect", "circle"})

    def __init__(self):
        super().__init__()
        self.found, self.open, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "srcset") and v]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_page_is_self_contained_and_well_formed(comparison):
    page = report.render(comparison, COMMAND)
    links = Links()
    links.feed(page)
    assert not links.open
    assert all(link.startswith(("data:", "#")) for link in links.found), [x[:80] for x in links.found]
    assert "script" not in links.tags and "url(http" not in page and "@import" not in page
    assert links.tags.count("img") >= 4


def test_the_page_says_everything(comparison):
    page = report.render(comparison, COMMAND).replace("<wbr>", "")
    for text in ("flexprefill@8k+quest", "a &lt;model&gt; &amp; more", "10.0 s", "0.70x", "misses the fact", "35 %",
                 "did not run: it &lt;failed&gt; &amp; says why", "100 MiB", "foveate compare --prompt &#39;a file.txt&#39;",
                 "torch 2.13.0", "settings of snapkv@8k", "30/32"):  # fmt: skip
        assert text in page, text
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "gguf" not in page.partition("<dt>versions</dt>")[2]


def test_recipes_with_the_same_prefill_share_a_picture(comparison):
    page = report.render(comparison)
    strip = page.partition('class="strip"')[2].partition("</figure>")[0]
    assert strip.count("<img") == 2  # dense mass, and one for rows 2 and 4
    assert re.findall(r">(\d)</span>", strip) == ["2", "4"]


def test_without_matplotlib_the_page_still_has_the_table(comparison, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    page = report.render(comparison)
    assert "need matplotlib" in page and "30/32" in page and "<img" not in page and "<svg" not in page


def test_a_comparison_of_dense_alone(comparison):
    page = report.render(Comparison(comparison.facts, comparison.rows[:1]))
    assert "10.0 s" in page and "What the heads looked at" not in page


def test_write_is_atomic(comparison, tmp_path, monkeypatch):
    path = report.write(comparison, tmp_path / "new" / "folder")
    assert path.read_text().startswith("<!doctype html>") and path.stat().st_mode & 0o044 == 0o044
    old = path.read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(FoveateError, match=r"No space left on device; the file that was there is unchanged"):
                report.write(comparison, path.parent)
        assert path.read_text() == old and os.listdir(path.parent) == ["index.html"]


def test_pixels_of_a_picture():
    """Blue where pairs were computed, orange where mass was left out, nothing above the diagonal."""
    pixels = decode_png(plots.layout_picture(picture(0, 0, 1.0)))
    assert pixels[5][2][:3] == plots.BLUE and pixels[5][2][3] > 200
    assert pixels[2][5][3] == 0
    missed = decode_png(plots.layout_picture(picture(0, 0, 0.0)))
    assert missed[2][0][:3] == plots.ORANGE and missed[2][0][3] == 255
    assert decode_png(plots.head_map([[1.0, 0.0], [0.5, 0.0], [1.0, 1.0]]))[0][1][3] == 128  # 3 layers wide, 2 heads tall
    assert decode_png(plots.missed_map([[1.0], [0.75]]))[0][0][3] == 0


def decode_png(address: str) -> list[list[tuple[int, ...]]]:
    data = base64.b64decode(address.partition(",")[2])
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    at, packed = 8, b""
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    raw, step, before, rows = zlib.decompress(packed), 1 + 4 * width, [0] * 4 * width, []
    for y in range(height):
        mode, line = raw[y * step], list(raw[y * step + 1 : (y + 1) * step])
        for i in range(len(line)):
            left, up, corner = line[i - 4] if i >= 4 else 0, before[i], before[i - 4] if i >= 4 else 0
            near = min((left, up, corner), key=lambda v: abs(left + up - corner - v))
            line[i] = (line[i] + (0, left, up, (left + up) // 2, near)[mode]) % 256
        rows.append([tuple(line[i : i + 4]) for i in range(0, len(line), 4)])
        before = line
    return rows


@pytest.mark.parametrize(
    "shown, want",
    [
        (seconds(15.34), "15.3 s"), (seconds(1.234), "1.23 s"), (seconds(0.0812), "81 ms"), (seconds(None), "-"),
        (size(512), "512 B"), (size(100 * 2**20), "100 MiB"), (size(1.5 * 2**30), "1.5 GiB"), (size(None), "-"),
        (percent(1.0), "100 %"), (percent(0.354), "35 %"), (percent(0.9871), "98.7 %"), (percent(0.014), "1.4 %"),
    ],
)  # fmt: skip
def test_figures(shown, want):
    assert shown == want


def test_summary_is_honest(comparison):
    text = report.summary(comparison)
    assert "flexprefill@8k (0.70x of dense)" in text and "snapkv" not in text  # snapkv is faster but answers wrongly
    wrong = Comparison(comparison.facts, [row("dense", answered=False), row("streaming_llm", 0.5)])
    assert "Dense attention itself does not give the answer" in report.summary(wrong)
    none = Comparison(comparison.facts, [row("dense"), row("streaming_llm", 2.0)])
    assert "none is smaller than dense here, or faster by 5%" in report.summary(none)


def test_summary_names_only_who_acts_in_a_phase(comparison):
    """A recipe of decode alone has dense's prompt: its earlier first token is noise. A cache policy does act in decode."""
    dense, fast = row("dense"), dict(first_token=0.1, tokens_per_second=1e6)
    for text, first, decode in (("quest", False, True), ("prefill=minference", True, False), ("snapkv", False, True)):
        said = report.summary(Comparison(comparison.facts, [dense, replace(row(text), **fast)]))
        assert (f"first token comes from {text}" in said, f"fastest decode from {text}" in said) == (first, decode)


@pytest.mark.parametrize("first, rate, said", [(0.97, 1.03, False), (0.94, 1.0, True), (1.0, 1.06, True)])
def test_summary_calls_nothing_faster_that_one_pass_cannot_tell(comparison, first, rate, said):
    """Three per cent may be noise, six may not."""
    dense = row("dense")
    other = replace(
        row("streaming_llm"), first_token=first * dense.first_token, tokens_per_second=rate * dense.tokens_per_second
    )
    text = report.summary(Comparison(comparison.facts, [dense, other]))
    assert ("of dense)" in text) is said and ("none is smaller" in text) is not said


def test_summary_orders_no_speeds_that_were_taken_beside_other_work(comparison, monkeypatch):
    """One row's time is enough to doubt every order; memory is as certain as ever."""
    assert not comparison.busy and "of dense" in report.summary(comparison)
    for b in range(len(comparison.rows)):
        rows = list(comparison.rows)
        rows[b] = replace(rows[b], notes=[*rows[b].notes, *measure._busy(torch.device("cpu"), 2.0, 0.1)])
        made = Comparison(comparison.facts, rows)
        text = report.summary(made)
        assert made.busy and json.loads(made.to_json())["busy"] is True
        assert "no order of speed is certain" in text and "of dense" not in text and "fastest" not in text
    for kv_bytes, said in ((1, "the smallest cache from streaming_llm"), (2**40, "none is smaller")):
        other = row("streaming_llm", 0.5, kv_bytes=kv_bytes, notes=[measure.BUSY_NOTE])
        text = report.summary(Comparison(made.facts, [row("dense"), other]))
        assert said in text and "faster" not in text
    monkeypatch.setattr("foveate.report.plots.available", lambda: False)
    assert text in html.unescape(report.render(Comparison(made.facts, [row("dense"), other])))


CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROME is None, reason="no headless Chromium is installed")
def test_the_page_loads_in_a_browser(comparison, tmp_path):
    path = report.write(comparison, tmp_path / "page", COMMAND)
    quiet = ["no-first-run", "disable-quic", "disable-sync", "disable-background-networking", "disable-component-update"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--{name}" for name in quiet]
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [CHROME, *flags, "--enable-logging=stderr", "--window-size=1280,2400", f"--screenshot={shot}", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file() and shot.stat().st_size > 20_000, done.stderr[-500:]
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]  # no refused resource, no syntax error
    dom = subprocess.run([CHROME, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert dom.count("<tr>") == 1 + len(comparison.rows) and "did not run" in dom


def test_json_round_trip(comparison):
    assert json.loads(comparison.to_json())["rows"][1]["first_token"] == 7.0
