"""Large pictures a band of rows at a time, so that what is computed of one takes little memory beside the picture."""

from collections.abc import Iterator

from PIL import Image

PIXELS = 2**19  # of a band: in float64, with 3 channels and some copies, 50 MB


def bands(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a picture, in order, as slices of about as many pixels as a band has."""
    step = max(1, PIXELS // max(1, columns))
    for top in range(0, rows, step):
        yield slice(top, min(top + step, rows))


def cropped(picture: Image.Image, rows: slice) -> Image.Image:
    """Those rows of the picture."""
    return picture.crop((0, rows.start, picture.width, rows.stop))
