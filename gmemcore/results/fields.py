"""Field types that the records of all kinds share."""

from typing import Annotated

import msgspec

Name = Annotated[str, msgspec.Meta(max_length=200)]
"""A name, bounded so that a file from elsewhere cannot fill a page with it."""
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(ge=0)]
"""A time, a rate or a ratio."""
