"""Mutations of the family `geometry` in Triton and in CUDA C++, and of what is made of inner products."""

from __future__ import annotations

from checks.mutation_list.mutation import cuda, equal_bits, in_file

ANGLES = ("tests/methods/test_angles.py",)
METHODS = ("tests/methods/test_geometry.py",)

MUTATIONS = [
    *in_file(
        "triton_kernels/geometry.py",
        ("tests/triton/test_geometry.py", *equal_bits("gram")),
        (
            "the base is subtracted",
            "(step_of(xs[i], place, inside, WHOLE) - based)",
            "step_of(xs[i], place, inside, WHOLE)",
        ),
        (
            "deltas are rounded to float32",
            "((step_of(xs[i], place, inside, WHOLE) - based).to(tl.float64),)",
            "(step_of(xs[i], place, inside, WHOLE).to(tl.float64) - based.to(tl.float64),)",
        ),
        ("what is past the end is 0", "mask=inside, other=0.0))", "mask=inside, other=1.0))"),
        ("a row ends at its end", "inside = here < end", "inside = here <= end"),
        ("products are of float64", "+ left[i] * left[j],)", "+ (left[i].to(tl.float32) * left[j].to(tl.float32)),)"),
        ("halves are 32 lanes apart", "(TOGETHER, 2, 32)), axis=1)", "(TOGETHER, 32, 2)), axis=2)"),
        ("halves of halves, too", "(TOGETHER, 2, 8)), axis=1)", "(TOGETHER, 8, 2)), axis=2)"),
        ("NaN has no payload", "> INF_BITS, NAN_BITS, bits)", "> INF_BITS, bits, bits)"),
        ("infinity is no NaN", "0x7FFFFFFFFFFFFFFF) > INF_BITS", "0x7FFFFFFFFFFFFFFF) >= INF_BITS"),
        ("blocks past the last are not stored", "there = number < blocks", "there = number <= blocks"),
        ("blocks are counted from their row", "(number - row * in_row) * BLOCK", "number * BLOCK"),
        (
            "a whole program needs all of its blocks",
            "(first + TOGETHER) * BLOCK <= row_length",
            "first * BLOCK <= row_length",
        ),
        (
            "pairs of two groups have their place",
            "(left - 1) // 2 + (first_right + j - left)",
            "(left - 1) // 2 + (first_right + j)",
        ),
    ),
    *in_file(
        "csrc/cuda/geometry.cu",
        cuda("geometry", "gram"),
        ("elements past the end are 0", "i < end ? bits_at(x, i) : 0u", "i <= end ? bits_at(x, i) : 0u"),
        ("a thread's lanes are 32 apart", "at + step * kStep + half * 32", "at + step * kStep + half * 31"),
        (
            "halves are 32 lanes apart",
            "for (int half = 16; half > 0; half /= 2) sum",
            "for (int half = 1; half < 32; half *= 2) sum",
        ),
        ("NaN has no payload", "return canonical_double(sum);", "return sum;"),
        ("blocks are counted from their row", "(number - row * args.in_row) * kGramBlock", "number * kGramBlock"),
        ("a block ends with its row", "smaller(begin + kGramBlock, (row + 1) * args.row_length)", "begin + kGramBlock"),
        (
            "all groups are multiplied with each other",
            "args.right < models.count; args.right += kGroup",
            "args.right < args.left; args.right += kGroup",
        ),
    ),
    *in_file(
        "csrc/cuda/tile.h",
        cuda("geometry", "gram"),
        (
            "one float16 is no bfloat16",
            "dtype == kBFloat16 ? bit_cast<float>(bits << 16)",
            "dtype != kFloat32 ? bit_cast<float>(bits << 16)",
        ),
    ),
    *in_file(
        "fastmerge/methods/angles.py",
        ANGLES,
        ("pi has more digits than float64", "- halves * _PI_LOW", "- halves * 0.0"),
        ("every other half turn has the other sign", "1.0 - 2.0 * (halves % 2.0)", "1.0 - 0.0 * (halves % 2.0)"),
        ("the tangent is halved three times", "for _ in range(3):", "for _ in range(2):"),
        (
            "roots are rounded correctly",
            "torch.from_numpy(np.sqrt(x.contiguous().numpy()))",
            "x.sqrt() * (1 + 2.0**-52)",
        ),
        (
            "a sine lies within 1",
            "clipped((x - halves * _PI_HIGH) - halves * _PI_LOW, -_HALF_PI, _HALF_PI)",
            "(x - halves * _PI_HIGH) - halves * _PI_LOW",
        ),
    ),
    *in_file(
        "fastmerge/methods/geometry.py",
        (*METHODS, "tests/engine/test_same_bits.py"),
        ("blocks are added up exactly", "math.fsum(each)", "sum(each)"),
        ("what is not finite is NaN", "return [math.nan] * count", "return [1.0] * count"),
        ("all blocks of a row count", "for block in range(1, sums.shape[2]):", "for block in range(2, sums.shape[2]):"),
        ("chunks begin at blocks", "            return GRAM_BLOCK\n", "            return 1\n"),
    ),
    *in_file(
        "fastmerge/methods/slerp.py",
        METHODS,
        ("nearly parallel vectors are joined by a straight line", "_COLINEAR = 0.9995", "_COLINEAR = 1.0"),
        ("what is nearly zero is not scaled", "norm if norm > _SMALL_NORM else 1.0", "norm if norm >= 0.0 else 1.0"),
        ("opposite vectors are, too", "if abs(cosine) > _COLINEAR", "if cosine > _COLINEAR"),
    ),
    *in_file(
        "fastmerge/methods/nuslerp.py",
        METHODS,
        ("weights that cancel mean the middle", "t = 0.5 if abs(total)", "t = 0.0 if abs(total)"),
        (
            "opposite vectors are joined by a straight line",
            "cosine.to(torch.float32).abs() == 1.0",
            "cosine.to(torch.float32) == 1.0",
        ),
    ),
    *in_file(
        "fastmerge/methods/multislerp.py",
        METHODS,
        ("weights are normalised", "weights = [weight / total for weight in weights]", "weights = list(weights)"),
        ("three that cancel have no mean", "            if count == 2:\n", "            if count >= 2:\n"),
        (
            "the mean is as long as the norms' mean",
            "zip(weights, norms, strict=True)) / length",
            "zip(weights, norms, strict=True))",
        ),
    ),
    *in_file(
        "fastmerge/methods/karcher.py",
        METHODS,
        ("a step is along the sphere", "pull * cosine * each", "pull * each"),
        (
            "what vanishes counts among the norms",
            "sum(norm / len(norms) for norm in norms)",
            "sum(norms[i] / len(there) for i in there)",
        ),
    ),
    *in_file(
        "fastmerge/methods/model_stock.py",
        METHODS,
        ("small norms count as more", "_SMALLEST_PRODUCT = 1e-6", "_SMALLEST_PRODUCT = 1e-12"),
        ("the base stays where t has no bound", "torch.where(singular, 0.0,", "torch.where(singular, 1.0,"),
        ("the mean is of all pairs", "count * (count - 1) // 2)", "count)"),
    ),
]
