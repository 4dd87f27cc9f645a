"""``gmemcore schema``: the JSON Schema of run files."""

from typing import Annotated, Literal

from cyclopts import Parameter

from gmemcore.cli.console import reporting, say_json


def schema(
    kind: Annotated[Literal["bench", "backings", "stress", "replay"], Parameter(help="Kind of run.")], /
) -> int:
    """Print the JSON Schema of one line of a run file, generated from the types that write and read it.

    The first line of a file, each other record and the end record match one of its alternatives.
    """
    from gmemcore.results.schema import schema_of

    with reporting("schema"):
        say_json(schema_of(kind), indent=2)
    return 0
