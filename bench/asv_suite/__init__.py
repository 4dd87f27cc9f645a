"""The history of speed: asv reads the same table of cases as ``gmemcore bench``."""
