"""What `compute-sanitizer --tool racecheck` says about the kernels: its reports read, grouped, known ones told from others.

racecheck watches shared memory. Loads and stores of TMA tiles and operands of wgmma it gives to no thread; what it sees of
the Gluon kernels are words, positions and sums that producers leave for consumers by plain stores. Their order is lanes ->
barrier of the partition -> arrive of one lane -> wait, an "indirect barrier dependency": followed by default since version
2024.4 of the tool, with an option since 2023.3, before not at all, and versions up to 2025.4 list false positives about
mbarriers among what they repaired. Triton's own lowering of `gl.warp_specialize` passes through shared memory, too: which
partition each worker warp runs, and what that captured, with barriers of the whole CTA before, between and after.

So three cases calibrate a run (`sanitize_run.py`): a race, which must be found, the same memory handed over by words, and
partitions that only start and write each its own place. If one of the last two is reported, reports of the kinds that it
stands for (`control`) are the tool's; if not, they are ours. In PTX `tests/test_gluon_words.py` checks the order of what
the kernels hand over, `tests/test_sanitize_run.py` that of what Triton does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
try:
    from foveate.kernels.gluon.shim import gl, gluon
except ImportError:
    gluon = None

GLUON = Path(__file__).resolve().parent.parent / "src/foveate/kernels/gluon"
HANDED, STARTED = "handed over", "partitions"  # the cases whose reports are the tool's
BARRIERS = 64  # mbarriers of a CTA to follow: `keys_kernel` and `private_kernel` have up to 28

# What a line of source in kernels/gluon touches -> why a report about two such lines is none of ours.
ORDERED = "stored by a partition's lanes, handed over by one arrive behind their barrier, read behind a wait"
KNOWN = {
    "words": (re.compile(r"\b(tile_words|step_words|words)\.index\("), ORDERED),
    "places": (re.compile(r"\bplaces\.index\("), ORDERED),
    "sums": (re.compile(r"\bsums\.index\("), ORDERED),
    "low-bit numbers": (re.compile(r"\b(extras|units)\.index\("), ORDERED),
    "exchanged halves": (re.compile(r"\bspare\.(load|store)\("), ORDERED),
    "cleaned keys": (re.compile(r"\bk_buf\.(load|store)\("), "both consumers write the same values where either may read"),
}
CAPTURES = "captures of warp_specialize"  # recognised by `_starts`


def control(kind: str) -> str | None:
    """The case that must be reported, too, if reports of a kind are to be the tool's; None: they stand by themselves."""
    return {"cleaned keys": None, CAPTURES: STARTED}.get(kind, HANDED)


class Access(NamedTuple):
    """One side of a race. how: Read or Write; where: file:line, or the kernel and an offset without line numbers."""

    how: str
    kernel: str
    where: str

    def kind(self) -> str | None:
        """The kind of shared memory that the line of source touches: `CAPTURES`, or one in `KNOWN`."""
        name, _, line = self.where.partition(":")
        text = _lines(name)
        if not line.isdigit() or not 0 < int(line) <= len(text):
            return None
        if int(line) in _starts(name, self.kernel):
            return CAPTURES
        return next((kind for kind, (pattern, _) in KNOWN.items() if pattern.search(text[int(line) - 1])), None)


class Race(NamedTuple):
    """Accesses that racecheck found unordered, and how often."""

    first: Access
    second: Access
    hazards: int

    def kind(self) -> str | None:
        """The kind of memory if the report is known, else None: two sides of one kind, one of them a read.

        Two writes of words would be two producers, which there are not; keys are cleaned by both consumers, and every warp
        that starts the partitions stores the same numbers.
        """
        kind = self.first.kind()
        reads = "Read" in (self.first.how, self.second.how)
        return kind if kind == self.second.kind() and (reads or kind in ("cleaned keys", CAPTURES)) else None

    def __str__(self) -> str:
        return (
            f"{self.first.kernel}: {self.first.how} {self.first.where} and {self.second.how} {self.second.where}, "
            f"{self.hazards} hazards"
        )


@lru_cache
def _lines(name: str) -> list[str]:
    own, path = Path(__file__), GLUON / Path(name).name  # the control's lines are here
    path = own if path.name == own.name else path
    return path.read_text().splitlines() if path.is_file() else []


@lru_cache
def _starts(name: str, kernel: str) -> frozenset[int]:
    """The lines Triton gives to what it lowers `gl.warp_specialize` to: a kernel's `def` and that call; none without one."""
    head = 0
    for i, line in enumerate(_lines(name), 1):
        if re.match(r"\s*def ", line):
            head = i if re.match(rf"\s*def {re.escape(kernel)}\(", line) else 0
        elif head and line.lstrip().startswith("gl.warp_specialize("):
            return frozenset((head, i))
    return frozenset()


# ---------------------------------------------------------------------- the reports
_SIDE = re.compile(r"(Read|Write) access at (.*?)(\+0x[0-9a-f]+)?(?: in (\S+:\d+))?(?: \[(\d+) hazards?\])?$")


def _access(text: str) -> tuple[Access, int] | None:
    found = _SIDE.search(text)
    if found is None:
        return None
    how, kernel, offset, where, hazards = found.groups()
    kernel = kernel.split("(")[0]
    return Access(how, kernel, where or kernel + (offset or "")), int(hazards or 1)


def read(text: str) -> list[Race]:
    """The races in the output of the tool (`--racecheck-report analysis`, its default)."""
    races: list[Race] = []
    first = None
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        if "Race reported between" in line:
            found = _access(line.split("Race reported between", 1)[1].strip())
            first = found[0] if found else None
            if first is None:
                races.append(Race(Access("?", "", line), Access("?", "", line), 1))  # not to be passed over
        elif first is not None and line.strip("= ").startswith("and ") and (found := _access(line.strip("= "))):
            races.append(Race(first, *found))
    return races


def options(usage: str) -> list[str]:
    """Options of the tool for such kernels. usage: what its `--help` prints, since they differ between versions."""
    follow = ["--racecheck-indirect-barrier-dependency", "yes"] if "--racecheck-indirect-barrier-dependency" in usage else []
    return ["--num-cuda-barriers", str(BARRIERS), *follow, "--print-limit", "1000"]


def grouped(races: Sequence[Race]) -> tuple[dict[tuple[str, str], int], list[Race]]:
    """(hazards by kernel and known kind, the races that are of none)."""
    known: dict[tuple[str, str], int] = {}
    unknown = []
    for race in races:
        kind = race.kind()
        if kind is None:
            unknown.append(race)
        else:
            at = race.first.kernel, kind
            known[at] = known.get(at, 0) + race.hazards
    return known, unknown


def listed(races: Sequence[Race]) -> list[str]:
    """A line for each pair of accesses: reports of several launches of a kernel, and of its variants, are one."""
    pairs: dict[tuple[Access, Access], list[int]] = {}
    for race in races:
        pairs.setdefault((race.first, race.second), []).append(race.hazards)
    return [f"{Race(*pair, sum(n))}, {len(n)} reports" for pair, n in pairs.items()]


def unexcused(kinds: Sequence[str], reported: Collection[str]) -> list[str]:
    """Those of the known kinds whose reports may not stand. reported: which of `HANDED` and `STARTED` were reported; where
    one was not, the tool follows what orders it, and reports of what is ordered in the same way need another explanation."""
    return [kind for kind in kinds if control(kind) not in (None, *reported)]


# ---------------------------------------------------------------------- cases that calibrate a run
if triton is not None:

    @triton.jit
    def _raced(x):
        """Each thread of two warps stores a word and loads that of a thread of the other warp, with nothing in between."""
        i = tl.arange(0, 64)
        got = tl.inline_asm_elementwise(
            """{
            .shared .align 4 .b32 raced[64];
            .reg .b32 at, own, far;
            mov.u32 at, raced;
            shl.b32 far, $1, 2;
            add.u32 own, at, far;
            sub.u32 far, at, far;
            st.shared.b32 [own], $1;
            ld.shared.b32 $0, [far+252];
            }""",
            "=&r,r", [i], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.store(x + i, got)

    @triton.jit
    def _handed(x):
        """Eight rounds: a warp stores a line of words, one lane arrives; the other warp waits, loads, one lane arrives."""
        i = tl.arange(0, 64)
        got = tl.inline_asm_elementwise(
            """{
            .shared .align 8 .b64 full;
            .shared .align 8 .b64 empty;
            .shared .align 4 .b32 left[32];
            .reg .pred first, lead, own, done;
            .reg .b32 at, lane, round, phase, f, e;
            mov.u32 f, full;
            mov.u32 e, empty;
            mov.u32 at, left;
            and.b32 lane, $1, 31;
            setp.eq.u32 lead, lane, 0;
            shl.b32 lane, lane, 2;
            add.u32 at, at, lane;
            setp.eq.u32 first, $1, 0;
            @first mbarrier.init.shared::cta.b64 [f], 1;
            @first mbarrier.init.shared::cta.b64 [e], 1;
            bar.sync 0;
            mov.u32 $0, 0;
            mov.u32 round, 0;
            setp.lt.u32 own, $1, 32;
            @!own bra take;
            give:
            not.b32 phase, round;
            and.b32 phase, phase, 1;
            room:
            mbarrier.try_wait.parity.shared.b64 done, [e], phase;
            @!done bra room;
            st.shared.b32 [at], round;
            bar.warp.sync -1;
            @lead mbarrier.arrive.shared::cta.b64 _, [f];
            add.u32 round, round, 1;
            setp.lt.u32 done, round, 8;
            @done bra give;
            bra over;
            take:
            and.b32 phase, round, 1;
            ready:
            mbarrier.try_wait.parity.shared.b64 done, [f], phase;
            @!done bra ready;
            ld.shared.b32 lane, [at];
            add.u32 $0, $0, lane;
            bar.warp.sync -1;
            @lead mbarrier.arrive.shared::cta.b64 _, [e];
            add.u32 round, round, 1;
            setp.lt.u32 done, round, 8;
            @done bra take;
            over:
            bar.sync 0;
            }""",
            "=&r,r", [i], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.store(x + i, got)


def raced(device: str) -> None:
    """What racecheck must find."""
    _raced[(1,)](torch.zeros(64, dtype=torch.int32, device=device), num_warps=2)


def handed(device: str) -> None:
    """What racecheck reports only if it does not follow an arrive for other lanes; also checks that the order holds."""
    x = torch.zeros(64, dtype=torch.int32, device=device)
    _handed[(1,)](x, num_warps=2)
    assert x.tolist() == [0] * 32 + [28] * 32, "a hand-over lost a word"


if gluon is not None:

    @gluon.jit
    def _write(x, at, value, WARPS: gl.constexpr):
        i = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
        gl.store(x + at + i, i * 0 + value)

    @gluon.jit
    def _started(x, given):
        """Partitions of 4, 4 and 1 warps, each with a place of its own in x; what they write is loaded before they start."""
        at = gl.program_id(0) * 288
        value = gl.load(given + gl.program_id(0))
        gl.warp_specialize(
            [(_write, (x, at, value, 4)), (_write, (x, at + 128, value, 4)), (_write, (x, at + 256, value, 1))],
            [4, 1],
            [232, 40],
        )


def started(device: str) -> None:
    """What racecheck reports only if it does not follow the start of partitions; also checks that each got its value."""
    x, given = torch.zeros(4, 288, dtype=torch.int32, device=device), torch.arange(1, 5, dtype=torch.int32, device=device)
    _started[(4,)](x, given, num_warps=4, maxnreg=168)
    assert bool((x == given[:, None]).all()), "a partition wrote another value than it was given"
