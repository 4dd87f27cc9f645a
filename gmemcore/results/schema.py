"""JSON Schema of each kind of run file, generated from the record types."""

from typing import Any, Final

import msgspec

from gmemcore.errors import InvalidArgumentError
from gmemcore.files.records import EndLine
from gmemcore.results.fields import SCHEMA
from gmemcore.results.kinds import KINDS, Kind

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def schema_of(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of one line of a run file.

    The first line matches the first alternative, each other record the next ones, and the last line the end
    record. Fields without a default are always written; readers must pass over fields that they don't know.

    Parameters
    ----------
    kind : str
        The name of a row of `gmemcore.results.kinds.KINDS`.

    Raises
    ------
    InvalidArgumentError
        EINVAL: an unknown kind.
    """
    row = _row(kind)
    types = [row.first, row.record, *([row.last] if row.last else []), EndLine]
    lines, parts = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    return {
        "$schema": DIALECT,
        "title": f"gmemcore {kind}: one line of a run file, schema {SCHEMA}",
        "anyOf": list(lines),
        "$defs": parts,
    }


def _row(kind: str) -> Kind:
    for row in KINDS:
        if row.name == kind:
            return row
    raise InvalidArgumentError(f"unknown kind {kind!r}; known: {', '.join(row.name for row in KINDS)}")
