"""The mutations that checks/mutations.py tries: a text, what stands in its place, and which tests must notice.

A text has to occur once in its file. A mutation stays a program that runs and computes something else: what does not
even compile proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` becomes `new`; one of `tests` must fail then. name: which rule is broken."""

    file: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]


def _in(file: str, tests: tuple[str, ...], *texts: tuple[str, str, str]) -> list[Mutation]:
    """Mutations of one file that the same tests must notice: name, old text, new text."""
    return [Mutation(file, name, old, new, tests) for name, old, new in texts]


def _equal_bits(*functions: str) -> tuple[str, ...]:
    """The tests that compare these functions of the Triton backend with the reference."""
    return tuple(f"tests/ops/test_equal_bits.py::test_{function}[triton]" for function in functions)


def _pcb(*tests: str) -> tuple[str, ...]:
    """Tests of the family `pcb`, of all backends and of Triton alone."""
    return (*(f"tests/ops/test_pcb.py::test_{test}" for test in tests), "tests/triton/test_pcb.py")


SHARED = ("tests/triton/test_shared.py",)
CONSENSUS = (
    "tests/triton/test_signed_zeros.py",
    "tests/triton/test_consensus.py",
    *_equal_bits("consensus_apply"),
)

MUTATIONS = [
    *_in(
        "triton_kernels/numbers.py",
        SHARED,
        (
            "bfloat16 is widened into the high half",
            ".to(tl.uint32) << 16).to(tl.float32",
            ".to(tl.uint32) << 15).to(tl.float32",
        ),
        ("bfloat16 ties go to even", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "(bits + 0x8000) >> 16"),
        ("bfloat16 is rounded", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
        ("bfloat16 NaN has no payload", "tl.where(is_nan(x), 0x7FC0, rounded)", "rounded"),
        ("float16 NaN has no payload", "tl.where(is_nan(x), 0x7E00, bits.to(tl.uint32))", "bits"),
        ("float32 NaN has no payload", "tl.where(is_nan(x), NAN_KEY, bits).to(tl.float32", "bits.to(tl.float32"),
        (
            "infinity is no NaN",
            "(x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) > INF_KEY",
            "(x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) >= INF_KEY",
        ),
        (
            "a negative NaN is one",
            "(x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) > INF_KEY",
            "x.to(tl.uint32, bitcast=True) > INF_KEY",
        ),
        ("steps round to bfloat16", "return widen(rounded_bfloat16(x))", "return x"),
        ("steps round to float16", "return widen(rounded_float16(x))", "return x"),
        ("every NaN has one key", "tl.where(bits > INF_KEY, NAN_KEY, bits)", "bits"),
        (
            "infinity has a key of its own",
            "tl.where(bits > INF_KEY, NAN_KEY, bits)",
            "tl.where(bits >= INF_KEY, NAN_KEY, bits)",
        ),
        (
            "keys have no sign",
            "(x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32, bitcast=True)",
            "x.to(tl.int32, bitcast=True)",
        ),
        (
            "nothing is written past the end",
            "tl.store(pointer + start + place, value, mask=place < length - start)",
            "tl.store(pointer + start + place, value)",
        ),
        (
            "the last element is written",
            "value, mask=place < length - start)",
            "value, mask=place < length - start - 1)",
        ),
        (
            "what is past the end is 0",
            "mask=place < length - start, other=0.0))",
            "mask=place < length - start - 1, other=0.0))",
        ),
        (
            "a delta is the model less the base",
            "round_to(round_to(x, COMPUTE) - round_to(base, COMPUTE), COMPUTE)",
            "round_to(round_to(base, COMPUTE) - round_to(x, COMPUTE), COMPUTE)",
        ),
        (
            "the model is rounded before it is subtracted from",
            "round_to(round_to(x, COMPUTE) - round_to(base, COMPUTE), COMPUTE)",
            "round_to(x - round_to(base, COMPUTE), COMPUTE)",
        ),
        (
            "the base is rounded before it is subtracted",
            "round_to(round_to(x, COMPUTE) - round_to(base, COMPUTE), COMPUTE)",
            "round_to(round_to(x, COMPUTE) - base, COMPUTE)",
        ),
        (
            "the delta is rounded",
            "round_to(round_to(x, COMPUTE) - round_to(base, COMPUTE), COMPUTE)",
            "(round_to(x, COMPUTE) - round_to(base, COMPUTE))",
        ),
        ("without a base the model is rounded", "        return round_to(x, COMPUTE)\n", "        return x\n"),
        ("zeros have no sign", "tl.where(x > 0.0, 1.0, 0.0)", "tl.where(x >= 0.0, 1.0, 0.0)"),
    ),
    *_in(
        "triton_kernels/functions.py",
        SHARED,
        ("exp is 0 far below", "tl.where(x < -104.0, -104.0, x)", "tl.where(x < -103.0, -103.0, x)"),
        ("exp is infinite far above", "tl.where(low > 89.0, 89.0, low)", "tl.where(low > 88.7, 88.7, low)"),
        ("a denormal exp is rounded once", "half = k >> 1", "half = tl.where(k < -126, -126, k >> 1)"),
        ("the polynomial's first coefficient", "q = C5 * r + C4", "q = C4"),
        ("the polynomial's second coefficient", "q = q * r + C3", "q = q * r + C2"),
        ("the polynomial's last coefficient", "q = q * r + C1", "q = q * r + 0.5"),
        ("the square is taken first", "r + (r * r) * q", "r + r * (r * q)"),
        ("ln 2 is taken in two parts", "(x - k * LN2_HIGH) - k * LN2_LOW", "x - k * (LN2_HIGH + LN2_LOW)"),
        ("tanh is odd", "& 0x7FFFFFFF | bits & 0x80000000", "& 0x7FFFFFFF"),
        (
            "tanh of NaN is NaN",
            "tl.where(magnitude > 10.0, 10.0, magnitude)",
            "tl.where(magnitude <= 10.0, magnitude, 10.0)",
        ),
        ("tanh is bounded", "tl.where(magnitude > 10.0, 10.0, magnitude)", "magnitude"),
        ("exp of NaN is NaN", "tl.where(x < -104.0, -104.0, x)", "tl.where(x >= -104.0, x, -104.0)"),
        (
            "small arguments of tanh keep their digits",
            "reduced_expm1(r) * scale + (scale - 1.0)",
            "(reduced_expm1(r) + 1.0) * scale - 1.0",
        ),
    ),
    *_in(
        "triton_kernels/random.py",
        SHARED,
        ("the counter's high word", "c1 = (block >> 32).to(tl.uint32)", "c1 = (block * 0).to(tl.uint32)"),
        ("the tensor's name counts", "tl.zeros_like(c0) + tensor_low.to(tl.uint32)", "tl.zeros_like(c0)"),
        ("the stream counts", "tl.zeros_like(c0) + stream.to(tl.uint32)", "tl.zeros_like(c0)"),
        ("the seed counts", "tl.philox(key, c0, c1, c2, c3)", "tl.philox(key * 0, c0, c1, c2, c3)"),
        (
            "an element has its lane of four",
            "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
            "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
        ),
        ("an element has its lane", "lane = index & 3", "lane = 3 - (index & 3)"),
        ("four elements share a counter", "philox(index >> 2, key", "philox(index >> 1, key"),
        ("fours begin at their counter", "(first >> 2) + tl.arange", "((first >> 2) & 0xFFFFFFFF) + tl.arange"),
    ),
    *_in(
        "triton_kernels/tables.py",
        SHARED,
        ("each number has its place", "tl.store(out + 7, v7)", "tl.store(out + 7, v8)"),
        ("the last number is written", "tl.store(out + 15, v15)", "tl.store(out + 15, v14)"),
        ("floats are bits", "number.to(tl.uint32).to(tl.float32, bitcast=True)", "number.to(tl.float32)"),
    ),
    *_in(
        "fastmerge/backends/triton/launch.py",
        SHARED,
        ("all rows of a table are written", "range(0, len(padded), tables.ROW)", "range(0, tables.ROW, tables.ROW)"),
    ),
    *_in(
        "triton_kernels/select.py",
        ("tests/triton/test_select.py", *_equal_bits("topk_mask", "magnitude_bounds", "consensus_apply")),
        ("a tie is past a bound from the c-th on", "if before >= ties:", "if before > ties:"),
        ("the c-th tie is in its tile", "elif before + count > ties:", "elif before + count > ties + 1:"),
        (
            "ties are counted from 0",
            "ordinal = tl.cumsum(tied.to(tl.int32), axis=0) - 1",
            "ordinal = tl.cumsum(tied.to(tl.int32), axis=0)",
        ),
        ("ties before the tile count", "(ordinal >= (ties - before).to(tl.int32))", "(ordinal >= ties.to(tl.int32))"),
        ("a key equal to a bound is not past it", "    result = key < limit", "    result = key <= limit"),
        (
            "ties of earlier blocks are all past",
            "limit = tl.minimum(threshold - 1 + all_past.to(tl.int64), NOWHERE)",
            "limit = tl.minimum(threshold - 1, NOWHERE)",
        ),
        (
            "the first key that is past",
            "limit = tl.minimum(threshold - 1 + all_past",
            "limit = tl.minimum(threshold + all_past",
        ),
        (
            "a block that a cut goes through is walked",
            "| ((block + 1 < blocks) & (after <= ties))",
            "| (block + 1 < blocks)",
        ),
        (
            "the last block is walked",
            "| ((block + 1 < blocks) & (after <= ties))",
            "| (after <= ties) | (block + 1 >= blocks)",
        ),
        (
            "a block's ties may be all past",
            "all_past = (ties > 0) & (before >= ties)",
            "all_past = (ties > 0) & (before > ties)",
        ),
        ("the band's upper end", "(key <= first) & (key > last)", "(key < first) & (key > last)"),
        ("the band's lower end", "(key <= first) & (key > last)", "(key <= first) & (key >= last)"),
        (
            "masks do not write past the end",
            "tl.store(out + start + place, kept.to(tl.uint8), mask=place < stop - start)",
            "tl.store(out + start + place, kept.to(tl.uint8))",
        ),
        ("the mask's second row of ties", "ties_before + blocks, block, blocks)", "ties_before, block, blocks)"),
        ("ties within a block add up", "            first_before += equal_first\n", ""),
    ),
    *_in(
        "triton_kernels/select.py",
        ("tests/triton/test_select.py", *_equal_bits("magnitude_bounds", "kth_magnitude", "abs_histogram")),
        ("float16 NaN has one key", "tl.where(bits > 0x7C00, 0x7E00, bits)", "bits"),
        (
            "float16 keys widen",
            "value = key.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)",
            "value = (key << 13).to(tl.int32).to(tl.float32, bitcast=True)",
        ),
        ("bfloat16 keys widen", "        return key << 16\n", "        return key << 15\n"),
        ("what is past the end has no key", "tl.where(tl.arange(0, BLOCK) < stop - start, key, -1)", "key"),
        (
            "the last element has a key",
            "tl.where(tl.arange(0, BLOCK) < stop - start, key, -1)",
            "tl.where(tl.arange(0, BLOCK) < stop - start - 1, key, -1)",
        ),
        (
            "keys are those of deltas",
            "delta = numbers.difference(numbers.loaded(base, start, stop, BLOCK, WHOLE), value, True, COMPUTE)",
            "delta = value",
        ),
        ("deltas are rounded", "value, True, COMPUTE)", "value, True, numbers.FLOAT32)"),
        ("only keys with the prefix count", "mask=(key >> (SHIFT + WIDTH)) == prefix)", "mask=key >= 0)"),
        (
            "only keys that are there count",
            "tl.histogram(digit, 1 << WIDTH, mask=key >= 0)",
            "tl.histogram(digit, 1 << WIDTH)",
        ),
        (
            "a digit has its bits",
            "digit = (key >> SHIFT) & ((1 << WIDTH) - 1)",
            "digit = (key >> (SHIFT + 1)) & ((1 << WIDTH) - 1)",
        ),
        (
            "whole tiles are counted",
            "counted += digit_counts(key, prefix, SHIFT, WIDTH, FIRST, True)",
            "counted = digit_counts(key, prefix, SHIFT, WIDTH, FIRST, True)",
        ),
        ("the rest is counted", "counted += digit_counts(key, prefix, SHIFT, WIDTH, FIRST, False)", "counted += 0"),
        (
            "a rank of a tensor's end is not looked for",
            "if TOGETHER or (rank > 0 and rank < length):",
            "if TOGETHER or (rank > 0 and rank < length - 1):",
        ),
        (
            "the digit that holds the rank",
            "here = (above < rank) & (rank <= above + equal)",
            "here = (above <= rank) & (rank < above + equal)",
        ),
        ("counts are cleared for the next digit", "    tl.store(counts + digit, tl.zeros_like(equal))\n", ""),
        (
            "the rank that remains",
            "return where, rank - tl.sum(tl.where(here, above, 0), axis=0), ",
            "return where, rank, ",
        ),
        (
            "the prefix grows by each digit",
            "tl.store(state + 2 * row, prefix << WIDTH | digit)",
            "tl.store(state + 2 * row, digit)",
        ),
        ("a bound before all", "tl.where(rank <= 0, models * 0 + ABOVE_ALL_KEYS, models * 0)", "models * 0"),
        ("a cut between groups has no ties", "ties = tl.where(remaining < equal, remaining, 0)", "ties = remaining"),
        (
            "ties before a block do not include its own",
            "before + tl.cumsum(tied, axis=0) - tied, mask=inside)",
            "before + tl.cumsum(tied, axis=0), mask=inside)",
        ),
        ("ties of earlier blocks add up", "        before += tl.sum(tied, axis=0)\n", ""),
        (
            "the last digit of a single magnitude",
            "key = wide_key(tl.load(state) << WIDTH | digit, KIND)",
            "key = wide_key(tl.load(state) << WIDTH, KIND)",
        ),
    ),
    *_in(
        "triton_kernels/select.py",
        (
            "tests/triton/test_select.py",
            *_equal_bits("abs_histogram", "key_histogram", "key_window", "tie_counts"),
        ),
        (
            "the least place of a tile is counted",
            "tl.atomic_add(counts + least, tl.sum((place == least).to(tl.int32), axis=0)",
            "tl.atomic_add(counts + least, tl.sum((place < least).to(tl.int32), axis=0)",
        ),
        ("a tile of equal keys is counted once", "        if greatest > least:", "        if greatest >= least:"),
        (
            "places between are counted",
            "between = counted & (place > least) & (place < greatest)",
            "between = counted & (place > least + 1) & (place < greatest)",
        ),
        ("only counted places are between", "between = counted & (place > least)", "between = (place > least - 1)"),
        (
            "a model's own prefix",
            "counted = (key >> (SHIFT + WIDTH)) == prefix",
            "counted = (key >> (SHIFT + WIDTH)) >= prefix",
        ),
        (
            "programs take turns with copies",
            "block % copies.to(tl.int64)) << WIDTH)",
            "copies.to(tl.int64) - 1 - block % copies.to(tl.int64) // 1 * 0) << WIDTH)",
        ),
        (
            "a window begins at its first key",
            "inside = (place >= 0) & (place < width)",
            "inside = (place > 0) & (place < width)",
        ),
        (
            "a window ends before its width",
            "inside = (place >= 0) & (place < width)",
            "inside = (place >= 0) & (place <= width)",
        ),
        (
            "keys past the window",
            "tl.sum((place >= width).to(tl.int32), axis=0)",
            "tl.sum((place > width).to(tl.int32), axis=0)",
        ),
        (
            "a window past all keys",
            "low = tl.minimum(tl.load(entry + 1), 0x7FFFFFFF).to(tl.int32)",
            "low = tl.load(entry + 1).to(tl.int32)",
        ),
        (
            "a row of a window has one more number",
            "mine = counts + tl.load(entry + 2) * (width + 1)",
            "mine = counts + tl.load(entry + 2) * width",
        ),
        (
            "only bounds with ties count",
            "first = tl.where(tl.load(bound + 1) > 0, tl.load(bound), -2)",
            "first = tl.where(tl.load(bound + 1) >= 0, tl.load(bound), -2)",
        ),
        (
            "the second bound counts",
            "last = tl.where(tl.load(bound + 3) > 0, tl.load(bound + 2), -2)",
            "last = tl.where(tl.load(bound + 1) > 0, tl.load(bound + 2), -2)",
        ),
        (
            "ties of both bounds are told apart",
            "tl.store(out + (2 * row + 1) * blocks + block, tl.sum(at_last, axis=0)",
            "tl.store(out + (2 * row + 1) * blocks + block, tl.sum(at_first, axis=0)",
        ),
    ),
    *_in(
        "triton_kernels/pcb.py",
        _pcb("pcb_scores[triton]", "many_rows", "rows_of_several_blocks", "pcb_merge[triton]"),
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
    *_in(
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
    *_in(
        "triton_kernels/pcb.py",
        _pcb("thresholds_of_long_rows_are_exact", "pcb_merge[triton]"),
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
    *_in(
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
    *_in(
        "triton_kernels/pcb.py",
        _pcb("pcb_apply[triton]", "many_rows", "rows_of_several_blocks", "a_nan_stays_in_its_element"),
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
            "a divisor that is NaN stays",
            "tl.where(divisor < SMALLEST_DIVISOR, SMALLEST_DIVISOR, divisor)",
            "tl.where(divisor >= SMALLEST_DIVISOR, divisor, SMALLEST_DIVISOR)",
        ),
        (
            "the merge is put on the base",
            "            merged = based + merged\n",
            "            merged = merged + 0.0 * based\n",
        ),
    ),
    *_in(
        "triton_kernels/consensus.py",
        CONSENSUS,
        ("a dropped element is +0", "delta = tl.where(kept, delta, 0.0)", "delta = tl.where(kept, delta, delta * 0.0)"),
        ("a scaled delta is rounded", "numbers.round_to(delta * scale, COMPUTE)", "delta * scale"),
        ("the sum is rounded", "result = numbers.round_to(total, COMPUTE)", "result = total"),
        (
            "a quotient by a number is rounded",
            "numbers.round_to(tl.div_rn(result, tl.zeros_like(result) + divisor_value), COMPUTE)",
            "tl.div_rn(result, tl.zeros_like(result) + divisor_value)",
        ),
        (
            "division is not by the reciprocal",
            "numbers.round_to(tl.div_rn(result, tl.zeros_like(result) + divisor_value), COMPUTE)",
            "numbers.round_to(result * tl.div_rn(tl.zeros_like(result) + 1.0, divisor_value), COMPUTE)",
        ),
        ("a sum of weights is rounded", "share = numbers.round_to(share, COMPUTE)", "share = share + 0.0"),
        ("nothing is divided by 0", "tl.where(share == 0.0, 1.0, share)", "share"),
        ("lambda is multiplied and rounded", "numbers.round_to(result * lambda_, COMPUTE)", "result * lambda_"),
        (
            "the base is rounded",
            "numbers.round_to(numbers.round_to(reference, COMPUTE) + result, COMPUTE)",
            "numbers.round_to(reference + result, COMPUTE)",
        ),
        (
            "the merge on the base is rounded",
            "numbers.round_to(numbers.round_to(reference, COMPUTE) + result, COMPUTE)",
            "(numbers.round_to(reference, COMPUTE) + result)",
        ),
        (
            "positive where votes cancel",
            "return tl.where(votes >= 0.0, 1.0, -1.0)",
            "return tl.where(votes > 0.0, 1.0, -1.0)",
        ),
        (
            "a sum that is NaN elects minus",
            "return tl.where(votes >= 0.0, 1.0, -1.0)",
            "return tl.where(votes < 0.0, -1.0, 1.0)",
        ),
        (
            "negative where votes cancel",
            "        return tl.where(votes > 0.0, 1.0, -1.0)\n",
            "        return tl.where(votes >= 0.0, 1.0, -1.0)\n",
        ),
        (
            "nobody where votes cancel",
            "tl.where(votes == 0.0, 0.0, tl.where(votes > 0.0, 1.0, -1.0))",
            "tl.where(votes > 0.0, 1.0, -1.0)",
        ),
        ("models are added from left to right", "total = total + terms[i]", "total = total + terms[len(weights) - i]"),
        ("weighted terms vote", "voters = terms if ELECTION == WEIGHTED else deltas", "voters = deltas"),
        (
            "each model has one vote",
            "votes = numbers.sign(deltas[0]) if ELECTION == FREQUENCY else voters[0]",
            "votes = voters[0]",
        ),
        ("a zero takes no part", "part = turned > 0.0", "part = turned >= 0.0"),
        (
            "a NaN takes no part",
            "total = total + tl.maximum(turned, 0.0)",
            "total = total + tl.where(turned < 0.0, 0.0, turned)",
        ),
        ("what is turned is turned back", "total = total * sign + 0.0", "total = total + 0.0"),
        ("where nobody takes part the sum is +0", "total = total * sign + 0.0", "total = total * sign"),
        (
            "only weights that take part are added",
            "share = share + tl.where(part, weights[i], 0.0)",
            "share = share + weights[i]",
        ),
        ("only models that take part are counted", "share = share + tl.where(part, 1.0, 0.0)", "share = share + 1.0"),
        (
            "listed: a sum of -0 is -0",
            "votes = votes + tl.where(live, term, minus_zeros(delta.shape[0]))",
            "votes = votes + tl.where(live, term, 0.0)",
        ),
        ("a sum begins with -0", "tl.full((BLOCK,), 0x80000000, tl.uint32)", "tl.full((BLOCK,), 0, tl.uint32)"),
        ("listed: a zero is not positive", "positive = live & (voter > 0.0)", "positive = live & (voter >= 0.0)"),
        ("listed: a zero is not negative", "negative = live & (voter < 0.0)", "negative = live & (voter <= 0.0)"),
        (
            "listed: the last model counts",
            "for first in range(0, models, TOGETHER):",
            "for first in range(0, models - 1, TOGETHER):",
        ),
        (
            "listed: nobody where votes cancel",
            "total = tl.where(sign > 0.0, above, tl.where(sign < 0.0, below, 0.0))",
            "total = tl.where(sign > 0.0, above, below)",
        ),
        (
            "listed: a model has its weight",
            "tl.load(listed + 4 * model + 1)",
            "tl.load(listed + 1)",
        ),
        ("listed: a model has its scale", "tl.load(listed + 4 * model + 2)", "tl.load(listed + 2)"),
        (
            "listed: a model has its random words",
            "tl.load(listed + 4 * model + 3)",
            "tl.load(listed + 3)",
        ),
        ("listed: cuts of any model are looked for", "            whole = tl.where(split, start, whole)\n", ""),
        (
            "a block that a cut goes through is taken in order",
            "whole = tl.where(split, start, start + (end - start) // BLOCK * BLOCK)",
            "whole = start + (end - start) // BLOCK * BLOCK",
        ),
        ("cuts are as far away as they are", "(at - whole).to(tl.int32)", "(at - at).to(tl.int32)"),
    ),
    *_in(
        "triton_kernels/consensus.py",
        ("tests/ops/test_many.py::test_consensus_merge_many",),
        ("many: a tensor has its ties", "first_block + block, last,", "block, last,"),
        (
            "many: a tensor has its bounds",
            "own = (given[0] + tensor * (4 * len(weights)), given[1])",
            "own = (given[0], given[1])",
        ),
        (
            "many: what follows a tensor's last block is another's",
            "last = (block + 1) * select.TIE_BLOCK >= n",
            "last = (block + 1) * select.TIE_BLOCK > n",
        ),
        (
            "many: a tensor's name counts",
            "tl.load(row + 2), tl.load(row + 3), tl.zeros",
            "tl.load(row + 2), tl.load(row + 3) * 0, tl.zeros",
        ),
        (
            "many: a tensor has its programs",
            "start = (program - tl.load(row)) * SPAN",
            "start = (program - tl.load(listed)) * SPAN",
        ),
    ),
    *_in(
        "fastmerge/backends/triton/consensus.py",
        CONSENSUS,
        ("lambda counts", "any(f != 1.0 for f in (*factors, factor))", "any(f != 1.0 for f in factors)"),
        ("scales count", "any(f != 1.0 for f in (*factors, factor))", "factor != 1.0"),
        ("without an election all are counted", 'float(len(weights)) if divisor == "count" else value', "value"),
        ("weights are rounded", "tuple(_rounded(weights, compute))", "tuple(_rounded(weights))"),
        (
            "the divisor is rounded",
            "value = _rounded([divisor_value], compute)[0]",
            "value = _rounded([divisor_value])[0]",
        ),
    ),
    *_in(
        "triton_kernels/sparsify.py",
        (
            "tests/triton/test_consensus.py",
            "tests/triton/test_sparsify.py",
            *_equal_bits("consensus_apply", "kept_masks"),
        ),
        ("all ties of earlier blocks are past", "passed = tied & (before >= ties)", "passed = tied & (before > ties)"),
        (
            "a cut goes through a block before the last tie",
            "tied & (before < ties) & (last | (after > ties))",
            "tied & (before < ties) & (last | (after >= ties + 2))",
        ),
        (
            "of the last block nothing is known",
            "tied & (before < ties) & (last | (after > ties))",
            "tied & (before < ties) & (after > ties)",
        ),
        (
            "NaN has one key in a band",
            "tl.where(limit > numbers.NAN_KEY, 0x80000000,",
            "tl.where(limit > numbers.NAN_KEY, limit,",
        ),
        ("NaNs with small payloads are above infinity", "tl.where(limit > least_nan, least_nan, limit)", "limit"),
        ("an empty band keeps nothing", "some = low < high", "some = low <= high"),
        (
            "the second bound ends a band",
            "low, low_split = cut(bound + 2, at + stride, last)",
            "low, low_split = cut(bound + 2, at, last)",
        ),
        ("ties are counted up to the tile", "there = group < end - at", "there = group < end - at - 16"),
        (
            "ties in the tile are in order",
            "tl.sum((so_far <= left).to(tl.int32), axis=0)",
            "tl.sum((so_far < left).to(tl.int32), axis=0)",
        ),
        ("ties before the tile count", "left -= ties_between(", "left -= 0 * ties_between("),
        ("ties of pieces add up", "                left -= count\n", ""),
        (
            "where the first bound turns",
            "first = key < turns[0] + (place >= turns[1])",
            "first = key < turns[0] + (place > turns[1])",
        ),
        (
            "where the second bound turns",
            "last = key < turns[2] + (place >= turns[3])",
            "last = key < turns[2] + (place > turns[3])",
        ),
        (
            "a word that equals the limit drops",
            "return (word <= greatest) & (draw >= 0)",
            "return (word < greatest) & (draw >= 0)",
        ),
        ("a density of 0 keeps nothing", "return (word <= greatest) & (draw >= 0)", "return word <= greatest"),
        ("a model has its stream", "draw >> 32, BLOCK, FOURS)", "(draw >> 32) * 0, BLOCK, FOURS)"),
        (
            "masks have their low bit first",
            "kept = (byte.to(tl.int32)[:, None] >> bit[None, :]) & 1",
            "kept = (byte.to(tl.int32)[:, None] >> (7 - bit[None, :])) & 1",
        ),
        (
            "masks are packed low bit first",
            "tl.sum(byte << tl.arange(0, 8)[None, :], axis=1)",
            "tl.sum(byte << (7 - tl.arange(0, 8))[None, :], axis=1)",
        ),
        (
            "the last byte of a mask counts",
            "mask=at * 8 < n - start, other=0)",
            "mask=at * 8 + 7 < n - start, other=0)",
        ),
        ("a chunk's place in its tensor counts", "return drawn(offset + start, key", "return drawn(start, key"),
        ("a model has its mask", "return masked(given[0] + model * stride, start", "return masked(given[0], start"),
    ),
    *_in(
        "fastmerge/backends/triton/sparsify.py",
        _equal_bits("consensus_apply"),
        ("the seed's high word counts", "(rule.seed >> 32 ^ rule.tensor_id >> 32)", "(rule.tensor_id >> 32)"),
        ("the tensor's high word counts", "(rule.seed >> 32 ^ rule.tensor_id >> 32)", "(rule.seed >> 32)"),
        (
            "four share a counter only where they begin at one",
            "return self.offset % 4 == 0",
            "return self.offset % 2 == 0",
        ),
        ("a model has its place", "random.stream_id(purpose, position)", "random.stream_id(purpose, 0)"),
        (
            "a density of 1 keeps all",
            "min(max(math.floor(probability * 4294967296.0), 0), 1 << 32)",
            "min(max(math.floor(probability * 4294967296.0), 0), (1 << 32) - 1)",
        ),
        ("density is rounded down", "math.floor(probability * 4294967296.0)", "round(probability * 4294967296.0)"),
    ),
    *_in(
        "triton_kernels/exact.py",
        ("tests/triton/test_sparsify.py", *_equal_bits("l1_sums")),
        (
            "infinity is left out",
            "tl.where(bits < numbers.INF_KEY, bits, 0)",
            "tl.where(bits <= numbers.INF_KEY, bits, 0)",
        ),
        ("denormals have no implicit bit", "(bits & 0x7FFFFF) | (normal << 23)", "(bits & 0x7FFFFF) | (1 << 23)"),
        ("denormals have the least exponent", "(normal << 23), exponent - normal", "(normal << 23), exponent"),
        (
            "the sign does not count",
            "bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF",
            "bits = x.to(tl.int32, bitcast=True)",
        ),
        (
            "what overflows the low word",
            "high = tl.sum(slots >> 32, axis=0) + (low >> 32)",
            "high = tl.sum(slots >> 32, axis=0)",
        ),
        ("what is shifted out of the low word", "<< shift) + (low >> 32)", "<< shift)"),
        ("what is shifted out of the high word", "top = (top << shift) + (high >> 32)", "top = top << shift"),
        ("what overflows the high word", "    top = high >> 32\n", "    top = (high >> 32) * 0\n"),
        ("a sum has its limbs", "limb = tl.arange(0, ROW) - (place >> 5)", "limb = tl.arange(0, ROW) - (place >> 6)"),
        (
            "numbers below the window do not fit",
            "fits = shift.to(tl.uint32, bitcast=True) <= WINDOW",
            "fits = shift <= WINDOW",
        ),
        (
            "numbers above the window do not fit",
            "fits = shift.to(tl.uint32, bitcast=True) <= WINDOW",
            "fits = shift >= 0",
        ),
        ("what does not fit is looked for", "odd = odd | tl.where(fits, 0, mantissa)", "odd = odd"),
        (
            "what is kept is summed",
            "kept_slots += kept.to(tl.int64) << shift",
            "kept_slots += mantissa.to(tl.int64) << shift",
        ),
        (
            "limb by limb: the next limb",
            "words += tl.where(lane == number + 1, tl.sum(here >> 32, axis=0), 0)\n        here",
            "here",
        ),
        ("limb by limb: the last limb", "for number in range(least, most + 1):", "for number in range(least, most):"),
        ("programs take copies in turns", "copy = (start // SPAN) % COPIES", "copy = start // SPAN"),
        ("limbs carry", "carried = (carried >> 32) + tl.sum(", "carried = tl.sum("),
        ("high words carry", "high += word >> 32", "high += (word >> 32) * 0"),
    ),
    *_in(
        "triton_kernels/sparsify.py",
        ("tests/triton/test_sparsify.py", *_equal_bits("count_nonfinite", "zero_nonfinite", "kept_masks")),
        ("infinity is no NaN", "nans += (bits > numbers.INF_KEY)", "nans += (bits >= numbers.INF_KEY)"),
        ("a NaN is no infinity", "infinities += (bits == numbers.INF_KEY)", "infinities += (bits >= numbers.INF_KEY)"),
        (
            "infinity is noticed in a whole tile",
            "most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)",
            "most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7F7FFFFF)",
        ),
        (
            "infinity is noticed in the rest",
            "rest = tl.maximum(rest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)",
            "rest = tl.maximum(rest, value.to(tl.int32, bitcast=True) & 0x7F7FFFFF)",
        ),
        (
            "infinity is cleared",
            "wrong = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= numbers.INF_KEY",
            "wrong = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > numbers.INF_KEY",
        ),
        (
            "negative infinity is cleared",
            "wrong = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >=",
            "wrong = value.to(tl.int32, bitcast=True) >=",
        ),
        (
            "keys behind a row's end are above all",
            "tl.sort(tl.where(there, key, 0x7FFFFFFF), dim=1)",
            "tl.sort(tl.where(there, key, 0), dim=1)",
        ),
        ("equal keys are not below", "inside & (found < key)", "inside & (found <= key)"),
        (
            "all keys of a chunk are looked at",
            "inside = sought & (probe <= length)",
            "inside = sought & (probe < length)",
        ),
        ("a row has its keys", "// length) * row_keys", "// length) * 0"),
        (
            "all chunks count",
            "for number_of_chunk in range(0, chunks):",
            "for number_of_chunk in range(0, tl.minimum(chunks, 1)):",
        ),
        (
            "equals share the middle of their ranks",
            "at_most += smaller(sorted_keys, chunk, highest, magnitude + 1, sought)",
            "at_most += smaller(sorted_keys, chunk, highest, magnitude, sought) + (number_of_chunk == 0).to(tl.int32)",
        ),
        ("ranks are scaled to 1", "2.0 * (length - 1).to(tl.float64)", "2.0 * length.to(tl.float64)"),
        (
            "the rank spreads the probability",
            "probability = least + spread * rank",
            "probability = least + spread * 0.5",
        ),
        (
            "what is always kept",
            "always = word < tl.minimum(one_end, other_end)",
            "always = word <= tl.maximum(one_end, other_end)",
        ),
        (
            "what is never kept",
            "never = word >= tl.maximum(one_end, other_end)",
            "never = word >= tl.minimum(one_end, other_end)",
        ),
        ("a word that equals its limit drops", "(word < keep_limit(probability))", "(word <= keep_limit(probability))"),
        ("a model's row of the mask", "out + number * ((n + 7) // 8) + first // 8", "out + first // 8"),
    ),
]


# --- CUDA C++: built for the emulator, one by one


def _cuda(family: str, *functions: str) -> tuple[str, ...]:
    """A family's own tests, and those that compare these functions of the CUDA backend with the reference."""
    own = f"tests/cuda/test_{family}.py"
    return (own, *(f"tests/ops/test_equal_bits.py::test_{function}[cuda]" for function in functions))


MUTATIONS += [
    *_in(
        "csrc/cuda/tile.h",
        _cuda("consensus", "consensus_apply"),
        ("data past the first word of 16 bytes", "(shift & 4u) ? all[i + 1] : all[i]", "all[i]"),
        ("a byte's shift", "uint32_t bits = 8u * (shift & 3u);", "uint32_t bits = 8u * (shift & 2u);"),
        ("earlier warps count", "lower += warp < thread() / 32 ? of_warp : 0u;", "lower += 0u;"),
    ),
    *_in(
        "csrc/cuda/kept.h",
        _cuda("consensus", "consensus_apply", "kept_masks"),
        (
            "past a cut equals are past the bound",
            "kept.after[b] = bits_below(ties > 0 ? key + 1 : key);",
            "kept.after[b] = bits_below(key);",
        ),
        ("equals before this tie block are counted", "int64_t left = ties - before[0];", "int64_t left = ties;"),
        ("a cut lies behind the last equal before it", "+ place + 1;", "+ place;"),
        ("a word equal to the limit is dropped", "block.word[t] < limit", "block.word[t] <= limit"),
        ("words begin within a block of four", "return (bits >> lead) & 0xffu;", "return bits & 0xffu;"),
        (
            "the upper bound is not in the band",
            "magnitude < high && magnitude >= low",
            "magnitude <= high && magnitude >= low",
        ),
    ),
    *_in(
        "csrc/cuda/consensus.cu",
        _cuda("consensus", "consensus_apply"),
        ("where nobody takes part is 0", "divided * (nobody ? 0.0f : elected)", "divided * elected"),
        ("zeros take no part", "turned > 0.0f ? share[i] : 0.0f", "turned >= 0.0f ? share[i] : 0.0f"),
        ("lambda multiplies", "multiply8(merge.formula.lambda, mixed);", ""),
        ("frequency counts signs", "frequency ? sign_of(voter) : voter", "voter"),
    ),
    *_in(
        "csrc/cuda/sparsify.cu",
        _cuda("sparsify", "l1_sums", "kept_masks", "count_nonfinite"),
        ("what is not finite has no mass", "key < kInfBits ? magnitude_mantissa(key) : 0u", "magnitude_mantissa(key)"),
        ("masses of other sizes go elsewhere", "if (mantissa != 0 && place >> 5 != group) {", "if (false) {"),
        ("high halves are carried", "atomic_add(limb + 1,", "atomic_add(limb,"),
        ("bits past the end are 0", "if (at + kEach > own.length) bits &=", "if (false) bits &="),
        ("tied ranks are averaged", "rank_limit(rows, first + last)", "rank_limit(rows, first + first)"),
        ("infinities are no NaN", "magnitude > kInfBits ? 1u : 0u", "magnitude >= kInfBits ? 1u : 0u"),
    ),
    *_in(
        "csrc/cuda/select.cu",
        _cuda("select", "abs_histogram", "magnitude_bounds", "tie_counts", "topk_mask", "key_window", "key_histogram"),
        (
            "a warp of equal keys counts all",
            "if (lane() == 0) add<kInside>(bins, two[0] >> 16, 32 * kEach);",
            "if (lane() == 0) add<kInside>(bins, two[0] >> 16, kEach);",
        ),
        ("keys past the end are none", "keys[t] = at + t < end ? keys[t] : kNoKey;", "keys[t] = keys[t];"),
        (
            "what is not in shared memory is counted elsewhere",
            "    } else {\n        add_global(bins, bin, times);\n    }\n}",
            "    }\n}",
        ),
        ("signs are no part of a key", "words[i] & 0x7fff7fffu", "words[i] & 0x7fffffffu"),
        (
            "equals before the cut are not past it",
            "(is_last && nth_last >= last.ties)",
            "(is_last && nth_last > last.ties)",
        ),
        ("keys below a window are not counted", "|| keys[t] < low) continue;", ") continue;"),
        ("equals of other parts come before", "(source, tie_block * kTieBlock, end,", "(source, begin, end,"),
    ),
    *_in(
        "csrc/cuda/pcb.cu",
        ("tests/cuda/test_pcb.py",),
        (
            "pairs are taken from both sides",
            "other.v[e] = other.v[e] + shared;\n                }\n                columns.at(2, j)",
            "other.v[e] = other.v[e];\n                }\n                columns.at(2, j)",
        ),
        ("a square of zero is clipped, too", "edge.square_of_zero = z * z;", "edge.square_of_zero = 0.0f;"),
        ("a zero dividend keeps its sign", "return zero ? a * result : result;", "return zero ? 0.0f : result;"),
        ("equal places of a warp are counted together", "count_bits(together)", "1"),
    ),
]
