"""``python -m gmemcore``: the command line."""

from gmemcore.cli import main

main()
