"""``gmemcore`` and ``python -m gmemcore``: the command line as a process."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly from the first moment."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until commands are loaded
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    from gmemcore.cli import main as run

    run()


if __name__ == "__main__":
    main()
