"""Results: what run files hold, and the statistics of their figures.

`environment` describes the machine and the program. `bench`, `backings`, `stress` and `replay` are the
record types of each kind of run, which both their writers and their readers use. `kinds` lists them, and
`schema` turns them into JSON Schema. `statistics` has medians, intervals and ratios.
"""
