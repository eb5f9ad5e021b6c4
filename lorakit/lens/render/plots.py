"""A report's figures as PNG files."""

from __future__ import annotations

import os
from pathlib import Path

from lorakit._figures import png_bytes
from lorakit._files import write_file
from lorakit._report import Report


def write_plots(report: Report, directory: str | os.PathLike[str]) -> list[Path]:
    """Write a report's figures into `directory` as PNG files, and return their paths.

    An audit has heatmaps.png, spectra.png and energy.png; other reports have one file, named for their type. The
    directory is made if it does not exist, and each file is replaced as a whole.
    Raises: OSError; NotImplementedError for a report without a figure.
    """
    pictures = {name: png_bytes(figure) for name, figure in report.figures().items()}
    return [write_file(Path(directory) / f"{name}.png", picture) for name, picture in pictures.items()]
