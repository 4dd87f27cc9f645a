"""Fields that the records of all kinds share."""

from typing import Annotated, Final

import msgspec

SCHEMA: Final = 2
"""Version of the records that this gmemcore writes and the newest that it reads; files without one are 1.

It is the default of ``schema`` in every first line, so no command can leave it out. New fields with a default
don't change it: readers pass over fields that they don't know.
"""

Name = Annotated[str, msgspec.Meta(max_length=200)]
"""A name, bounded so that a file from elsewhere cannot fill a page with it."""
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(ge=0)]
"""A time, a rate or a ratio."""
