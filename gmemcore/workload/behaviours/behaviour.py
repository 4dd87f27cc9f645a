"""Behaviour: a row of the table, and how a stream is made of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gmemcore.engine.jit import is_compiled, load
from gmemcore.engine.steps import Step
from gmemcore.workload.behaviours.guest import SeededGuest
from gmemcore.workload.behaviours.parameters import Kind, Parameter, Value, checked, switch
from gmemcore.workload.operations import LOOPS, Operations, as_words
from gmemcore.workload.seeds import Stream
from gmemcore.workload.streams import CHUNK, rechunk

if TYPE_CHECKING:
    from gmemcore.workload.layout import Layout

Generator = Callable[..., Iterator[Operations]]
"""Takes a `SeededGuest` and the parameters of its row, and yields operations in arrays of any length."""

COMMON: Final = (
    switch("accesses", True, "guest and host read and write what they convert"),
    Parameter("share_flags", Kind.COUNT, 0, "content mode of conversions to shared", 0, None, "flags"),
    Parameter("private_flags", Kind.COUNT, 0, "content mode of conversions to private", 0, None, "flags"),
)
"""Parameters that every behaviour has."""

_ACCESSES: Final = np.array(
    [Step.HOST_READ, Step.HOST_WRITE, Step.GUEST_READ, Step.GUEST_WRITE], dtype=np.uint16
)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One behaviour.

    Attributes
    ----------
    name : str
        As it is asked for.
    title : str
        What the guest does, in a line.
    source : str
        Who says that guests do this: a kernel file, a document, a mail.
    generate : callable
        The generator.
    compiled : callable or None
        A generator of the same operations in compiled loops, for fleets.
    parameters : tuple of Parameter
        What its generator takes.
    ends : bool
        Whether it ends by itself; the others go on until `limit` cuts them.
    refusals : mapping of Step to outcomes
        Refusals that belong to it on a VM with private memory. What isn't here and is refused is a surprise.
    hostile : bool
        Whether anything can be refused.
    vm_type : str
        The VM type that it is about, which it runs on by default.
    starts_private : bool
        Whether the guest's memory is private when the stream begins, where the VM has private memory. Every
        command starts it so.
    """

    name: str
    title: str
    source: str
    generate: Generator
    parameters: tuple[Parameter, ...] = ()
    ends: bool = True
    refusals: Mapping[Step, frozenset[str]] = field(default_factory=dict)
    hostile: bool = False
    vm_type: str = "SNP"
    starts_private: bool = True
    compiled: Generator | None = None

    @property
    def all_parameters(self) -> tuple[Parameter, ...]:
        """Its own parameters, then those that every behaviour has."""
        return (*self.parameters, *COMMON)

    def operations(
        self,
        layout: "Layout",
        seed: int | Stream = 0,
        *,
        chunk: int = CHUNK,
        compiled: bool = False,
        **parameters: Any,
    ) -> Iterator[Operations]:
        """Return the stream of a guest with this layout.

        Parameters
        ----------
        layout : Layout
            The guest's memory. It is put in the state that the behaviour starts from by its first operations.
        seed : int or Stream
            u64. Streams of other behaviours with the same seed have nothing to do with this one.
        chunk : int
            Operations of each array; the stream is the same for any.
        compiled : bool
            Whether to use compiled loops where the behaviour has them; the stream is the same.
        **parameters
            Values or texts, by name; others keep their defaults.

        Yields
        ------
        Operations
            Shape (chunk,), the last one shorter. The field `guest` is 0.

        Raises
        ------
        InvalidArgumentError
            EINVAL, at once: a parameter that doesn't exist or a value it doesn't take. With the first array:
            the layout has no room for what the parameters ask for.
        """
        values = self.check(parameters)
        stream = seed if isinstance(seed, Stream) else Stream(seed)
        common = {row.name: values.pop(row.name) for row in COMMON}
        in_loops = compiled and is_compiled()
        generate = self.compiled if in_loops and self.compiled else self.generate
        made = generate(SeededGuest.of(layout, stream.split("behaviour", self.name)), **values)
        return rechunk(_with_common(made, in_loops=in_loops, **common), chunk)

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return a value for every parameter, given as values or texts; EINVAL for one that can't be."""
        return checked(self.name, self.all_parameters, parameters)

    def defaults(self) -> dict[str, Value]:
        """Values of all parameters where none is given."""
        return {row.name: row.default for row in self.all_parameters}


def _with_common(
    stream: Iterator[Operations], accesses: bool, share_flags: int, private_flags: int, *, in_loops: bool
) -> Iterator[Operations]:
    """The same stream, as the common parameters have it."""
    for operations in stream:
        kept = operations if accesses else operations[~np.isin(operations["step"], _ACCESSES)]
        if in_loops and (share_flags or private_flags):
            load(LOOPS).set_flags(as_words(kept), np.uint64(share_flags), np.uint64(private_flags))
        elif share_flags or private_flags:
            converts = kept["step"] == Step.CONVERT
            for attributes, flags in ((0, share_flags), (8, private_flags)):
                if flags:
                    kept["flags"][converts & (kept["attributes"] == attributes)] = flags
        yield kept
