"""The kernels by themselves: exact selection over shards, sparsification, and one consensus merge.

python ops_tour.py
"""

import torch

from fastmerge import ops


def main() -> None:
    """Call each op once."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(1000, 500, generator=generator).bfloat16()

    # Selection: the exact k-th largest magnitude of one vector that lies in several shards. Histograms of shards add.
    shards = list(delta.split(300))
    threshold = ops.kth_magnitude(shards, k=delta.numel() // 2)
    whole, parts = ops.abs_histogram(delta), sum(ops.abs_histogram(shard) for shard in shards)
    print(f"half of all magnitudes are at least {threshold:.4f}; histograms add: {torch.equal(whole, parts)}")

    # Many bf16 magnitudes equal the threshold. These rules differ in which of them stay.
    for ties in ("lowest_index", "hashed", "keep"):
        mask = ops.topk_mask(delta, 0.5, ties=ties)
        print(f"ties={ties:<13} {int(mask.sum())} of {mask.numel()} elements")

    # Sparsification: four rules, with the L1 norm given back.
    before = float(delta.float().abs().sum())
    for method in ("magnitude", "magnitude_outliers", "bernoulli", "della_magprune"):
        sparse = ops.sparsify(delta, 0.5, method=method, rescale="l1", seed=1, tensor_id=ops.tensor_id("up.weight"))
        kept = float((sparse != 0).float().mean())
        print(f"{method:<19} keeps {kept:.3f}, L1 norm {float(sparse.float().abs().sum()) / before:.3f} of what it was")

    # Consensus: sparsify, elect a sign, average what agrees, put it on the base. No delta is stored.
    base = torch.randn(1000, 500, generator=generator).bfloat16()
    models = [(base + 0.01 * torch.randn(base.shape, generator=generator)).bfloat16() for _ in range(3)]
    merged = ops.consensus_merge(base, models, weights=[1.0, 0.7, 0.4], density=0.5)
    print(f"merged {merged.dtype} {tuple(merged.shape)}, {float((merged != base).float().mean()):.1%} of it moved")


if __name__ == "__main__":
    main()
