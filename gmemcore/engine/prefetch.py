"""``kernels.prefetch`` as the one instruction that it stands for, which Numba has no name for.

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


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, *index: Any) -> Any:
    """Ask for the cache line of array[index], which is not checked and must exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        struct = context.make_array(kind)(context, builder, arguments[0])
        place = list(cgutils.unpack_tuple(builder, arguments[1]))
        pointer = cgutils.get_item_pointer(context, builder, kind, struct, place, wraparound=False)
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0"
        )
        hints = (ir.Constant(word, hint) for hint in (FOR_WRITING, KEEP_NEAR, DATA))
        builder.call(function, [builder.bitcast(pointer, byte), *hints])
        return context.get_dummy_value()

    return types.void(array, types.StarArgTuple(index)), generate
