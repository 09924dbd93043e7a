"""Mutations of the family `importance`: of its definition, of its kernels for GPUs, of what methods make of it."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

DEFINITION = ("tests/reference/test_importance.py",)
METHODS = ("tests/methods/test_importance.py",)
LOGARITHM = (
    "tests/reference/test_functions.py::test_log_at_its_ends",
    "tests/reference/test_functions.py::test_log_loses_nothing_near_one",
    "tests/reference/test_functions.py::test_the_distance_to_the_exact_value",
    "tests/reference/test_functions.py::test_nan_stays_nan",
)

MUTATIONS = [
    *in_file(
        "fastmerge/reference/importance.py",
        DEFINITION,
        ("nearswap: the least distance", "torch.where(distance < nearest, nearest, distance)", "distance"),
        (
            "nearswap: a weight is at least 0",
            "torch.where(weight < 0.0, 0.0, torch.where",
            "torch.where(weight < -9e9, 0.0, torch.where",
        ),
        ("nearswap: a weight is at most 1", "torch.where(weight > 1.0, 1.0, weight)", "weight"),
        ("nearswap: the model gets the weight", "weight * b + (1.0 - weight) * a", "weight * a + (1.0 - weight) * b"),
        ("ram: epsilon itself takes no part", "[~(d.abs() <= least) for", "[~(d.abs() < least) for"),
        ("ram: NaN takes part", "[~(d.abs() <= least) for", "[d.abs() > least for"),
        ("ram: shared is more than one", "(p & (count > 1))", "(p & (count > 0))"),
        ("ram: lone is one", "(p & (count == 1))", "(p & (count <= 2))"),
        (
            "ram: the factor is for lone changes",
            "torch.where(count == 1.0, total * factor",
            "torch.where(count >= 1.0, total * factor",
        ),
        ("ram: nothing is divided by 0", "torch.where(count < 1.0, 1.0, count)", "count"),
        (
            "ram: the mean is over those that take part",
            "total / torch.where(count < 1.0, 1.0, count)",
            "total / len(tensors)",
        ),
        ("variance: about the mean", "apart = [e - mean for e in shifted]", "apart = shifted"),
        ("variance: exactly 0 where all agree", "shifted = [d - deltas[0] for d in deltas]", "shifted = deltas"),
        ("variance: over the number of models", "(a * a for a in apart) / models)", "(a * a for a in apart))"),
        ("energy: of what is kept", "kept = d if mask is None else d[unpacked(mask, d.numel())]", "kept = d"),
        ("a mask's low bit comes first", "(mask[:, None] >> places & 1)", "(mask[:, None] >> (7 - places) & 1)"),
        ("row sums: halves of powers of two", "half = 1 << ((width - 1).bit_length() - 1)", "half = (width + 1) // 2"),
        ("shares: the greatest is taken off", "powers = exp(x - x.amax(dim=1, keepdim=True))", "powers = exp(x)"),
        ("shares: none is 0", " + _float32(SMALLEST_SHARE, x)", " + _float32(0.0, x)"),
        ("divergence: nothing cancels", "torch.where(z.abs() <= NEAR, near,", "torch.where(z.abs() <= -1.0, near,"),
        ("divergence: the terms q - p", "p * log(p / q) - apart)", "p * log(p / q))"),
        ("divergence: the series' factor", "(p / q) * log_polynomial(z)", "log_polynomial(z)"),
        ("importance: the row's divergence", "rows * divergence[:, None]", "rows * divergence.mean()"),
    ),
    *in_file(
        "fastmerge/reference/functions.py",
        LOGARITHM,
        (
            "log: denormals are scaled",
            "bits = torch.where(denormal, x * TWO_23, x)",
            "bits = torch.where(denormal, x, x)",
        ),
        (
            "log: the mantissa begins at the root of 1/2",
            "exponent = (bits - ROOT_HALF_BITS) >> MANTISSA_BITS",
            "exponent = (bits - 0x3F800000) >> MANTISSA_BITS",
        ),
        ("log: the square", " - 0.5 * square\n", " - 0.499999 * square\n"),
        ("log: the low part of ln 2", " + k * LN2_LOW)", ")"),
        (
            "log: 0 and infinity",
            "value = torch.where(x == 0.0, -INFINITY, torch.where(x == INFINITY, INFINITY, value))",
            "value = value + 0.0",
        ),
        ("log: NaN below 0", "torch.where((x < 0.0) | x.isnan(), NAN, value)", "torch.where(x.isnan(), NAN, value)"),
        ("log: NaN stays", "torch.where((x < 0.0) | x.isnan(), NAN, value)", "torch.where(x < 0.0, NAN, value)"),
    ),
    *in_file(
        "fastmerge/methods/sce.py",
        METHODS,
        (
            "sce: of what is not 0",
            "last = int(int(torch.count_nonzero(spread[0])) * self.select_topk)",
            "last = int(spread[0].numel() * self.select_topk)",
        ),
        ("sce: little energy weighs all alike", "if total < SMALLEST_ENERGY:", "if total <= 0.0:"),
        ("sce: the least divisor", "if any(0 < weight < SMALLEST_SHARE for weight in weights):", "if False:"),
        (
            "sce: the least divisor where the share is less",
            "torch.where(share < least, least, share)",
            "torch.where(share == 0, least, share)",
        ),
        ("sce: the unweighted sum elects", 'election="total"', 'election="weighted"'),
        (
            "sce: energies of what is selected",
            "return ops.energy_sums(chunk.base, chunk.models, mask=mask,",
            "return ops.energy_sums(chunk.base, chunk.models, mask=None,",
        ),
    ),
    *in_file(
        "fastmerge/methods/ram.py",
        METHODS,
        ("ramplus: no more than alpha", "min(shared_changes / max(lone, 1), alpha)", "shared_changes / max(lone, 1)"),
        ("ramplus: the ratio to lone changes", "shared_changes / max(lone, 1)", "lone / max(shared_changes, 1)"),
    ),
    *in_file(
        "fastmerge/methods/arcee_fusion.py",
        METHODS,
        (
            "fusion: quartiles from the smallest",
            "numel - int(quartile * (numel - 1))",
            "1 + int(quartile * (numel - 1))",
        ),
        ("fusion: one and a half times the distance", "median + (high - low) * 1.5", "median + (high - low)"),
        (
            "fusion: the threshold itself is taken",
            "& 0x7FFFFFFF).to(torch.int64)\n",
            "& 0x7FFFFFFF).to(torch.int64) + 1\n",
        ),
    ),
]
