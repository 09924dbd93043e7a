"""The family: a small base that saw every domain for a while, and one fine-tune of it for each domain.

Byte-level Llamas, trained with plain PyTorch from fixed seeds and saved by transformers as sharded safetensors, so that
what is merged is what people merge, only smaller.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from demo.score import CONTEXT
from demo.text import DOMAINS, Split, digest


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the family is, apart from its text."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    context: int = CONTEXT
    batch: int = 32
    base_steps: int = 300
    tune_steps: int = 150
    base_rate: float = 2e-3
    tune_rate: float = 1.5e-3
    dtype: str = "bfloat16"
    shard_size: str = "600KB"
    seed: int = 20240917


def build(
    folder: Path, splits: dict[str, Split], recipe: Recipe = Recipe(), say: Callable[[str], None] = print
) -> None:
    """Train the family into ``folder`` (``base`` and one folder for each domain), unless this very family is there."""
    identity = _identity(splits, recipe)
    note = folder / "family.json"
    if note.is_file() and json.loads(note.read_text()) == identity:
        say(f"models: those in {folder} (made by an earlier run)")
        return
    started = time.perf_counter()
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)

    torch.manual_seed(recipe.seed)
    model = transformers.LlamaForCausalLM(_architecture(recipe))
    say(f"models: training a base and {len(DOMAINS)} fine-tunes of {model.num_parameters():,} parameters (once)")
    everything = [splits[domain].train for domain in DOMAINS]
    loss = _train(model, everything, recipe.base_steps, recipe.base_rate, recipe)
    _save(model, partial / "base", recipe)
    say(
        f"  base: {recipe.base_steps} steps on all domains, loss {loss:.2f} bits, {time.perf_counter() - started:.0f} s"
    )
    # Fine-tunes start from the base as it was saved: what a merge subtracts is what training started from.
    for domain in DOMAINS:
        model = load(partial / "base")
        loss = _train(model, [splits[domain].train], recipe.tune_steps, recipe.tune_rate, recipe)
        _save(model, partial / domain, recipe)
        say(f"  {domain}: {recipe.tune_steps} steps more, loss {loss:.2f} bits, {time.perf_counter() - started:.0f} s")

    (partial / "family.json").write_text(json.dumps(identity, indent=2) + "\n")
    partial.rename(folder)


def load(folder: Path) -> torch.nn.Module:
    """The model in ``folder``, in float32, loaded as anybody would load it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _architecture(recipe: Recipe) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=256,  # one token for each byte
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def _train(model: torch.nn.Module, texts: Sequence[bytes], steps: int, rate: float, recipe: Recipe) -> float:
    """AdamW with a short warm-up and a cosine to zero; returns the mean loss of the last tenth, in bits per byte."""
    generator = torch.Generator().manual_seed(recipe.seed)
    codes = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, steps // 20)

    def pace(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    model.train()
    losses = []
    for _ in range(steps):
        window = _batch(codes, recipe, generator)  # [batch, context + 1]
        logits = model(input_ids=window[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last) / math.log(2)


def _batch(codes: Sequence[torch.Tensor], recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """``batch`` windows, the texts taking turns, so that each is seen equally often whatever its size."""
    windows = []
    for row in range(recipe.batch):
        text = codes[row % len(codes)]
        start = int(torch.randint(len(text) - recipe.context, (1,), generator=generator))
        windows.append(text[start : start + recipe.context + 1])
    return torch.stack(windows).long()


def _save(model: torch.nn.Module, folder: Path, recipe: Recipe) -> None:
    model.to(getattr(torch, recipe.dtype)).save_pretrained(folder, max_shard_size=recipe.shard_size)


def _identity(splits: dict[str, Split], recipe: Recipe) -> dict[str, object]:
    """What must be equal for models of an earlier run to be these models."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"recipe": asdict(recipe), "text": digest(splits), "code": code}
