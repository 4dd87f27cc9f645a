"""Seeing page states: pictures of what a guest's memory looks like. Needs the ``analysis`` extra."""

from gmemcore.analysis.pictures import page_map

__all__ = ["page_map"]
