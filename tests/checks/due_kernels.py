"""What `python -m checks.kernels --changed` would compile: printed as JSON. A process of its own, not interpreted."""

from __future__ import annotations

import json
from unittest.mock import patch

import triton

from checks import kernels
from checks.kernel_calls import calls

few = [call for call in calls() if call.function == "count_nonfinite"]
(form, *_) = kernels.forms(few)
target = form.targets()[0]
kept = {form.digest(target)}
turn = int(form.digest(target), 16)
days = [kernels.due(form, target, kept, day) for day in range(kernels.ROUND)]
told: dict[str, object] = {"known": sum(days), "unknown": kernels.due(form, target, set(), turn + 1)}
told["another target"] = form.digest("sm_80") != form.digest("sm_120")
with patch.object(triton, "__version__", "0"):
    told["another triton"] = kernels.due(form, target, kept, turn + 1)
with patch.object(type(form.launch.kernel), "cache_key", "changed"):
    told["another source"] = kernels.due(form, target, kept, turn + 1)
print(json.dumps(told))
