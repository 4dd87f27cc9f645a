"""Instructions that Numba has no name for: what ``kernels.prefetch`` and ``zero_line`` stand for.

Only ``jit.py`` imports this module, when it compiles: Numba comes with it.
"""

from importlib import import_module
from typing import Any

# As Any: which parts of Numba are typed changes between its releases.
ir: Any = import_module("llvmlite.ir")
cgutils: Any = import_module("numba.core.cgutils")
types: Any = import_module("numba.core.types")
intrinsic: Any = import_module("numba.extending").intrinsic

FOR_WRITING, KEEP_NEAR, DATA = 1, 3, 1  # arguments of llvm.prefetch


def _pointer(context: Any, builder: Any, kind: Any, array: Any, place: list[Any]) -> Any:
    """Where an element lies; its place isn't checked."""
    struct = context.make_array(kind)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, kind, struct, place, wraparound=False)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, *index: Any) -> Any:
    """Ask for the cache line of array[index], which must exist."""

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
    """Zero eight words from array[index] on, a cache line by itself, with LLVM's ``nontemporal`` hint.

    Whole and aligned, or the hint makes eight stores of it that are slower than ordinary ones.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], arguments[0], [arguments[1]])
        line = ir.VectorType(ir.IntType(64), 8)
        store = builder.store(ir.Constant(line, None), builder.bitcast(pointer, line.as_pointer()), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(array, index), generate
