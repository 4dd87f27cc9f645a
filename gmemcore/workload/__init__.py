"""What guests do: behaviours, traces of real ones, what they cost."""
