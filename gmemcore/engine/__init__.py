"""The engine: page state, bytes and conversion. Nothing else writes page state or bytes."""

from gmemcore.engine.counters import Counters
from gmemcore.engine.results import BatchResult, ConversionResult
from gmemcore.engine.warm import warmup

__all__ = ["BatchResult", "ConversionResult", "Counters", "warmup"]
