"""Fleets of guests: seeded, checked, resumable."""
