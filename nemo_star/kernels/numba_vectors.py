"""Vectors of floats for Python that Numba compiles, as LLVM's own: for what its loops alone do not make good code of.

Adding up one vector's lanes costs eight instructions. `joins` does it for many vectors together, three for each.
Every intrinsic is (types -> signature, code); LLVM keeps a vector in as many registers as it takes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_I32 = ir.IntType(32)


class _VectorType(types.Type):
    """So many floats."""

    def __init__(self, lanes: int) -> None:
        super().__init__(f"Vector{lanes}")
        self.lanes = lanes


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _floats(kind.lanes))


def _floats(lanes: int) -> Any:
    return ir.VectorType(ir.FloatType(), lanes)


def _bits(lanes: int) -> Any:
    return ir.VectorType(_I32, lanes)


def _all(kind: Any, value: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _lanes(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(places)), places)


def _address(context: Any, builder: Any, array: Any, value: Any, row: Any, column: Any) -> Any:
    """Of array[row, column]; the rows are dense."""
    made = context.make_array(array)(context, builder, value)
    width = cgutils.unpack_tuple(builder, made.shape)[1]
    return builder.gep(made.data, [builder.add(builder.mul(row, width), column)])


def loads(lanes: int) -> Any:
    """`load(array, row, column)`: array[row, column : column + lanes] as float32; int16 are bits of bfloat16, uint16 of
    float16."""
    floats, ints = _floats(lanes), _bits(lanes)

    @intrinsic
    def load(context: Any, array: Any, row: Any, column: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            item = context.get_value_type(array.dtype)
            address = _address(context, builder, array, *arguments)
            pointer = builder.bitcast(address, ir.VectorType(item, lanes).as_pointer())
            value = builder.load(pointer, align=array.dtype.bitwidth // 8)
            if array.dtype == types.float32:
                return value
            if array.dtype == types.uint16:
                return _from_float16(context, builder, value)
            return builder.bitcast(builder.shl(builder.zext(value, ints), _all(ints, 16)), floats)

        return _VectorType(lanes)(array, types.int64, types.int64), emit

    return load


def _from_float16(context: Any, builder: Any, bits: Any) -> Any:
    """By the processor's own instruction, or in integers where LLVM would call a function that may not be there."""
    lanes = bits.type.count
    floats, ints = _floats(lanes), _bits(lanes)
    triple, _, features = context.codegen().magic_tuple()
    if "+f16c" in features.split(",") or triple.startswith(("aarch64", "arm64")):
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), lanes)), floats)
    upper = builder.shl(builder.zext(bits, ints), _all(ints, 16))
    size = builder.lshr(builder.and_(upper, _all(ints, 0x7FFFFFFF)), _all(ints, 3))
    special = builder.icmp_unsigned(">=", size, _all(ints, 0x0F800000))  # infinity and nan stay what they are
    size = builder.select(special, builder.or_(size, _all(ints, 0x7F800000)), size)
    value = builder.bitcast(builder.fmul(builder.bitcast(size, floats), _all(floats, 2.0**112)), ints)
    return builder.bitcast(builder.or_(value, builder.and_(upper, _all(ints, 0x80000000))), floats)


@intrinsic
def store(context: Any, vector: Any, array: Any, row: Any, column: Any) -> Any:
    """array[row, column : column + lanes] = vector; float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, array, *arguments[1:])
        builder.store(arguments[0], builder.bitcast(address, arguments[0].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(vector, array, types.int64, types.int64), emit


@intrinsic
def store_rows(context: Any, vector: Any, array: Any, row: Any, column: Any) -> Any:
    """A quarter into each of four rows: array[row : row + 4, column : column + lanes / 4] = vector; float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, rows, row, column = arguments
        share = vector.lanes // 4
        for i in range(4):
            quarter = builder.shuffle_vector(value, value, _lanes([share * i + lane for lane in range(share)]))
            address = _address(context, builder, array, rows, builder.add(row, ir.Constant(row.type, i)), column)
            builder.store(quarter, builder.bitcast(address, quarter.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(vector, array, types.int64, types.int64), emit


@intrinsic
def store_turned(context: Any, a: Any, b: Any, c: Any, d: Any, array: Any, row: Any, column: Any) -> Any:
    """Lane i of the four vectors into row i: array[row + i, column : column + 4] = a[i], b[i], c[i], d[i]; float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *vectors, array, row, column = arguments
        lanes = vectors[0].type.count
        for i in range(0, lanes, 4):  # four by four, in two rounds
            turn = _lanes([of + i + lane for lane in range(4) for of in (0, lanes)])
            ab, cd = (builder.shuffle_vector(x, y, turn) for x, y in (vectors[:2], vectors[2:]))
            for lane in range(4):
                four = builder.shuffle_vector(ab, cd, _lanes([2 * lane, 2 * lane + 1, 8 + 2 * lane, 9 + 2 * lane]))
                place = builder.add(row, ir.Constant(row.type, i + lane))
                address = _address(context, builder, signature.args[4], array, place, column)
                builder.store(four, builder.bitcast(address, four.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(a, b, c, d, array, types.int64, types.int64), emit


def splats(lanes: int) -> Any:
    """`splat(value)`: a vector of one number."""

    @intrinsic
    def splat(context: Any, value: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first = builder.insert_element(ir.Constant(_floats(lanes), ir.Undefined), arguments[0], _I32(0))
            return builder.shuffle_vector(first, first, _all(_bits(lanes), 0))

        return _VectorType(lanes)(types.float32), emit

    return splat


@intrinsic
def plus_product(context: Any, total: Any, x: Any, y: Any) -> Any:
    """total + x * y, rounded once where the processor can."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, x, y = arguments
        return builder.fadd(total, builder.fmul(x, y, flags=("contract",)), flags=("contract",))

    return total(total, x, y), emit


@intrinsic
def plus(context: Any, x: Any, y: Any) -> Any:
    """x + y."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return x(x, y), emit


@intrinsic
def larger(context: Any, x: Any, y: Any) -> Any:
    """The larger of two, lane by lane; y where one is nan."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return x(x, y), emit


def joins(run: int) -> Any:
    """`join(x, y)`: each run of lanes, in halves that are added, gives half a run, one of x and one of y in turn."""
    half = run // 2

    @intrinsic
    def join(context: Any, x: Any, y: Any) -> Any:
        starts = range(0, x.lanes, run)
        lower = [of + start + lane for start in starts for of in (0, x.lanes) for lane in range(half)]

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            picks = (_lanes(lower), _lanes([lane + half for lane in lower]))
            return builder.fadd(*(builder.shuffle_vector(*arguments, pick) for pick in picks))

        return x(x, y), emit

    return join


@intrinsic
def prefetch(context: Any, rows: Any, row: Any, byte: Any) -> Any:
    """Ask for the cache line `byte` bytes into `rows[row]`; a place past the end does no harm."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = cgutils.unpack_tuple(builder, array.strides)[0]
        data = builder.ptrtoint(array.data, ir.IntType(64))
        place = builder.add(builder.add(data, builder.mul(arguments[1], stride)), arguments[2])
        address = builder.inttoptr(place, ir.IntType(8).as_pointer())
        signature_of = ir.FunctionType(ir.VoidType(), [address.type] + [_I32] * 3)
        ask = cgutils.get_or_insert_function(builder.module, signature_of, "llvm.prefetch.p0")
        builder.call(ask, [address, *(ir.Constant(_I32, value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64), emit
