"""Outcomes: what came of an operation, as numbers for arrays and files."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import ERRNO_NUMBERS

OUTCOME: Final = np.dtype([("code", "<u2"), ("error_gpa", "<u8")])
"""What came of one operation: a code of `CODES`, and where it stopped (bytes; 0 if it did not)."""

Outcomes = NDArray[Any]
"""A structured array of `OUTCOME`, shape (n,)."""

_EXITS: Final = ("SIGBUS", "MEMORY_FAULT", "MMIO", "NOT_VALIDATED", "ENOTSUP")
CODES: Final[Mapping[str, int]] = MappingProxyType(
    {"OK": 0, **ERRNO_NUMBERS, **{name: 1000 + i for i, name in enumerate(_EXITS)}}
)
"""Name of an outcome -> its number: the errno's own, from 1000 on for what has none of its own."""

NAMES: Final[Mapping[int, str]] = MappingProxyType({code: name for name, code in CODES.items()})
"""Number of an outcome -> its name."""
