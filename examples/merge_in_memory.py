"""Merge state dicts without a file: four methods, and what each does to one element.

python merge_in_memory.py
"""

import torch

import fastmerge


def make_models() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A base and three fine-tunes of it: two matrices and a norm, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (64, 32), "down.weight": (32, 64), "norm.weight": (32,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [
        {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(3)
    ]
    return (
        {name: value.bfloat16() for name, value in base.items()},
        [{name: value.bfloat16() for name, value in model.items()} for model in tuned],
    )


def main() -> None:
    """Merge and print."""
    base, models = make_models()
    settings = {
        "linear": {"weight": [0.5, 0.3, 0.2]},
        "task_arithmetic": {"weight": 0.4},
        "ties": {"weight": [1.0, 0.7, 0.4], "density": 0.5},
        "della": {"weight": 1.0, "density": 0.5, "epsilon": 0.1, "seed": 7},
    }
    print(f"{'base':<16} {base['up.weight'][0, 0].item(): .4f}")
    for method, parameters in settings.items():
        # linear averages the models themselves; the others merge what the models changed in the base.
        given_base = None if method == "linear" else base
        merged = fastmerge.merge(models, base=given_base, method=method, exclude=[r"norm\."], **parameters)
        copied = torch.equal(merged["norm.weight"], (models[0] if given_base is None else base)["norm.weight"])
        print(f"{method:<16} {merged['up.weight'][0, 0].item(): .4f}  (norm copied: {copied})")


if __name__ == "__main__":
    main()
