"""What the source of Triton kernels must not do, since the compiler makes something else of it.

A loop carries the names that its body rebinds. Triton's front end (3.6) finds them by comparing
each name's value before and after the body. If two names hold one tensor before the loop and one
takes the other's value inside (``before = current``), the former looks unchanged: the loop keeps
its first value in every step. Triton's interpreter shows nothing of it. A separate tensor for each
name is always right.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Values = frozenset[int]


def triton_modules(package: ModuleType) -> Iterator[ModuleType]:
    """The package's modules, at any depth, whose files import Triton."""
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        spec = found.module_finder.find_spec(found.name)
        if "import triton" in Path(spec.origin).read_text():
            yield importlib.import_module(found.name)


def jit_functions(module: ModuleType) -> dict[str, Any]:
    """The functions with the decorator ``triton.jit`` that a module defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if type(value).__name__ in ("JITFunction", "InterpretedFunction")
        and value.fn.__module__ == module.__name__
    }


def shared_names(fn: Any) -> list[str]:
    """Names that hold one tensor before a loop which rebinds them.

    Args:
        fn: a function with the decorator ``triton.jit``.

    Returns:
        A message for each loop with such names. Loops over ``static_range`` are unrolled, so they
        count as straight code. What a called function returns is taken for a new tensor.
    """
    source, first_line = inspect.getsourcelines(fn.fn)
    tree = ast.parse(textwrap.dedent("".join(source)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    names = _Names(Path(inspect.getfile(fn.fn)).name, first_line - 1)
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        names.held[argument.arg] = names.new()
    names.run(function.body)
    return list(dict.fromkeys(names.found))


class _Names:
    """Which tensors each name may hold, by a walk over the statements."""

    def __init__(self, file: str, offset: int):
        self.file, self.offset = file, offset
        self.held: dict[str, Values] = {}
        self.found: list[str] = []
        self.count = itertools.count()

    def new(self) -> Values:
        return frozenset({next(self.count)})

    def value(self, node: ast.expr) -> Values:
        if isinstance(node, ast.Name):
            return self.held.get(node.id) or self.new()
        if isinstance(node, ast.Tuple | ast.List):
            return frozenset().union(*map(self.value, node.elts))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            return self.value(node.value)
        if isinstance(node, ast.IfExp):
            return self.value(node.body) | self.value(node.orelse)
        if isinstance(node, ast.BinOp) and ast.Tuple in (type(node.left), type(node.right)):
            return self.value(node.left) | self.value(node.right)  # tuples one after the other
        return self.new()

    def bind(self, target: ast.expr, value: Values) -> None:
        if isinstance(target, ast.Name):
            self.held[target.id] = value
        elif isinstance(target, ast.Tuple):
            for part in target.elts:
                self.bind(part, self.new())

    def assign(self, target: ast.expr, node: ast.expr) -> None:
        pair = isinstance(target, ast.Tuple) and isinstance(node, ast.Tuple)
        if pair and len(target.elts) == len(node.elts):
            values = [self.value(part) for part in node.elts]
            for part, value in zip(target.elts, values, strict=True):
                self.bind(part, value)
        else:
            self.bind(target, self.value(node))

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assign):
                first, *others = statement.targets
                self.assign(first, statement.value)
                for other in others:  # a = b = value
                    self.assign(other, first)
            elif isinstance(statement, ast.AnnAssign) and statement.value:
                self.assign(statement.target, statement.value)
            elif isinstance(statement, ast.AugAssign):
                self.bind(statement.target, self.new())
            elif isinstance(statement, ast.If):
                self.branch(statement)
            elif isinstance(statement, ast.For) and "static_range" in ast.unparse(statement.iter):
                for _ in range(2):  # what one round binds, the next one sees
                    self.bind(statement.target, self.new())
                    self.run(statement.body)
            elif isinstance(statement, ast.For | ast.While):
                self.loop(statement)

    def branch(self, statement: ast.If) -> None:
        before = dict(self.held)
        self.run(statement.body)
        after, self.held = self.held, before
        self.run(statement.orelse)
        for name, values in after.items():
            self.held[name] = self.held.get(name, frozenset()) | values

    def loop(self, statement: ast.For | ast.While) -> None:
        before = dict(self.held)
        rebound = {
            node.id
            for part in statement.body
            for node in ast.walk(part)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        carried = sorted(rebound & before.keys())
        shared = {
            name
            for pair in itertools.combinations(carried, 2)
            for name in pair
            if before[pair[0]] & before[pair[1]]
        }
        if shared:
            self.found.append(
                f"{self.file}:{self.offset + statement.lineno}: {', '.join(sorted(shared))} hold "
                "one tensor before this loop, which rebinds them; give each its own"
            )
        for name in carried:
            self.held[name] = self.new()
        if isinstance(statement, ast.For):
            self.bind(statement.target, self.new())
        self.run(statement.body)
        # Names that only the body binds end with it.
        self.held = {n: self.new() if n in rebound else v for n, v in before.items()}
