"""One session on a GPU: the tests that need one, the kernel benchmark, and a sweep of the Triton kernel's tile sizes.

    python benchmarks/gpu_run.py OUT [--seconds 480] [--parts tests,prefill,long,decode,tune]

Each part is a process of its own with its own share of the time, so that one that fails or hangs leaves the others
alone. OUT gets one JSON or log file a part; the last thing printed is a short table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# part: (share of the time, arguments of python)
BENCH = ["-m", "foveate.bench.kernels", "--rounds", "3"]


def parts(out: Path) -> dict[str, tuple[float, list[str]]]:
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf", *workers]
    return {
        "tests": (0.40, tests),
        "prefill": (0.22, [*BENCH, "--lengths", "32768", "--json", str(out / "kernels_32k.json")]),
        "long": (0.18, [*BENCH, "--lengths", "131072", "--json", str(out / "kernels_128k.json")]),
        "decode": (0.08, [*BENCH, "--decode", "--lengths", "32768,131072", "--json", str(out / "decode.json")]),
        "tune": (0.12, [__file__, str(out), "--sweep"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--parts", type=lambda t: t.split(","))
    parser.add_argument("--sweep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sweep:
        return sweep(args.out)
    todo = {k: v for k, v in parts(args.out).items() if args.parts is None or k in args.parts}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1"}
    began, lines = time.monotonic(), []
    for name, (share, command) in todo.items():
        left = args.seconds - (time.monotonic() - began)
        rest = sum(s for k, (s, _) in todo.items() if list(todo).index(k) >= list(todo).index(name))
        limit = left * share / rest
        if limit < 10:
            lines.append(f"{name}: not run, {left:.0f} s left")
            continue
        if "--json" in command:
            command = [*command, "--budget", f"{0.85 * limit:.0f}"]
        log, start = args.out / f"{name}.log", time.monotonic()
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
                state = f"exit {code}"
            except subprocess.TimeoutExpired:
                state = "stopped: out of time"
        lines.append(f"{name}: {state} after {time.monotonic() - start:.0f} s")
        print(lines[-1], flush=True)
    sys.path.insert(0, str(ROOT / "src"))
    from foveate.bench import kernels, results

    for name, (_, command) in todo.items():
        print(f"\n== {name}")
        data = Path(command[command.index("--json") + 1]) if "--json" in command else None
        if data is not None and data.is_file():  # rewritten after every problem: there even if the part was stopped
            print(kernels.table(results.load(data)))
        elif (log := args.out / f"{name}.log").is_file():
            print(*log.read_text(errors="replace").splitlines()[-40:], sep="\n")
    print("\n" + "\n".join(lines))


def sweep(out: Path) -> None:
    """Time the Triton kernel under other tile sizes than its table's: what to put into the table."""
    import torch

    from foveate.bench import kernels, results
    from foveate.bench.results import Row
    from foveate.kernels import triton as module
    from foveate.kernels.base import Want
    from foveate.kernels.triton.config import Config
    from foveate.kv import KV
    from foveate.layout import Layout

    dev, rows, table = torch.device("cuda"), [], module.config

    def attend(config: Config, q: torch.Tensor, kv: KV, layout: Layout) -> None:
        module.config = lambda *_: config
        try:
            module.forward(q, kv, layout, scale=q.shape[-1] ** -0.5, softcap=0.0, want=Want())
        finally:
            module.config = table

    choices = {
        128: [(128, 8, 2), (128, 8, 3), (64, 8, 2), (64, 8, 3), (64, 8, 4), (64, 4, 3), (128, 4, 2)],
        64: [(64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 2), (32, 4, 4)],
    }
    wanted = [
        ("dense", 128), ("blocks", 128), ("blocks of 64 keys", 128), ("blocks of 64 x 64", 64), ("tiles and columns", 64)
    ]  # fmt: skip
    seen = set()
    for problem in kernels.problems(kernels.Shape(32768)):
        tile = dict(wanted).get(problem.case)
        if tile is None or problem.params.get("density", 0.1) != 0.1 or problem.case in seen:
            continue
        seen.add(problem.case)
        s = problem.shape
        q, k, v = (torch.randn(s.b, x, s.n, s.d, device=dev, dtype=s.dtype) for x in (s.h, s.g, s.g))
        layout, kv, calls = problem.make(dev), KV.dense(k, v), {}
        for keys, warps, stages in choices[tile]:
            call = partial(attend, Config(tile, keys, warps, stages), q, kv, layout)
            try:
                call()
                calls[f"{keys} keys, {warps} warps, {stages} stages"] = call
            except Exception as err:
                print(f"{problem.case} {keys}/{warps}/{stages}: {str(err).splitlines()[0][:100]}", flush=True)
        density = layout.density()
        for name, ms in kernels.interleave(calls, dev, 2).items():
            took = results.spread(ms)
            rate = 4 * s.d * s.n * (s.n + 1) / 2 * s.h * density / took["median"] / 1e9
            rows.append(Row(problem.case, name, {"n": s.n, "tile": tile, **problem.params}, took, rate, density))
            print(f"{problem.case:20s} {name:28s} {took['median']:8.3f} ms {rate:7.1f} TFLOP/s", flush=True)
        results.write(out / "sweep.json", results.result("triton sweep", rows, dev))


if __name__ == "__main__":
    main()
