"""Predicted time on other hardware, for every command that counts events: the option, and how it is shown."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gmemcore.units import format_time

if TYPE_CHECKING:
    from gmemcore.workload.cost import CostFile, Prediction

CostOption = Annotated[
    Path | None, Parameter(name="--cost", help="Predict times with this cost file, see gmemcore cost.")
]
"""``--cost FILE``, for the signature of a command."""


def read_cost(path: Path | None) -> "CostFile | None":
    """Return the cost file that was asked for, if one was.

    Raises
    ------
    InvalidArgumentError
        EINVAL: it isn't one.
    """
    if path is None:
        return None
    from gmemcore.workload.cost import load_cost

    return load_cost(path)


def prediction_lines(prediction: "Prediction", title: str) -> Iterator[str]:
    """Yield a prediction as lines: in all, by event with its source, and what isn't priced."""
    yield f"predicted on {title}: {format_time(prediction.seconds)}"
    for name, part in prediction.parts.items():
        share = part.seconds / prediction.seconds if prediction.seconds else 0.0
        yield (
            f"  {format_time(part.seconds):>8} {share:4.0%}  {name} {part.count:,} x {part.ns_each:.4g} ns"
            f"  ({part.source})"
        )
    if prediction.not_priced:
        yield f"  {not_priced(prediction.not_priced)}"


def not_priced(events: Mapping[str, int]) -> str:
    """Return in words what a prediction is short of."""
    return "not priced: " + ", ".join(f"{name} {count:,}" for name, count in events.items())
