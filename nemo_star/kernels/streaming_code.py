"""LLVM code of `nemo_star.kernels.streaming`: attention of a few query rows, reading K and V once, in order.

    groups  ng, worked on one after the other
    rows    query heads of a group
    hn      head dimension

For each group, tile by tile of tokens, as FlashAttention does (arXiv 2205.14135, algorithm 1):

    dots         scores[rows, tile]: a vector of tokens at a time, whose sums over hn become one vector together
    softmax      powers of two of the scores, less the largest so far; sums
    accumulate   out[rows, hn] in registers over the tokens of the tile

Memory is read ahead of its use. `dots` asks for the next tile's keys: its loads are too many at a time for the
processor to see that they are in order. `accumulate` goes through one row after the other, which the processor sees, up
to the end of a page: it asks for one line of the page after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

from llvmlite import ir

from nemo_star.kernels.vector_code import F32, I16, I32, I64, POINTER, VectorCode

CACHE_LINE = 64
PAGE = 4096

STORED = {"float32": F32, "float16": ir.HalfType(), "bfloat16": I16}


@dataclass(frozen=True)
class Shape:
    """What the code is made for. `stored`: type of K and V; hn is a multiple of `width`."""

    rows: int
    channels: int
    stored: str
    width: int
    """Floats in a vector register."""
    registers: int
    tile: int
    """Tokens of a tile, a multiple of `width`."""

    @property
    def row_bytes(self) -> int:
        """Of a token's K or V in a group."""
        return self.channels * (4 if self.stored == "float32" else 2)

    @property
    def vectors(self) -> int:
        """Registers that a row of hn floats takes."""
        return self.channels // self.width


def module_of(shape: Shape) -> ir.Module:
    """A module with one function,

    `attend(q, k, v, out, largest, sums, room, tokens, groups, k_stride, v_stride)`

    Read are q [groups, rows, hn] float32, scale and log2(e) multiplied in, and k, v [groups, tokens, hn], dense but for
    the first dimension, whose strides are counted in elements. Written are, in float32, out [groups, rows, hn], largest
    [groups, rows], the largest score, and sums [groups, rows], of 2**(score - largest). room [(tile + 1) * rows]
    float32 is to work in.
    """
    module = ir.Module(name="nemo_star")
    signature = ir.FunctionType(ir.VoidType(), [POINTER] * 7 + [I64] * 4)
    _Attend(ir.Function(module, signature, name="attend"), shape).emit()
    return module


class _Attend(VectorCode):
    def __init__(self, function: ir.Function, shape: Shape) -> None:
        super().__init__(function, shape.width)
        self.shape = shape
        self.arguments = function.args

    def emit(self) -> None:
        b, shape = self.builder, self.shape
        self.tokens, groups = self.arguments[7:9]
        with self.loop(I64(0), groups, 1) as group:
            self.find(group)
            self.begin()
            with self.loop(I64(0), self.tokens, shape.tile) as tile:
                left = b.sub(self.tokens, tile)
                in_tile = b.select(b.icmp_signed("<", left, I64(shape.tile)), left, I64(shape.tile))
                with self.loop(I64(0), in_tile, shape.width) as start:
                    self.in_blocks(1, partial(self.dots, tile, start, in_tile))
                with self.loop(I64(0), I64(shape.rows), 1) as row:
                    self.softmax(row, in_tile)
                columns = min(shape.vectors, 8)
                for first in range(0, shape.vectors, columns):
                    span = range(first, min(first + columns, shape.vectors))
                    self.in_blocks(columns, partial(self.accumulate, tile, in_tile, span))
            with self.loop(I64(0), I64(shape.rows), 1) as row:
                self.finish(row)
        b.ret_void()

    def in_blocks(self, vectors: int, emit: Callable[[list[ir.Value]], None]) -> None:
        """`emit` for blocks of rows, so many that `vectors` registers for each take half of the registers at most."""
        size = max(1, min(4, self.shape.registers // 2 // vectors))
        together = self.shape.rows // size * size
        if together:
            with self.loop(I64(0), I64(together), size) as first:
                emit([self.builder.add(first, I64(row)) for row in range(size)])
        if together < self.shape.rows:
            emit([I64(row) for row in range(together, self.shape.rows)])

    def find(self, group: ir.Value) -> None:
        """Addresses of a group's tensors."""
        b, shape = self.builder, self.shape
        q, k, v, out, largest, sums, self.scores = self.arguments[:7]
        k_stride, v_stride = self.arguments[9:]

        def at(start: ir.Value, stride: ir.Value, item: ir.Type = F32) -> ir.Value:
            return b.gep(start, [b.mul(group, stride)], source_etype=item)

        row, rows, stored = I64(shape.rows * shape.channels), I64(shape.rows), STORED[shape.stored]
        self.q, self.out, self.largest, self.sums = at(q, row), at(out, row), at(largest, rows), at(sums, rows)
        self.k, self.v = at(k, k_stride, stored), at(v, v_stride, stored)
        self.factors = b.gep(self.scores, [I64(shape.rows * shape.tile)], source_etype=F32)

    def begin(self) -> None:
        with self.loop(I64(0), I64(self.shape.rows), 1) as row:
            self.store(ir.Constant(F32, float("-inf")), self.largest, row)
            self.store(ir.Constant(F32, 0.0), self.sums, row)
        with self.loop(I64(0), I64(self.shape.rows * self.shape.channels), self.shape.width) as place:
            self.store(self.constant(0.0), self.out, place)

    def dots(self, tile: ir.Value, start: ir.Value, in_tile: ir.Value, rows: list[ir.Value]) -> None:
        """Scores of `width` tokens of the tile from `start` on; -inf behind the last token."""
        b, width = self.builder, self.shape.width
        last = b.sub(self.tokens, I64(1))

        def token_sums(token: int) -> list[ir.Value]:
            """For each row its products with one token, summed into one vector."""
            place = b.add(b.add(tile, start), I64(token))
            self.prefetch(self.k, b.add(place, I64(self.shape.tile)), self.shape.row_bytes)
            place = b.select(b.icmp_signed("<", place, last), place, last)  # nothing is read behind the last
            keys = self.stored_row(self.k, place)
            sums = []
            for row in rows:
                query = self.floats(self.q, b.mul(row, I64(self.shape.channels)))
                total = b.fmul(query[0], keys[0])
                for x, y in zip(query[1:], keys[1:], strict=True):
                    total = self.fma(x, y, total)
                sums.append(total)
            return sums

        places = b.add(self.splat(b.trunc(start, I32), I32), ir.Constant(ir.VectorType(I32, width), list(range(width))))
        seen = b.icmp_signed("<", places, self.splat(b.trunc(in_tile, I32), I32))
        for row, total in zip(rows, self.sum_lanes(token_sums, 0, width), strict=True):
            self.store(b.select(seen, total, self.constant(float("-inf"))), self.scores, self.score(row, start))

    def sum_lanes(self, of: Callable[[int], list[ir.Value]], first: int, tokens: int) -> list[ir.Value]:
        """Vectors whose lanes are `tokens` runs, run i holding parts of the sum over the lanes of `of(first + i)`.

        With as many tokens as lanes, lane i is that sum. Two vectors become one by adding the halves of their runs, so
        that a token costs three instructions instead of a reduction's eight.
        """
        if tokens == 1:
            return of(first)
        pairs = zip(*(self.sum_lanes(of, at, tokens // 2) for at in (first, first + tokens // 2)), strict=True)
        width = self.shape.width
        run = width // (tokens // 2)
        lower = [lane for lane in range(2 * width) if lane % run < run // 2]
        upper = [lane + run // 2 for lane in lower]
        picks = [ir.Constant(ir.VectorType(I32, width), lanes) for lanes in (lower, upper)]
        b = self.builder
        return [b.fadd(*(b.shuffle_vector(left, right, pick) for pick in picks)) for left, right in pairs]

    def softmax(self, row: ir.Value, in_tile: ir.Value) -> None:
        """Scores of a row to weights; `largest`, `sums` and what `out` shrinks by brought up to date."""
        b = self.builder
        before = self.load(self.largest, row, F32)
        largest = self.variable(self.splat(before))
        with self.loop(I64(0), in_tile, self.shape.width) as start:
            scores = self.load(self.scores, self.score(row, start))
            b.store(self.call("llvm.maxnum", self.vector, b.load(largest, typ=self.vector), scores), largest)
        now = self.reduce("fmax", b.load(largest, typ=self.vector))
        total = self.variable(self.constant(0.0))
        with self.loop(I64(0), in_tile, self.shape.width) as start:
            place = self.score(row, start)
            weights = self.exp2(b.fsub(self.load(self.scores, place), self.splat(now)))
            self.store(weights, self.scores, place)
            b.store(b.fadd(b.load(total, typ=self.vector), weights), total)
        factor = b.extract_element(self.exp2(self.splat(b.fsub(before, now))), I32(0))
        shrunk = b.fmul(self.load(self.sums, row, F32), factor)
        self.store(b.fadd(shrunk, self.reduce("fadd", b.load(total, typ=self.vector))), self.sums, row)
        self.store(now, self.largest, row)
        self.store(factor, self.factors, row)

    def accumulate(self, tile: ir.Value, in_tile: ir.Value, span: range, rows: list[ir.Value]) -> None:
        """out = factor * out + weights @ values over the tokens of the tile; vectors number `span` of every row."""
        b = self.builder
        sums = []
        for row in rows:
            factor = self.splat(self.load(self.factors, row, F32))
            places = [self.out_place(row, column) for column in span]
            sums.append([(self.variable(b.fmul(self.load(self.out, place), factor)), place) for place in places])
        with self.loop(I64(0), in_tile, 1) as token:
            place = b.add(tile, token)
            if span.start == 0:
                self.prefetch(self.v, b.add(place, I64(PAGE // self.shape.row_bytes)), CACHE_LINE)
            values = self.stored_row(self.v, place, span)
            for row, variables in zip(rows, sums, strict=True):
                weight = self.splat(self.load(self.scores, self.score(row, token), F32))
                for (variable, _), value in zip(variables, values, strict=True):
                    b.store(self.fma(weight, value, b.load(variable, typ=self.vector)), variable)
        for variable, place in chain.from_iterable(sums):
            self.store(b.load(variable, typ=self.vector), self.out, place)

    def finish(self, row: ir.Value) -> None:
        """Weights to a sum of 1."""
        b = self.builder
        share = self.splat(b.fdiv(ir.Constant(F32, 1.0), self.load(self.sums, row, F32)))
        for column in range(self.shape.vectors):
            place = self.out_place(row, column)
            self.store(b.fmul(self.load(self.out, place), share), self.out, place)

    # Where things are

    def score(self, row: ir.Value, token: ir.Value) -> ir.Value:
        return self.builder.add(self.builder.mul(row, I64(self.shape.tile)), token)

    def out_place(self, row: ir.Value, column: int) -> ir.Value:
        start = self.builder.mul(row, I64(self.shape.channels))
        return self.builder.add(start, I64(column * self.shape.width))

    def stored_row(self, source: ir.Value, token: ir.Value, span: range | None = None) -> list[ir.Value]:
        """Vectors of a token's K or V, as float32."""
        return self.floats(source, self.builder.mul(token, I64(self.shape.channels)), span, self.shape.stored)

    def prefetch(self, source: ir.Value, token: ir.Value, size: int) -> None:
        """Ask for the first bytes of a token's K or V; an address past the end does no harm."""
        b = self.builder
        b.fence("seq_cst", targetscope="singlethread")  # keeps LLVM from asking for many tokens at once; no instruction
        ask = self.declared("llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32]))
        for offset in range(0, size, CACHE_LINE):
            address = b.gep(
                source, [b.add(b.mul(token, I64(self.shape.row_bytes)), I64(offset))], source_etype=ir.IntType(8)
            )
            b.call(ask, [address, I32(0), I32(2), I32(1)])  # to be read; into the second cache; data

    def floats(
        self, source: ir.Value, start: ir.Value, span: range | None = None, stored: str = "float32"
    ) -> list[ir.Value]:
        """Vectors number `span` (all) of the row at element `start`, as float32."""
        b, width = self.builder, self.shape.width
        item = STORED[stored]
        found = []
        for column in span or range(self.shape.vectors):
            address = b.gep(source, [b.add(start, I64(column * width))], source_etype=item)
            value = b.load(address, align=4 if item == F32 else 2, typ=ir.VectorType(item, width))
            if stored == "bfloat16":  # the upper half of a float32
                wide = ir.VectorType(I32, width)
                value = b.bitcast(b.shl(b.zext(value, wide), ir.Constant(wide, [16] * width)), self.vector)
            elif stored == "float16":
                value = b.fpext(value, self.vector)
            found.append(value)
        return found
