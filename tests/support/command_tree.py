"""Every command of the command line, found by walking it, and the arguments of each."""

from gmemcore.cli import command_line


def walk(app, chain=()):
    """Every command: its words, and its App."""
    for name in app:
        if name.startswith("-"):
            continue
        own = (*chain, name)
        if app[name].default_command is not None:
            yield own, app[name]
        yield from walk(app[name], own)


APP = command_line()
TREE = dict(walk(APP))
ARGUMENTS = {words: list(own.assemble_argument_collection()) for words, own in TREE.items()}
