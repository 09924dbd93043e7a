"""The torch.library namespace `fastmerge`, and how an op is added to it.

An op is one kernel for all devices (it looks up a backend by itself), one fake kernel that says shapes and dtypes, and
a schema. Ops return tensors only and never an alias of an input, so that opcheck and torch.compile(fullgraph=True)
hold. Nothing here imports torch._dynamo or triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, register_fake

NAMESPACE = "fastmerge"
LIBRARY = Library(NAMESPACE, "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op under `fastmerge::` and return its callable."""
    name = schema.partition("(")[0].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def signed64(value: int) -> int:
    """An integer modulo 2**64 as the signed number that an op's schema can carry."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def unsigned64(value: int) -> int:
    """The inverse of `signed64`."""
    return value & 0xFFFFFFFFFFFFFFFF
