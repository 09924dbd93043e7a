"""What a mutation is, and which tests must notice."""

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


def in_file(file: str, tests: tuple[str, ...], *texts: tuple[str, str, str]) -> list[Mutation]:
    """Mutations of one file that the same tests must notice: name, old text, new text."""
    return [Mutation(file, name, old, new, tests) for name, old, new in texts]


def equal_bits(*functions: str) -> tuple[str, ...]:
    """The tests that compare these functions of the Triton backend with the reference."""
    return tuple(f"tests/ops/test_equal_bits.py::test_{function}[triton]" for function in functions)


def cuda(family: str, *functions: str) -> tuple[str, ...]:
    """A family's own tests, and those that compare these functions of the CUDA backend with the reference."""
    own = f"tests/cuda/test_{family}.py"
    return (own, *(f"tests/ops/test_equal_bits.py::test_{function}[cuda]" for function in functions))
