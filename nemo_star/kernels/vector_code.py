"""LLVM code on vectors of floats, in the words of `streaming_code.py`: loops, variables, loads, powers of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()

EXP2 = (1.54035304e-4, 1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1, 1.0)
"""2**x for |x| <= 1/2, highest power first: the Taylor series of exp(x log 2), off by 1.2e-7 at most."""

ROUND = 1.5 * 2.0**23
"""Added to a float32, it leaves the nearest whole number in the low bits."""


class VectorCode:
    """Writes one function. Vectors have `width` floats; addresses count floats from a pointer."""

    def __init__(self, function: ir.Function, width: int) -> None:
        self.module = function.module
        self.width = width
        self.vector = ir.VectorType(F32, width)
        self.entry = function.append_basic_block()
        self.builder = ir.IRBuilder(self.entry)

    def exp2(self, x: ir.Value) -> ir.Value:
        """2**x, for x <= 0, at least 2**-126: a polynomial, and the whole part added to its exponent."""
        b, width, constant = self.builder, self.width, self.constant
        least = constant(-126.0)
        x = b.select(b.fcmp_ordered("<", x, least), least, x)  # leaves nan as it is
        shifted = b.fadd(x, constant(ROUND))
        rest = b.fsub(x, b.fsub(shifted, constant(ROUND)))
        value = constant(EXP2[0])
        for term in EXP2[1:]:
            value = self.fma(value, rest, constant(term))
        integers = ir.VectorType(I32, width)
        whole = b.shl(b.bitcast(shifted, integers), ir.Constant(integers, [23] * width))
        return b.bitcast(b.add(b.bitcast(value, integers), whole), self.vector)

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.vector, [value] * self.width)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return self.call("llvm.fmuladd", self.vector, x, y, z)

    def splat(self, x: ir.Value, item: ir.Type = F32) -> ir.Value:
        kind = ir.VectorType(item, self.width)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0))
        lanes = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), lanes)

    def reduce(self, operation: str, x: ir.Value) -> ir.Value:
        """A vector's largest lane, or its lanes' sum in any order."""
        width = self.width
        name = f"llvm.vector.reduce.{operation}.v{width}f32"
        if operation == "fmax":
            return self.builder.call(self.declared(name, ir.FunctionType(F32, [self.vector])), [x])
        function = self.declared(name, ir.FunctionType(F32, [F32, self.vector]))
        return self.builder.call(function, [ir.Constant(F32, -0.0), x], fastmath=("reassoc",))

    def call(self, name: str, kind: ir.Type, *arguments: ir.Value) -> ir.Value:
        function = self.declared(f"{name}.v{self.width}f32", ir.FunctionType(kind, [kind] * len(arguments)))
        return self.builder.call(function, arguments)

    def declared(self, name: str, signature: ir.FunctionType) -> ir.Function:
        return self.module.globals.get(name) or ir.Function(self.module, signature, name=name)

    def load(self, source: ir.Value, index: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        address = self.builder.gep(source, [index], source_etype=F32)
        return self.builder.load(address, align=4, typ=kind or self.vector)

    def store(self, value: ir.Value, target: ir.Value, index: ir.Value) -> None:
        self.builder.store(value, self.builder.gep(target, [index], source_etype=F32), align=4)

    def variable(self, value: ir.Value) -> ir.Value:
        """A value that changes in a loop. Taken at the function's entry, where LLVM turns it into a register."""
        with self.builder.goto_block(self.entry):
            place = self.builder.alloca(value.type)
        self.builder.store(value, place)
        return place

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
        """`for (i = start; i < stop; i += step)`."""
        b = self.builder
        before, head, body, after = b.block, *(b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", index, stop), body, after)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, I64(step)), b.block)
        b.branch(head)
        b.position_at_end(after)
