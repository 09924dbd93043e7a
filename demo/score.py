"""The score: bits that a model needs for each unseen byte of text; lower is better, a uniform guess needs 8."""

import math
from collections.abc import Callable

import torch

CONTEXT = 128  # bytes a prediction may look back on, in training and in scoring
BATCH = 64


def bits_per_byte(
    logits: Callable[[torch.Tensor], torch.Tensor], text: bytes, *, context: int = CONTEXT, batch: int = BATCH
) -> float:
    """Mean of -log2 p(byte | up to ``context`` bytes before it) over every byte of ``text`` but the first.

    ``logits`` maps int64 [batch, length] to float [batch, length, 256], position t holding what it expects at t + 1.
    Windows share one byte, so each byte is predicted exactly once.
    """
    if len(text) < 2:
        raise ValueError("a score needs at least two bytes of text")
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    nats, predicted = 0.0, 0
    for window in _windows(codes, context, batch):  # [batch, length + 1]
        with torch.inference_mode():
            expected = logits(window[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            expected.float().flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
        )
        nats += loss.item()
        predicted += window[:, 1:].numel()
    return nats / predicted / math.log(2)


def _windows(codes: torch.Tensor, context: int, batch: int) -> list[torch.Tensor]:
    """Batches of windows of ``context`` + 1 bytes, each starting at the last byte of the one before, and the rest."""
    full = (len(codes) - 1) // context
    windows = []
    if full:
        windows += list(codes.unfold(0, context + 1, context).split(batch))
    rest = codes[full * context :]
    if len(rest) > 1:
        windows.append(rest[None])
    return windows
