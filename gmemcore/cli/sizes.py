"""Sizes on the command line: see `gmemcore.units`, which has them for specs too."""

from gmemcore.units import format_size, format_sizes, parse_size, parse_sizes

__all__ = ["format_size", "format_sizes", "parse_size", "parse_sizes"]
