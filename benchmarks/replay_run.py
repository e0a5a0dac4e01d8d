"""Time to first token of a model of Llama-3-8B's shape with random weights, through transformers: dense against a replay.

    python benchmarks/replay_run.py [--tokens 131072] [--rounds 2] [--out FILE.json]

Random weights make adaptive methods keep nearly everything, so a replay attends a stored layout (random blocks of 128 x
128 at density 0.105, a list per head) while the estimator of a real method runs on the live queries and keys, its answer
dropped. What it shows is the speed of a recipe that selects this much, not a quality. Dense runs twice: stock transformers
with SDPA and the recipe dense. The replay without an estimator shows what the estimators take.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foveate import registry
from foveate.adapters.transformers import use
from foveate.bench import results
from foveate.bench.workloads import random_blocks
from foveate.layout import Layout
from foveate.methods.base import AttnInput, Method, State, option
from foveate.recipe import Recipe

DENSITY = 0.105
STORED: dict[tuple[int, int], Layout] = {}


@dataclass(frozen=True)
class Replay(Method):
    """Runs `estimator` on the live tensors, drops its plan, and names the stored layout. A benchmark, not a method."""

    estimator: str = option("none")

    id: ClassVar[str] = "replay"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"

    def plan(self, x: AttnInput, state: State) -> Layout:
        if self.estimator != "none":
            registry.parse(self.estimator).plan(x, state)
        return STORED[x.q.shape[1], x.q.shape[2]]


def model(layers: int, tokens: int) -> Any:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=tokens + 64, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=0.02, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        net = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return net


def first_token(net: Any, ids: torch.Tensor, recipe: Recipe | None) -> tuple[float, float]:
    """(seconds, bytes at the peak) of one prefill."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    def forward() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            out = net(input_ids=ids, use_cache=True, logits_to_keep=1)
        int(out.logits[0, -1].argmax())
        return time.perf_counter() - began

    if recipe is None:
        seconds = forward()
    else:
        with use(net, recipe):
            seconds = forward()
    return seconds, float(torch.cuda.max_memory_allocated())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=150, help="no further run begins after these")
    parser.add_argument("--out")
    args = parser.parse_args()
    registry.METHODS["replay"] = f"{__name__}:Replay" if __name__ != "__main__" else "benchmarks.replay_run:Replay"
    if __name__ == "__main__":  # the registry imports by name: give it this very module
        import sys

        sys.modules["benchmarks.replay_run"] = sys.modules["__main__"]
    began = time.monotonic()
    net = model(args.layers, args.tokens)
    ids = torch.randint(3, 128000, (1, args.tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for n in (4096, args.tokens):
        STORED[32, n] = random_blocks(32, n, DENSITY, device="cuda")
    density = STORED[32, args.tokens].density()
    subjects: dict[str, Recipe | None] = {
        "transformers sdpa": None,
        "dense": Recipe.of("dense"),
        "replay, no estimator": Recipe.of("replay"),
        "replay, flexprefill's estimator": Recipe.of("replay:estimator=flexprefill"),
        "replay, minference's estimator": Recipe.of("replay:estimator=minference"),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    for name, recipe in subjects.items():
        try:
            for tokens in (4096, args.tokens):  # compilation, and the first run of a length, which is slower
                first_token(net, ids[:, :tokens], recipe)
        except Exception as err:
            print(f"# {name} left out: {type(err).__name__}: {str(err)[:200]}", flush=True)
            found.pop(name)
    for i in range(args.rounds):
        for name in list(found) if i % 2 == 0 else list(found)[::-1]:
            if time.monotonic() - began > args.seconds:
                print("# the time is over", flush=True)
                break
            try:
                found[name].append(first_token(net, ids, subjects[name]))
                print(f"{name:34s} {found[name][-1][0]:7.2f} s  peak {found[name][-1][1] / 2**30:5.1f} GiB", flush=True)
            except Exception as err:
                print(f"# {name} failed: {type(err).__name__}: {str(err)[:200]}", flush=True)
    rows = [
        results.Row(
            f"Llama-3-8B shape, {args.tokens // 1024}K, {args.layers} layers",
            name,
            {"tokens": args.tokens, "layers": args.layers, "replay": name.startswith("replay"),
             "peak_gib": round(max(p for _, p in got) / 2**30, 1)},
            results.spread([1000 * s for s, _ in got]),
            density=density if name.startswith("replay") else 1.0,
        )
        for name, got in found.items() if got
    ]  # fmt: skip
    if args.out and rows:
        results.write(args.out, results.result("replay", rows, "cuda"))


if __name__ == "__main__":
    main()
