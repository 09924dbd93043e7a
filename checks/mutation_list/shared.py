"""Mutations of what the families share, in Triton and in CUDA C++."""

from __future__ import annotations

from checks.mutation_list.mutation import cuda, equal_bits, in_file

SHARED = ("tests/triton/test_shared.py",)

MUTATIONS = [
    *in_file(
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
    *in_file(
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
    *in_file(
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
    *in_file(
        "triton_kernels/tables.py",
        SHARED,
        ("each number has its place", "tl.store(out + 7, v7)", "tl.store(out + 7, v8)"),
        ("the last number is written", "tl.store(out + 15, v15)", "tl.store(out + 15, v14)"),
        ("floats are bits", "number.to(tl.uint32).to(tl.float32, bitcast=True)", "number.to(tl.float32)"),
    ),
    *in_file(
        "fastmerge/backends/triton/launch.py",
        SHARED,
        ("all rows of a table are written", "range(0, len(padded), tables.ROW)", "range(0, tables.ROW, tables.ROW)"),
    ),
    *in_file(
        "triton_kernels/exact.py",
        ("tests/triton/test_sparsify.py", *equal_bits("l1_sums")),
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
    *in_file(
        "csrc/cuda/tile.h",
        cuda("consensus", "consensus_apply"),
        ("data past the first word of 16 bytes", "(shift & 4u) ? all[i + 1] : all[i]", "all[i]"),
        ("a byte's shift", "uint32_t bits = 8u * (shift & 3u);", "uint32_t bits = 8u * (shift & 2u);"),
        ("earlier warps count", "lower += warp < thread() / 32 ? of_warp : 0u;", "lower += 0u;"),
    ),
    *in_file(
        "csrc/cuda/tile.h",
        ("tests/cuda/test_edges.py",),
        ("no byte past a tensor is read", "(shift == 0 ? 16 : 32) <= limit", "(shift == 0 ? 16 : 17) <= limit"),
        ("a tensor's last bytes are read", "i < 16 && from + i < limit", "i < 12 && from + i < limit"),
        ("a store is no wider than its address", "past % 4 == 0) {", "past % 2 == 0) {"),
    ),
    *in_file(
        "csrc/cuda/kept.h",
        cuda("consensus", "consensus_apply", "kept_masks", "a_word_equal_to_the_limit_is_dropped"),
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
]
