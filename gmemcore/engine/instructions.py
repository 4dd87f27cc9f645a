"""Views of addresses, prefetch and libc calls for compiled kernels.

``plain.py`` has the same functions in plain Python. ``jit.py`` replaces them by these when it compiles;
nothing else imports this module, because it imports Numba.
"""

from importlib import import_module
from typing import Any

# As Any: which parts of Numba are typed changes between its releases.
ir: Any = import_module("llvmlite.ir")
arrayobj: Any = import_module("numba.np.arrayobj")
cgutils: Any = import_module("numba.core.cgutils")
types: Any = import_module("numba.core.types")
intrinsic: Any = import_module("numba.extending").intrinsic

FOR_WRITING, KEEP_NEAR, DATA = 1, 3, 1  # arguments of llvm.prefetch
WORD, BYTE = types.uint64, types.uint8


def _pointer(context: Any, builder: Any, kind: Any, array: Any, place: list[Any]) -> Any:
    """Return the address of an element, without a bounds check."""
    struct = context.make_array(kind)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, kind, struct, place, wraparound=False)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, *index: Any) -> Any:
    """Prefetch the cache line of array[index], which must exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = list(cgutils.unpack_tuple(builder, arguments[1]))
        pointer = _pointer(context, builder, signature.args[0], arguments[0], place)
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0"
        )
        hints = (ir.Constant(word, hint) for hint in (FOR_WRITING, KEEP_NEAR, DATA))
        builder.call(function, [builder.bitcast(pointer, byte), *hints])
        return context.get_dummy_value()

    return types.void(array, types.StarArgTuple(index)), generate


@intrinsic  # type: ignore[untyped-decorator]
def zero_line(typing: Any, array: Any, index: Any) -> Any:
    """Zero eight words from array[index] on, with LLVM's ``nontemporal`` hint.

    They must be one aligned cache line; otherwise the hint produces eight slow stores.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], [arguments[1]])
        line = ir.VectorType(ir.IntType(64), 8)
        store = builder.store(ir.Constant(line, None), builder.bitcast(pointer, line.as_pointer()), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(array, index), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_atomically(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to array[index], atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], [arguments[1]])
        builder.atomic_rmw("add", pointer, arguments[2], "monotonic")
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def find_edges(typing: Any, words: Any, index: Any, before: Any, edges: Any, at: Any) -> Any:
    """Find the bits of eight words that differ from the one before them; return which words have any.

    In vectors, which LLVM doesn't make of a loop that also has to return a bit per word.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, lane, line = ir.IntType(64), ir.IntType(32), ir.VectorType(ir.IntType(64), 8)
        source = _pointer(context, builder, signature.args[0], arguments[0], [arguments[1]])
        target = _pointer(context, builder, signature.args[3], arguments[3], [arguments[4]])
        bits = builder.load(builder.bitcast(source, line.as_pointer()), align=8)
        last = builder.lshr(bits, ir.Constant(line, [63] * 8))
        first = builder.insert_element(ir.Constant(line, None), arguments[2], ir.Constant(lane, 0))
        order = ir.Constant(ir.VectorType(lane, 8), [0, *range(8, 15)])  # the first, then all but the last
        carried = builder.shuffle_vector(first, last, order)
        shifted = builder.or_(builder.shl(bits, ir.Constant(line, [1] * 8)), carried)
        differing = builder.xor(bits, shifted)
        builder.store(differing, builder.bitcast(target, line.as_pointer()), align=8)
        found = builder.icmp_unsigned("!=", differing, ir.Constant(line, None))
        return builder.zext(builder.bitcast(found, ir.IntType(8)), one)

    return WORD(words, index, before, edges, at), generate


# ---- views of addresses --------------------------------------------------------------------------


def _view(element: Any, dimensions: int, *, aligned: bool = True) -> Any:
    """Return an intrinsic that makes an array of an address and a shape, without a reference."""

    def at(typing: Any, address: Any, *shape: Any) -> Any:
        kind = types.Array(element, dimensions, "C", aligned=aligned)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            lengths = list(cgutils.unpack_tuple(builder, arguments[1]))
            array = arrayobj.make_array(kind)(context, builder)
            size = context.get_constant(types.intp, element.bitwidth // 8)
            strides = [size]
            for length in reversed(lengths[1:]):
                strides.insert(0, builder.mul(strides[0], length))
            arrayobj.populate_array(
                array,
                data=builder.inttoptr(arguments[0], array.data.type),
                shape=lengths,
                strides=strides,
                itemsize=size,
                meminfo=None,
            )
            return array._getvalue()

        return kind(address, types.StarArgTuple(shape)), generate

    return intrinsic(at)


words_at = _view(WORD, 1)
table_at = _view(WORD, 2)
bytes_at = _view(BYTE, 1)
loose_words_at = _view(WORD, 1, aligned=False)


# ---- calls of libc -------------------------------------------------------------------------------


def _call(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(name, result(*arguments))


lock = _call("pthread_mutex_lock", types.int32, WORD)
unlock = _call("pthread_mutex_unlock", types.int32, WORD)
start_thread = _call("pthread_create", types.int32, WORD, WORD, WORD, WORD)
join_thread = _call("pthread_join", types.int32, WORD, WORD)
this_thread = _call("pthread_self", WORD)
move_bytes = _call("memmove", WORD, WORD, WORD, WORD)
compare_bytes = _call("memcmp", types.int32, WORD, WORD, WORD)
advise = _call("madvise", types.int32, WORD, WORD, types.int32)
protect = _call("mprotect", types.int32, WORD, WORD, types.int32)
seek = _call("lseek", types.int64, types.int32, types.int64, types.int32)
list_resident = _call("mincore", types.int32, WORD, WORD, WORD)


@intrinsic  # type: ignore[untyped-decorator]
def last_error(typing: Any) -> Any:
    """Return errno of the previous call."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(number.as_pointer(), []), "__errno_location"
        )
        return builder.load(builder.call(function, []))

    return types.int32(), generate


NAMES = (
    *("prefetch", "zero_line", "find_edges", "add_atomically"),
    *("words_at", "table_at", "bytes_at", "loose_words_at"),
    *("lock", "unlock", "start_thread", "join_thread", "this_thread"),
    *("move_bytes", "compare_bytes", "advise", "protect", "seek", "list_resident", "last_error"),
)
"""The functions that replace those of ``plain.py``."""
