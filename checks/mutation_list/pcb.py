"""Mutations of the family `pcb` in Triton and in CUDA C++."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file


def _pcb(*tests: str) -> tuple[str, ...]:
    """Tests of the family `pcb`, of all backends and of Triton alone."""
    return (*(f"tests/ops/test_pcb.py::test_{test}" for test in tests), "tests/triton/test_pcb.py")


MUTATIONS = [
    *in_file(
        "triton_kernels/pcb.py",
        _pcb(
            "scores_of_special_numbers_between_special_bounds",
            "pcb_scores[triton]",
            "many_rows",
            "rows_of_several_blocks",
            "pcb_merge[triton]",
        ),
        (
            "the lower bound of a clip wins",
            "tl.where(x < low, low, tl.where(x > high, high, x))",
            "tl.where(x > high, high, tl.where(x < low, low, x))",
        ),
        (
            "no width gives 0",
            "tl.where(width == 0.0, 0.0, tl.div_rn(x - low, tl.zeros_like(x) + width))",
            "tl.div_rn(x - low, tl.zeros_like(x) + width)",
        ),
        ("a NaN has no direction", "tl.where(delta == 0.0, 0.0, delta)))", "0.0 * delta.to(tl.int32).to(tl.float32)))"),
        ("a row's sign", "return sign * magnitude, z, sign * z", "return sign * magnitude, z, z"),
        ("the shift", "return functions.exp((z * z) * count - shift)", "return functions.exp((z * z) * count)"),
        ("products stay within float32", "return between(x * y, -LARGEST_PRODUCT, LARGEST_PRODUCT)", "return x * y"),
        (
            "script: the sum of deltas",
            "            together = together + rows[i]\n",
            "            together = together + c\n",
        ),
        (
            "script: the sum stays within float32",
            "    if VARIANT == SCRIPT:\n        together = between(together, -LARGEST, LARGEST)\n    scores = ()",
            "    scores = ()",
        ),
        (
            "vision: the sum of u",
            "together = together + u\n        elif VARIANT == SCRIPT:\n            together = together + rows",
            "together = together + z\n        elif VARIANT == SCRIPT:\n            together = together + rows",
        ),
        (
            "vision_es: a term that two rows share",
            "if i != j:\n                    inter = replaced(inter, j, inter[j] + shared)\n        for i",
            "if i == j:\n                    inter = replaced(inter, j, inter[j] + 0.0)\n        for i",
        ),
        (
            "released: a zero score is +0",
            "(factors[i] * functions.tanh(rows[i] * together) + 0.0,)",
            "(factors[i] * functions.tanh(rows[i] * together),)",
        ),
        (
            "vision_es: a zero score is +0",
            "        for i in tl.static_range(N):\n            scores = scores + (factors[i] * inter[i] + 0.0,)",
            "        for i in tl.static_range(N):\n            scores = scores + (factors[i] * inter[i],)",
        ),
        ("paper: the mean of a pair", "mean = tl.load(means + N + pair)", "mean = tl.load(means + pair)"),
        (
            "paper: the mean of a row",
            "tl.zeros_like(spread) + tl.load(means + i)),)",
            "tl.zeros_like(spread) + tl.load(means)),)",
        ),
        (
            "paper: n counts in a row's own term",
            "strongest = functions.exp(spread * count - shift)",
            "strongest = functions.exp(spread - shift)",
        ),
        (
            "paper: a pair counts for both rows",
            "            else:\n                inter = replaced(inter, j, inter[j] + shared)\n    scores",
            "            else:\n                inter = replaced(inter, j, inter[j])\n    scores",
        ),
        (
            "a table's pair has its place",
            "pair = pair_number(tl.minimum(i, j), tl.maximum(i, j), models)",
            "pair = pair_number(i, j, models)",
        ),
        ("a table's mean of a pair", "tl.load(means + models + pair))", "tl.load(means + pair))"),
        (
            "a table's vision sums u",
            "_, _, u = clipped(delta_of(base, table, models, j, based, place, DTYPE), edges, j)",
            "_, u, _ = clipped(delta_of(base, table, models, j, based, place, DTYPE), edges, j)",
        ),
        (
            "a table's vision_es goes over all rows",
            "                _, _, v = clipped(other, edges, j)\n",
            "                v, _, _ = clipped(other, edges, j)\n",
        ),
        (
            "rows of a table may be bfloat16 among others",
            "elif code == numbers.BFLOAT16:",
            "elif code == numbers.FLOAT16:",
        ),
        (
            "a score has its row",
            "tl.store(out + i * stride + place, numbers.canonical(score))",
            "tl.store(out + i * stride + place, score)",
        ),
    ),
    *in_file(
        "triton_kernels/pcb.py",
        _pcb("pcb_window[triton]", "pcb_histogram[triton]", "rows_of_several_blocks", "many_rows"),
        ("negative scores order", "bits ^ ((bits >> 31) & 0x7FFFFFFF))", "bits)"),
        (
            "NaN has the lowest key",
            "tl.where(numbers.is_nan(x), NAN_ORDERED, bits ^",
            "tl.where(numbers.is_nan(x), bits, bits ^",
        ),
        (
            "the hottest place is counted",
            "tl.atomic_add(counts + hot, hot_count, mask=hot_count > 0",
            "tl.atomic_add(counts + hot, hot_count, mask=hot_count > 1",
        ),
        (
            "the place of 0 is counted",
            "tl.atomic_add(counts + zero, zero_count, mask=zero_count > 0",
            "tl.atomic_add(counts + zero, zero_count, mask=zero_count > 1",
        ),
        (
            "a place that is both is counted once",
            "is_zero = inside & (place == zero) & (place != hot)",
            "is_zero = inside & (place == zero)",
        ),
        (
            "all other places are counted",
            "rest = inside & (place != hot) & (place != zero)",
            "rest = inside & (place != hot) & (place != zero) & (place > 0)",
        ),
        (
            "only elements that are there raise the highest key",
            "    most = tl.max(tl.where(valid, key, 0), axis=0)\n    tl.atomic_max(highest + i, most, sem",
            "    most = tl.max(tl.where(valid, key, 0), axis=0)\n    tl.atomic_max(highest + i, most - 1, sem",
        ),
        (
            "a window begins at its first key",
            "inside = valid & (at >= 0) & (at < width)",
            "inside = valid & (at > 0) & (at < width)",
        ),
        (
            "a window ends before its width",
            "inside = valid & (at >= 0) & (at < width)",
            "inside = valid & (at >= 0) & (at < width - 1)",
        ),
        (
            "keys past the window are counted",
            "inside, valid & (at >= width), most",
            "inside, valid & (at > width), most",
        ),
        (
            "what is not there is not counted",
            "valid = place < numel\n        place = tl.minimum(place, numel - 1)\n        state = each_row(",
            "valid = place < numel + 1\n        place = tl.minimum(place, numel - 1)\n        state = each_row(",
        ),
        ("the low half", "key & 0xFFFF), (wanted", "key & 0x7FFF), (wanted"),
        (
            "the prefix of the low half",
            "(wanted == -1) | (key >> 16 == wanted)",
            "(wanted == -1) | (key >> 16 >= wanted)",
        ),
        (
            "a row has its histogram",
            "count_places(counts + i * 65536, half, valid & inside",
            "count_places(counts + i * 65536, half, inside",
        ),
    ),
    *in_file(
        "triton_kernels/pcb.py",
        ("tests/ops/test_pcb_ranks.py::test_thresholds_of_long_rows_are_exact", *_pcb("pcb_merge[triton]")),
        (
            "only keys with the prefix are counted",
            "matching = inside & ((key >> (bits + 8)) == prefix)",
            "matching = inside & ((key >> (bits + 8)) >= prefix)",
        ),
        (
            "the digit that holds the rank",
            "tl.sum((not_below >= wanted).to(tl.int64), axis=0) - 1, 0)",
            "tl.sum((not_below > wanted).to(tl.int64), axis=0) - 1, 0)",
        ),
        ("the rank that remains", "tl.store(rank + i, wanted - above)", "tl.store(rank + i, wanted)"),
        ("what lies above the digit", "tl.where(bins > digit, count, 0)", "tl.where(bins >= digit, count, 0)"),
        ("keys above the window", "tally = (key > high).to(tl.int32)", "tally = (key >= high).to(tl.int32)"),
        ("keys at the window's lower end", "at_low = (key == low) & (low < high)", "at_low = (key == low)"),
        (
            "keys between are written down",
            "inside = valid & (key > low) & (key < high)",
            "inside = valid & (key > low + 1) & (key < high)",
        ),
        (
            "only as many as there is room for",
            "mask=inside & (slot < capacity))",
            "mask=inside & (slot < capacity - 1))",
        ),
        (
            "a rank above the window is missing",
            "key = tl.where(wanted <= above, -1, key)",
            "key = tl.where(wanted <= above, high, key)",
        ),
        (
            "a rank among those at the upper end",
            "key = tl.where(wanted <= at_high, high, key)",
            "key = tl.where(wanted < at_high, high, key)",
        ),
        (
            "a rank among those at the lower end",
            "key = tl.where(wanted <= at_low, low, -1)",
            "key = tl.where(wanted < at_low, low, -1)",
        ),
        (
            "keys that did not fit are missing",
            "tl.where(collected_all, tl.load(prefix + i), -1), key)",
            "tl.load(prefix + i), key)",
        ),
        ("a missing row is told", "tl.atomic_add(missing, 1, mask=key < 0", "tl.atomic_add(missing, 0, mask=key < 0"),
    ),
    *in_file(
        "triton_kernels/pcb.py",
        _pcb("pcb_extremes[triton]", "pcb_sums[triton]", "rows_of_several_blocks", "many_rows"),
        ("NaN is no least product", "return tl.where(low == NAN_ORDERED, INF_ORDERED, low), low", "return low, low"),
        ("an extreme zero is +0", "low = ordered(product_of(x, y) + 0.0)", "low = ordered(product_of(x, y))"),
        (
            "the greatest product",
            "tl.maximum(state[len(result) + 1], most))",
            "tl.minimum(state[len(result) + 1], most))",
        ),
        ("extremes of all tiles", "both = (tl.minimum(state[len(result)], least)", "both = (least"),
        ("limbs carry", "carry = value >> 32", "carry = value * 0"),
        ("limbs have 32 bits", "tl.store(row + limb, value & LIMB)", "tl.store(row + limb, value)"),
        (
            "the high part of a shifted number",
            "tl.atomic_add(first + 1, (low >> 32) + (high & LIMB)",
            "tl.atomic_add(first + 1, (low >> 32)",
        ),
        (
            "the highest part of a shifted number",
            "tl.atomic_add(first + 2, high >> 32,",
            "tl.atomic_add(first + 2, (high >> 32) * 0,",
        ),
        (
            "the binades below are added next",
            "        mantissa = tl.where(now, 0, mantissa)\n",
            "        mantissa = mantissa * 0\n",
        ),
    ),
    *in_file(
        "triton_kernels/pcb.py",
        _pcb(
            "weights_multiply_last_and_shares_of_nan_carry_nothing",
            "pcb_apply[triton]",
            "many_rows",
            "rows_of_several_blocks",
            "a_nan_stays_in_its_element",
        ),
        (
            "paper: scores below the threshold are dropped",
            "tl.where(score >= least, score, 0.0)",
            "tl.where(score > least, score, 0.0)",
        ),
        (
            "shares are between the thresholds",
            "scaled = tl.div_rn(between(score, least, most) - least",
            "scaled = tl.div_rn(score - least",
        ),
        (
            "no share where the thresholds meet",
            "return tl.where(most > least, scaled, 0.0)",
            "return tl.where(most >= least, scaled, 0.0)",
        ),
        ("shares have no NaN payload", "numbers.canonical(share))", "share)"),
        (
            "weights weigh",
            "mixed = mixed + (values[i] * share) * weights[i]",
            "mixed = mixed + values[i] * (share * weights[i])",
        ),
        (
            "a table's weights weigh",
            "mixed = mixed + (value * share) * tables",
            "mixed = mixed + value * share + 0.0 * tables",
        ),
        (
            "paper: no divisor, no merge",
            "tl.where(divisor == 0.0, 0.0, tl.div_rn(mixed, divisor))",
            "tl.div_rn(mixed, divisor)",
        ),
        ("the smallest divisor", "tl.where(divisor < SMALLEST_DIVISOR, SMALLEST_DIVISOR, divisor)", "divisor"),
        (
            "the merge is put on the base",
            "            merged = based + merged\n",
            "            merged = merged + 0.0 * based\n",
        ),
    ),
    *in_file(
        "csrc/cuda/scores.h",
        (
            "tests/cuda/test_pcb.py",
            "tests/ops/test_pcb.py::test_scores_of_special_numbers_between_special_bounds",
        ),
        (
            "pairs are taken from both sides",
            "other.v[e] = other.v[e] + shared;\n                }\n                columns.at(2, j)",
            "other.v[e] = other.v[e];\n                }\n                columns.at(2, j)",
        ),
        ("a zero dividend keeps its sign", "return zero ? a * result : result;", "return zero ? 0.0f : result;"),
    ),
    *in_file(
        "csrc/cuda/pcb.cu",
        ("tests/cuda/test_pcb.py",),
        ("equal places of a warp are counted together", "count_bits(together)", "1"),
    ),
]
