"""Make tests/fixtures/smollm2_qk.safetensors: rotated queries and keys, and values, of two layers of SmolLM2.

    python scripts/capture_qk.py

512 tokens of an essay, 6 query heads and 2 kv heads of layers 3 and 17, fp16 (1.3 MB). Selections of every method are
compared on it with slow transcriptions of their cards (tests/fidelity.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import foveate
from foveate.evals.text import Source
from foveate.models import load

LAYERS, TOKENS, HEADS, GROUPS = (3, 17), 512, 6, 2
OUT = Path(__file__).parent.parent / "tests" / "fixtures" / "smollm2_qk.safetensors"


class Watch:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def planned(self, x, plan, seconds) -> None:
        if x.layer in LAYERS:
            for name, t, n in (("q", x.q, HEADS), ("k", x.kv.k, GROUPS), ("v", x.kv.v, GROUPS)):
                self.tensors[f"{name}{x.layer}"] = t[:, :n, :TOKENS].to(torch.float16).contiguous().clone()

    def attended(self, x, plan, out) -> None:
        pass


def main() -> None:
    model, tokenizer = load("smollm2", device="cpu", dtype="fp32")
    ids = tokenizer(" ".join(Source.of().prose[:1000]), return_tensors="pt")["input_ids"][:, :TOKENS]
    watch = Watch()
    handle = foveate.apply(model, "dense")
    handle.meter = watch
    with torch.no_grad():
        model(ids)
    handle.remove()
    OUT.parent.mkdir(exist_ok=True)
    save_file(watch.tensors, OUT, {"model": "SmolLM2-135M-Instruct", "rope_theta": "100000", "tokens": str(TOKENS)})
    print(f"{OUT.name}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
