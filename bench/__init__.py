"""Energy and gradient beside everything that one would take instead: `python -m bench --help`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
