"""Records of ``gmemcore replay``: one header, one record per revision and VM type."""

from typing import Any

import msgspec

from gmemcore.results.fields import SCHEMA, Count, Name, Positive


class ReplayTrace(msgspec.Struct, frozen=True):
    """What was replayed."""

    name: str
    source: str
    operations: Count
    memory: Count


class ReplayFirst(msgspec.Struct, frozen=True):
    """First line of a replay; ``replay`` has its options."""

    trace: ReplayTrace
    replay: dict[str, Any]
    environment: dict[str, Any] = {}
    schema: Count = SCHEMA


class Reason(msgspec.Struct, frozen=True):
    """Operations that were refused for one reason."""

    step: Name
    outcome: Name
    operations: Count


class Refusal(msgspec.Struct, frozen=True):
    """One operation that was refused."""

    operation: Count
    step: Name
    outcome: Name
    gpa: Count
    size: Count
    attributes: Count
    flags: Count


class Prediction(msgspec.Struct, frozen=True):
    """Time of the counted events, by the figures of a cost file."""

    seconds: Positive
    by_event: dict[Name, Positive]
    not_priced: dict[Name, Count]


class Replay(msgspec.Struct, frozen=True):
    """One trace under one revision, on one VM type."""

    abi: Name
    vm_type: Name
    firmware: Name
    operations: Count
    refused: Count
    conversions: Count
    reasons: list[Reason]
    first_refusals: list[Refusal]
    counters: dict[Name, Count]
    seconds: Positive
    peak_memory: Count
    launch_digest: Name | None
    page_size: Count = 4096
    peak_struct_pages: Count = 0
    file_memory: Count | None = None
    predicted: Prediction | None = None

    @property
    def conversions_refused(self) -> int:
        """How many of its conversions were refused."""
        return sum(reason.operations for reason in self.reasons if reason.step == "CONVERT")

    @property
    def refused_share(self) -> float:
        """Share of its conversions that was refused, 0 to 1; 0 without conversions."""
        refused, of = self.conversions_refused, max(self.conversions, 1)
        return 1.0 if refused >= of else refused / of
