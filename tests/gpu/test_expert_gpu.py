"""Light experts on a GPU: the bits of the CPU, and a live model there that gets its own back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmerge import ops
from fastmerge.experts import ExpertSet, extract_expert
from tests.gpu import support
from tests.numeric import assert_bitwise_equal
from tests.strategies import DTYPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    backend = support.BACKEND
    generator = torch.Generator().manual_seed(0)
    base, x, theta = (torch.randint(-9, 10, (37, 1001), generator=generator).to(dtype) / 8 for _ in range(3))
    here = [ops.extract_expert(x, keep, base=base, backend="reference") for keep in (0.05, 0.2)]
    there = [ops.extract_expert(x.cuda(), keep, base=base.cuda(), backend=backend) for keep in (0.05, 0.2)]
    for one, other in zip(here, there):
        assert_bitwise_equal(other.values.cpu(), one.values)
        assert torch.equal(other.columns.cpu().long(), one.columns.long())
    for replaced in (False, True):
        worn, on_gpu = theta.clone(), theta.cuda()
        parts = [e.part(0, 0.7 - n, e.at(base) if replaced else None) for n, e in enumerate(here)]
        gpu_parts = [e.part(0, 0.7 - n, e.at(base.cuda()) if replaced else None) for n, e in enumerate(there)]
        ops.expert_apply_([worn], parts, backend="reference")
        saved = ops.expert_apply_([on_gpu], gpu_parts, backend=backend)
        assert_bitwise_equal(on_gpu.cpu(), worn)
        spoilt = on_gpu.clone()
        spoilt.view(-1)[int(here[0].columns[0, 0])] += 1
        assert ops.expert_revert_([spoilt], gpu_parts, saved, backend=backend) == [1]
        assert ops.expert_revert_([on_gpu], gpu_parts, saved, backend=backend) == [0]
        assert_bitwise_equal(on_gpu.cpu(), theta)


def test_a_live_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 300)).bfloat16()
    base = {name: x.clone() for name, x in model.state_dict().items()}
    tuned = [{name: x + 0.02 * torch.randn_like(x) for name, x in base.items()} for _ in range(2)]
    experts = {str(number): extract_expert(base, state, keep=0.05) for number, state in enumerate(tuned)}
    for mode in ("add", "replace"):
        values = []
        for device in ("cpu", "cuda"):
            model.to(device)
            worn = ExpertSet(model, experts, mode=mode, base=base)
            with worn.active({"0": 0.7, "1": 0.3}):
                values.append({name: x.cpu().clone() for name, x in model.state_dict().items()})
            for name, x in model.state_dict().items():
                assert_bitwise_equal(x.cpu(), base[name])
        for name, x in values[0].items():
            assert_bitwise_equal(values[1][name], x)
