"""Importing this lets a script, called as `python -m scripts.NAME`, import `notebooks/study`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
