"""Energy and gradient beside everything that one would take instead: `python -m bench --help`.

`cases` has the studies and `peers` what stands beside ours, `measure` how it is measured, `report`
what becomes of the results. `demo` and `training` train networks.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
