"""Pictures that commands draw: the file is checked before any work, and put in place whole."""

from io import BytesIO
from pathlib import Path
from typing import Any, Final
from warnings import catch_warnings, simplefilter

from gmemcore.errors import InputError, MissingExtraError
from gmemcore.files.writing import check_output, replace_file

_DOTS_PER_INCH: Final = 150


class PictureFile:
    """A file for a picture: its form is the ending of its name, or PNG without one.

    Parameters
    ----------
    path : Path
        Where.
    force : bool
        Whether it may replace a file.

    Raises
    ------
    MissingExtraError
        matplotlib isn't installed.
    InputError, OSError
        No form of picture has this ending; or as `gmemcore.files.writing.check_output`.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        try:
            import matplotlib
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            raise MissingExtraError("a picture needs matplotlib; pip install 'gmemcore[analysis]'") from None
        matplotlib.use("Agg")
        forms = FigureCanvasBase.get_supported_filetypes()
        self._path = path
        self._form = path.suffix.removeprefix(".").lower() or "png"
        if self._form not in forms:
            known = ", ".join(f".{form}" for form in sorted(forms))
            raise InputError(f"{path}: a picture's name must end in one of {known}, or have no ending")
        check_output(path, force=force)

    def write(self, figure: Any) -> int:
        """Write a matplotlib figure, and return the size of the file in bytes.

        Raises
        ------
        OSError
            It can't be written.
        """
        drawn = BytesIO()
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # characters that the font doesn't have are drawn as boxes
            figure.savefig(drawn, format=self._form, dpi=_DOTS_PER_INCH)
        replace_file(self._path, [drawn.getbuffer()])
        return drawn.tell()


def require_picture(path: Path, *, force: bool = False) -> PictureFile:
    """Make sure, before any work, that a picture can be drawn and written; see `PictureFile`."""
    return PictureFile(path, force=force)
