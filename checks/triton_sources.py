"""What the sources of the kernels in Triton may not say, though it compiles and the interpreter runs it.

Approximate functions, fused multiply-adds, and casts to bfloat16 give other bits on a GPU than in the interpreter. A
literal -0.0 is +0 in Triton, in both.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from checks import ROOT

# Functions of Triton's language that are approximations, or that round once where the reference rounds twice.
FORBIDDEN = frozenset(
    {"cos", "exp", "exp2", "fdiv", "fma", "log", "log2", "rsqrt", "sigmoid", "sin", "softmax", "sqrt"}
)

PRODUCTS = "highpass.py"
"""It alone may multiply matrices by instructions for that: the frequency filter has a tolerance, not equal bits."""


def problems(root: Path = ROOT) -> list[str]:
    """Every such place in the kernels."""
    found = []
    for path in sorted((root / "triton_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            reasons = [*_objections(node), *([] if path.name == PRODUCTS else _products(node))]
            found += [f"{path.relative_to(root)}:{node.lineno}: {why}" for why in reasons]
    return found


def _objections(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        if isinstance(value, float) and value == 0:
            yield "a literal -0.0 is +0 in Triton; multiply zeros by -1.0"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner, name = ast.unparse(node.func.value), node.func.attr
        if owner in ("tl", "tl.math") and name in FORBIDDEN:
            yield f"tl.{name} does not give the reference's bits"
        arguments = [ast.unparse(argument) for argument in node.args]
        if name == "to" and arguments == ["tl.bfloat16"] and not node.keywords:
            yield "a cast to bfloat16 rounds one way on a GPU and another in the interpreter; use numbers.narrowed"


def _products(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and node.attr in ("dot", "dot_scaled") and ast.unparse(node.value) == "tl":
        yield f"tl.{node.attr} sums in an order of the hardware's own; only the frequency filter has a tolerance"


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
