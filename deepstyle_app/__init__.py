"""The command: see docs/design.md for which file does what."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent  # that of deepstyle.py, from which all is imported
