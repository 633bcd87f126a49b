"""Translates a kernel's TTIR, Triton's first intermediate language, to Python on numpy arrays.

:mod:`tests.ops.ttir` compiles kernels and runs what comes out of here. Each SSA value becomes a
variable, each operation a line. A value of type ``tensor<4x8xf32>`` is an array that broadcasts to
4 x 8: a splat stays a scalar, so most index arithmetic is cheap, and operations that need the full
shape broadcast first. bfloat16 is held as float32 that is rounded after each operation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ops.ttir_numpy import DTYPES, SIZES, widen_bf16

COMPARE_INT = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE_FLOAT = {
    "oeq": "{0} == {1}", "ogt": "{0} > {1}", "oge": "{0} >= {1}", "olt": "{0} < {1}",
    "ole": "{0} <= {1}", "one": "({0} < {1}) | ({0} > {1})", "une": "{0} != {1}",
    "ueq": "~(({0} < {1}) | ({0} > {1}))", "ugt": "~({0} <= {1})", "uge": "~({0} < {1})",
    "ult": "~({0} >= {1})", "ule": "~({0} > {1})",
    "ord": "({0} == {0}) & ({1} == {1})", "uno": "({0} != {0}) | ({1} != {1})",
}  # fmt: skip
# The result has the operands' type.
PLAIN = {
    "arith.addi": "{0} + {1}", "arith.subi": "{0} - {1}", "arith.muli": "{0} * {1}",
    "arith.divsi": "divide(run, {0}, {1}, False)", "arith.remsi": "divide(run, {0}, {1}, True)",
    "arith.andi": "{0} & {1}", "arith.ori": "{0} | {1}", "arith.xori": "{0} ^ {1}",
    "arith.shli": "{0} << {1}", "arith.shrsi": "{0} >> {1}",
    "arith.maxsi": "np.maximum({0}, {1})", "arith.minsi": "np.minimum({0}, {1})",
    "arith.addf": "{0} + {1}", "arith.subf": "{0} - {1}", "arith.mulf": "{0} * {1}",
    "arith.divf": "{0} / {1}", "arith.negf": "-{0}", "arith.remf": "np.fmod({0}, {1})",
    "arith.maximumf": "np.maximum({0}, {1})", "arith.minimumf": "np.minimum({0}, {1})",
    "arith.maxnumf": "np.fmax({0}, {1})", "arith.minnumf": "np.fmin({0}, {1})",
    "arith.select": "select({0}, {1}, {2})",
    "math.rsqrt": "np.reciprocal(np.sqrt({0}))", "math.absf": "np.abs({0})",
    "math.absi": "np.abs({0})", "math.fma": "{0} * {1} + {2}",
    "tt.precise_sqrt": "np.sqrt({0})", "tt.precise_divf": "{0} / {1}",
    "tt.clampf": "np.minimum(np.maximum({0}, {1}), {2})",
    **{f"math.{n}": f"np.{n}({{0}})"
       for n in ("exp", "exp2", "log", "log2", "sqrt", "sin", "cos", "floor", "ceil", "tanh")},
}  # fmt: skip
# On unsigned operands; the result is cast back.
ON_UNSIGNED = {
    "arith.divui": "divide(run, {0}, {1}, False, False)",
    "arith.remui": "divide(run, {0}, {1}, True, False)",
    "arith.shrui": "unsigned({0}) >> unsigned({1})",
    "arith.maxui": "np.maximum(unsigned({0}), unsigned({1}))",
    "arith.minui": "np.minimum(unsigned({0}), unsigned({1}))",
    "tt.mulhiui": "(unsigned({0}).astype(np.uint64) * unsigned({1})) >> np.uint64(32)",
}
CHECKED = {"arith.addi": "add32", "arith.subi": "sub32", "arith.muli": "mul32"}
CASTS = {"arith.extsi", "arith.extui", "arith.trunci", "arith.extf", "arith.truncf",
         "arith.sitofp", "arith.uitofp", "arith.fptosi", "arith.fptoui", "arith.index_cast",
         "tt.fp_to_fp"}  # fmt: skip
REDUCE = {"addf": "add", "addi": "add", "maxnumf": "fmax", "minnumf": "fmin", "maxsi": "maximum",
          "maximumf": "maximum", "minsi": "minimum", "minimumf": "minimum",
          "andi": "bitwise_and", "ori": "bitwise_or", "xori": "bitwise_xor"}  # fmt: skip


def element(kind: str) -> str:
    """``f32`` of ``tensor<4x8xf32>`` and of ``!tt.ptr<f32>``."""
    found = re.search(r"(\w+?)(?:, \d+)?>*$", re.sub(r"(\d+x)+(?=\w)", "", kind.strip()))
    return found[1] if found else ""


def shape_of(kind: str) -> tuple[int, ...]:
    """``(4, 8)`` of ``tensor<4x8xf32>``, ``()`` of a scalar's type."""
    dims = re.match(r"tensor<((?:\d+x)+)", kind.strip())
    return tuple(int(n) for n in dims[1].split("x")[:-1]) if dims else ()


def constant(text: str, kind: str) -> Any:
    """The value of a literal of an element type."""
    if text in ("true", "false"):
        return np.bool_(text == "true")
    dtype = np.dtype(DTYPES[kind])
    if text.startswith("0x") and kind == "bf16":
        return widen_bf16(np.uint16(int(text, 16)))
    if text.startswith("0x") and dtype.kind == "f":
        return np.array(int(text, 16), f"u{dtype.itemsize}").view(dtype)[()]
    return dtype.type(float(text) if dtype.kind == "f" else int(text))


VALUE = r"%[\w-]+(?:#\d+)?"


def variable(value: str) -> str:
    return "v_" + value[1:].replace("#", "_").replace("-", "minus")


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) + ("," if len(names) == 1 else "")


class Translator:
    """One kernel's text to the source of a function ``kernel(run, *arguments)``.

    ``constants`` are its globals beside this module's, ``types`` the arguments' element types (of
    pointers: ``*f32``), ``origins`` the line in the user's file that each line came from.

    Raises:
        NotImplementedError: an operation is not modelled; the message is its line.
    """

    def __init__(self, text: str):
        self.locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))
        self.lines = [line.strip() for line in text.splitlines()]
        self.at = 0
        self.out: list[str] = []
        self.origins: list[str] = []
        self.constants: dict[str, Any] = {}
        self.types: list[str] = []
        functions = [k for k, line in enumerate(self.lines) if line.startswith("tt.func")]
        if len(functions) > 1:
            raise NotImplementedError(f"a call: {self.lines[functions[1]]}")
        self.at = functions[0]
        head = self.next_line()
        found = re.findall(rf"({VALUE}): (!tt\.ptr<\w+|\w+)", head)
        self.types = [kind.replace("!tt.ptr<", "*") for _, kind in found]
        self.emit(0, f"def kernel({', '.join(['run', *(variable(a) for a, _ in found)])}):")
        self.block(1, [])

    @property
    def source(self) -> str:
        return "\n".join(self.out)

    def next_line(self) -> str:
        line = self.lines[self.at]
        self.at += 1
        location = re.search(r"loc\((.*)\)$", line)
        self.origin = self.resolve(location[1]) if location else ""
        return re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", line)

    def resolve(self, location: str) -> str:
        """``file.py:12`` of a location: the innermost function's line."""
        for _ in range(9):
            place = re.search(r'"([^"]+)":(\d+):\d+', location)
            if place:
                return f"{place[1].rsplit('/', 1)[-1]}:{place[2]}"
            other = re.search(r"#loc\d*", location)
            location = self.locations.get(other[0], "") if other else ""
        return ""

    def emit(self, depth: int, line: str) -> None:
        self.out.append("    " * depth + line)
        self.origins.append(self.origin)

    def assign(self, depth: int, names: Sequence[str], values: Sequence[str]) -> None:
        if names:
            self.emit(depth, f"{listed(names)} = {listed(values)}")

    def block(self, depth: int, results: Sequence[str]) -> str:
        """Lines up to a closing brace, which is returned; a yield assigns to ``results``."""
        while True:
            line = self.next_line()
            if line.startswith("}"):
                return line
            if line:
                self.operation(depth, line, results)

    def operation(self, depth: int, line: str, results: Sequence[str]) -> None:
        named = rf"({VALUE}(?:, {VALUE})*)(?::(\d+))?"
        parts = re.match(rf'(?:{named} = )?"?([\w.]+)"?(.*)$', line)
        if parts is None:
            raise NotImplementedError(line)
        result, count, op, rest = parts.groups()
        outs = [variable(v) for v in result.split(", ")] if result else []
        if count:
            outs = [f"{variable(result)}_{k}" for k in range(int(count))]
        args = [variable(v) for v in re.findall(VALUE, rest.split(" : ")[0])]
        types = rest.rsplit(" : ", 1)[-1].strip() if " : " in rest else ""
        before, _, after = re.sub(r" to (?=[a-z])", " -> ", types).rpartition(" -> ")
        before = before.strip("() ") or after
        if op == "arith.select":
            after = after.rsplit(", ", 1)[-1]
        elif op in ("scf.for", "scf.if", "tt.reduce"):
            self.region(depth, op, outs, args, rest)
            return
        value = self.expression(op, args, rest, before, after, line)
        if op == "arith.constant":
            self.constants[outs[0]] = value
        elif op == "scf.yield":
            self.assign(depth, results, args)
        elif value:
            self.emit(depth, f"{', '.join(outs)} = {value}" if outs else value)

    def expression(
        self, op: str, args: list[str], rest: str, before: str, after: str, line: str
    ) -> Any:
        """The line's right side; of a constant, its value."""
        joined = ", ".join(args)
        if op == "arith.constant":
            return self.constant_of(rest)
        if op in CHECKED and element(after) == "i32":
            return f"{CHECKED[op]}(run, {joined})"
        if op in PLAIN:
            value = PLAIN[op].format(*args)
            narrow = element(after) == "bf16" and "tt.ptr" not in after
            return f"to_bf16({value})" if narrow else value
        if op in ON_UNSIGNED:
            dtype = DTYPES[element(after)].__name__
            return f"({ON_UNSIGNED[op].format(*args)}).astype(np.{dtype})"
        if op in CASTS:
            return self.cast(op, args[0], element(after))
        word = rest.split(",")[0].split(":")[0].strip()
        numbers = {k: int(v) for k, v in re.findall(r"(\w+) = (-?\d+)", rest)}
        pointee = element(before)
        simple: dict[str, Callable[[], str]] = {
            "arith.cmpi": lambda: self.compare(word, args),
            "arith.cmpf": lambda: COMPARE_FLOAT[word].format(*args),
            "arith.bitcast": lambda: self.bits(args[0], element(before), element(after)),
            "tt.bitcast": lambda: self.bits(args[0], before, after),
            "tt.get_program_id": lambda: f"np.int32(run.program[{'xyz'.index(word)}])",
            "tt.get_num_programs": lambda: f"np.int32(run.grid[{'xyz'.index(word)}])",
            "tt.make_range": lambda: (
                f"np.arange({numbers['start']}, {numbers['end']}, dtype=np.int32)"
            ),
            "tt.splat": lambda: args[0],
            "tt.broadcast": lambda: args[0],
            "tt.unsplat": lambda: f"first({args[0]})",
            "tt.expand_dims": lambda: f"expand({args[0]}, {numbers['axis']})",
            "tt.reshape": lambda: f"reshape({args[0]}, {shape_of(before)}, {shape_of(after)})",
            "tt.trans": lambda: (
                f"trans({args[0]}, ({re.search(r'array<i32: ([^>]*)>', rest)[1]},))"
            ),
            "tt.addptr": lambda: f"Pointer({args[0]}.memory, {args[0]}.at + {args[1]})",
            "tt.ptr_to_int": lambda: f"run.address({pointee!r}, {args[0]})",
            "tt.int_to_ptr": lambda: f"run.pointer({element(after)!r}, {args[0]})",
            "tt.load": lambda: f"run.load({pointee!r}, {joined})",
            "tt.store": lambda: f"run.store({pointee!r}, {shape_of(before)}, {joined})",
            "tt.join": lambda: (
                f"np.stack([full(x, {shape_of(after)[:-1]}) for x in ({joined})], -1)"
            ),
            "tt.split": lambda: f"np.moveaxis(full({args[0]}, {shape_of(before)}), -1, 0)",
            "tt.return": lambda: "return",
            "tt.reduce.return": lambda: f"return {joined}",
            "scf.yield": lambda: "",
            "gpu.barrier": lambda: "run.barrier()",
            "ttg.barrier": lambda: "run.barrier()",
            "ttg.local_barrier": lambda: "run.barrier()",
        }
        if op not in simple:
            raise NotImplementedError(line)
        return simple[op]()

    @staticmethod
    def whole(args: Sequence[str], kinds: Sequence[str]) -> list[str]:
        """Operands broadcast to the shapes of their types."""
        return [f"full({a}, {shape_of(k)})" for a, k in zip(args, kinds, strict=False)]

    @staticmethod
    def constant_of(rest: str) -> Any:
        dense = re.match(r"\s*dense<(.*?)> : (.*)$", rest)
        if dense is None:
            text, _, kind = rest.strip().partition(" : ")
            return constant(text, kind or "i1")
        text, kind = dense[1], element(dense[2])
        if text.startswith("["):
            text = text.replace("true", "True").replace("false", "False")
            return np.array(ast.literal_eval(text), DTYPES[kind])
        return constant(text, kind)

    @staticmethod
    def compare(word: str, args: Sequence[str]) -> str:
        if word[0] == "u":
            args = [f"unsigned({a})" for a in args]
        return f"{args[0]} {COMPARE_INT[word.lstrip('su') if len(word) > 2 else word]} {args[1]}"

    @staticmethod
    def cast(op: str, x: str, kind: str) -> str:
        if op in ("arith.extui", "arith.uitofp"):
            x = f"unsigned({x})"
        if op == "arith.trunci" and kind == "i1":
            x = f"({x} & 1)"
        if kind == "bf16":
            return f"to_bf16({x})"
        return f"{x}.astype(np.{np.dtype(DTYPES[kind]).name})"

    @staticmethod
    def bits(x: str, before: str, after: str) -> str:
        if "tt.ptr" in after:
            old, new = SIZES[element(before)], SIZES[element(after)]
            return x if old == new else f"Pointer({x}.memory, {x}.at * {old} // {new})"
        before, after = element(before), element(after)
        if before == "bf16":
            x = f"narrow_bf16({x})"
        if after == "bf16":
            return f"widen_bf16({x})"
        return f"{x}.view(np.{np.dtype(DTYPES[after]).name})"

    # Regions ---------------------------------------------------------------------------------

    def region(self, depth: int, op: str, outs: list[str], args: list[str], rest: str) -> None:
        if op == "scf.if":
            self.emit(depth, f"if {args[0]}:")
            self.emit(depth + 1, "pass")
            if "else" in self.block(depth + 1, outs):
                self.emit(depth, "else:")
                self.emit(depth + 1, "pass")
                self.block(depth + 1, outs)
            return
        if op == "tt.reduce":
            self.combine(depth, op, outs, args, rest)
            return
        pairs = re.findall(rf"({VALUE}) = ({VALUE})", rest)
        loop = pairs.pop(0)[0]
        carried = [variable(a) for a, _ in pairs]
        self.assign(depth, carried, [variable(b) for _, b in pairs])
        self.emit(depth, f"for {variable(loop)} in steps({', '.join(args[1:4])}):")
        self.emit(depth + 1, "pass")
        self.block(depth + 1, carried)
        self.assign(depth, outs, carried)

    def combine(self, depth: int, op: str, outs: list[str], args: list[str], rest: str) -> None:
        """A reduction; the usual ones become a ufunc."""
        start = self.at
        inner = [variable(v) for v in re.findall(rf"({VALUE}): ", self.next_line())]
        known = re.match(r"%\w+ = arith\.(\w+) ", self.lines[self.at])
        single = ".return" in self.lines[self.at + 1]
        function = f"combine_{start}"
        mark = len(self.out)
        self.emit(depth, f"def {function}({', '.join(inner)}):")
        end = self.block(depth + 1, [])
        axis = re.search(r"axis = (\d+)", rest)[1]
        kinds = re.findall(r"tensor<[^>]*>", end.split(" -> ")[0])
        xs = self.whole(args, kinds)
        if single and len(args) == 1 and known and known[1] in REDUCE:
            del self.out[mark:], self.origins[mark:]
            kind = element(kinds[0])
            value = f"np.{REDUCE[known[1]]}.reduce({xs[0]}, axis={axis})"
            value = f"to_bf16({value})" if kind == "bf16" else value
            value = f"[{value}.astype(np.{np.dtype(DTYPES[kind]).name}, copy=False)]"
        else:
            value = f"fold({function}, {axis}, {', '.join(xs)})"
        self.emit(depth, f"{listed(outs)} = {value}")
