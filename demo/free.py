"""FREE-Merging: the filtered merge, which wears for each window of text the expert that a router picks.

Experts are extracted from the fine-tunes, a twentieth of each row. The router is a small network on the merged model's
own hidden states, fitted to windows of the training texts. It sees the window that is then scored, which can tell it
no more than log2(3) bits: 0.012 for each byte of a window.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from demo import family
from demo.score import CONTEXT
from demo.text import Split
from demo.verdict import BASE
from fastmerge.experts import ExpertSet, extract_expert
from fastmerge.routers import MLPRouter, pool

KEEP = 0.05
SCALE = 0.5
WINDOWS = 64
"""Windows of each domain's training text that the router learns from."""


def expected_bytes(models: Path, merged: Path, splits: Mapping[str, Split]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the merged model with its experts expects: from int64 [batch, length] to float [batch, length, 256]."""
    base = family.load(models / BASE).state_dict()
    model = family.load(merged).eval()
    tuned = {domain: family.load(models / domain).state_dict() for domain in splits}
    experts = ExpertSet(model, {domain: extract_expert(base, state, keep=KEEP) for domain, state in tuned.items()})

    @torch.inference_mode()
    def seen(codes: torch.Tensor) -> torch.Tensor:
        return pool(model.model(input_ids=codes).last_hidden_state)

    router = MLPRouter(experts.names, width=model.config.hidden_size)
    known = {domain: _windows(split.train) for domain, split in splits.items()}
    router.fit(torch.cat([seen(codes) for codes in known.values()]), [name for name in known for _ in range(WINDOWS)])

    def logits(codes: torch.Tensor) -> torch.Tensor:
        groups = defaultdict(list)
        for number, weights in enumerate(router.route(seen(codes))):
            groups[tuple(weights.items())].append(number)
        out = torch.empty(*codes.shape, model.config.vocab_size)
        for weights, members in groups.items():
            with experts.active({name: SCALE * weight for name, weight in weights}):
                out[members] = model(input_ids=codes[members]).logits
        return out

    return logits


def _windows(text: bytes) -> torch.Tensor:
    """Windows spread evenly over a text, int64 [WINDOWS, CONTEXT]."""
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.linspace(0, len(codes) - CONTEXT, WINDOWS).long()
    return torch.stack([codes[start : start + CONTEXT] for start in starts.tolist()])
