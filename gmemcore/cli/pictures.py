"""Pictures that commands draw: whether they can be, found out before an hour of measuring."""

from pathlib import Path

from gmemcore.errors import UnsupportedOperationError


def require_picture(path: Path) -> None:
    """Make sure that a picture can be drawn and written there.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: no matplotlib, or no form of picture by that name.
    OSError
        The file can't be written.
    """
    try:
        import matplotlib
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise UnsupportedOperationError(
            "a picture needs matplotlib; pip install 'gmemcore[analysis]' would bring it"
        ) from None
    matplotlib.use("Agg")
    forms = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in forms:
        raise UnsupportedOperationError(f"{path}: no picture's name; one that ends in .png would be accepted")
    path.touch()
