"""Mutations of the family `consensus` in Triton and in CUDA C++."""

from __future__ import annotations

from checks.mutation_list.mutation import cuda, equal_bits, in_file

CONSENSUS = (
    "tests/ops/test_equal_bits.py::test_every_election_goes_with_every_divisor",
    "tests/ops/test_equal_bits.py::test_every_step_is_rounded_to_the_compute_dtype",
    "tests/ops/test_equal_bits.py::test_what_a_sum_that_is_no_number_elects",
    "tests/triton/test_signed_zeros.py",
    "tests/triton/test_consensus.py",
    *equal_bits("consensus_apply"),
)

FUSED = (
    "tests/reference/test_consensus.py::test_a_fused_sum_is_rounded_once_at_each_step",
    "tests/ops/test_equal_bits.py::test_a_fused_multiply_add_is_rounded_once",
)

MUTATIONS = [
    *in_file(
        "fastmerge/reference/consensus.py",
        FUSED,
        ("a fused sum is not rounded twice", "inexact = (lost != 0) & lost.isfinite()", "inexact = (lost > 9e99)"),
        ("rounded to odd, the last bit is set", "& (bits & 1 == 0)", "& (bits & 1 == 1)"),
        ("rounded to odd towards what was lost", "(lost > 0) == (rounded", "(lost < 0) == (rounded"),
        ("below 0 what was lost is the other way", "(lost > 0) == (rounded > 0), 1, -1", "lost > 0, 1, -1"),
        ("the weights of a fused sum are float32", "* round_scalar(weight, torch.float32)\n", "* weight\n"),
    ),
    *in_file(
        "fastmerge/backends/gpu.py",
        ("tests/ops/test_equal_bits.py::test_a_sum_on_a_gpu_is_made_in_blocks",),
        ("a fused sum has all its blocks", "slice(start, start + _SUMMED_AT_ONCE)", "slice(0, _SUMMED_AT_ONCE)"),
    ),
    *in_file(
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
    *in_file(
        "triton_kernels/consensus.py",
        (
            "tests/triton/test_consensus.py::test_many_tensors_at_once",
            "tests/ops/test_many.py::test_consensus_merge_many",
        ),
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
    *in_file(
        "fastmerge/backends/triton/consensus.py",
        CONSENSUS,
        ("lambda counts", "any(f != 1.0 for f in (*factors, factor))", "any(f != 1.0 for f in factors)"),
        ("scales count", "any(f != 1.0 for f in (*factors, factor))", "factor != 1.0"),
        ("without an election all are counted", 'float(len(weights)) if divisor == "count" else value', "value"),
        ("weights are rounded", "tuple(rounded(weights, compute))", "tuple(rounded(weights))"),
        (
            "the divisor is rounded",
            "value = rounded([divisor_value], compute)[0]",
            "value = rounded([divisor_value])[0]",
        ),
    ),
    *in_file(
        "csrc/cuda/consensus.cu",
        cuda("consensus", "consensus_apply"),
        ("where nobody takes part is 0", "divided * (nobody ? 0.0f : elected)", "divided * elected"),
        ("zeros take no part", "turned > 0.0f ? share[i] : 0.0f", "turned >= 0.0f ? share[i] : 0.0f"),
        ("lambda multiplies", "multiply8(merge.formula.lambda, mixed);", ""),
        ("frequency counts signs", "frequency ? sign_of(voter) : voter", "voter"),
    ),
]
