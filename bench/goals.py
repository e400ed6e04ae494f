"""The goals of the project, compared with the results of the sweep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench import compare, roofline
from bench.shapes import GOALS as SHAPES
from bench.shapes import Case, Shape
from bench.store import Row

Cases = dict[Case, list[Row]]


class Goal(NamedTuple):
    """A goal: `reached(cases, peaks)` should be at least `least`, or at most `most`."""

    words: str
    unit: str
    reached: Callable[[Cases, Row | None], float | None]
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    def wanted(self) -> str:
        if self.least is not None:
            return f"at least {self.least:g}{self.unit}"
        return f"at most {self.most:g}{self.unit}"


def over(shape: Shape, *peers: str) -> Callable[[Cases, Row | None], float | None]:
    """Compute how many times as long the fastest of the peers takes."""

    def reached(cases: Cases, peaks: Row | None) -> float | None:
        rows = cases.get(Case(shape, "gradient"), [])
        mine = compare.ours(rows)
        ratios = [compare.times_faster(mine, row) for row in rows if row["method"] in peers]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    return reached


def share(shape: Shape) -> Callable[[Cases, Row | None], float | None]:
    """Compute the share of the machine's peak, in percent."""

    def reached(cases: Cases, peaks: Row | None) -> float | None:
        case = Case(shape, "gradient")
        mine = compare.ours(cases.get(case, []))
        part = None if mine is None else roofline.share(case, mine, peaks)
        return None if part is None else 100 * part

    return reached


def value(shape: Shape, column: str, scale: float) -> Callable[[Cases, Row | None], float | None]:
    """Read a column of our own row."""

    def reached(cases: Cases, peaks: Row | None) -> float | None:
        mine = compare.ours(cases.get(Case(shape, "gradient"), []))
        return None if mine is None or not mine[column] else scale * float(mine[column])

    return reached


TIMES = " times"
*K30, K256, K1024 = SHAPES["cpu"]
ONE_SET, _, LARGE = K30
ON_GPU, MANY_SETS, LARGER, LARGEST = SHAPES["cuda"]
GOALS: dict[str, Sequence[Goal]] = {
    "cpu": (
        *(
            Goal(f"{shape.words}, over naive", TIMES, over(shape, "naive"), least=least)
            for shape, least in zip(SHAPES["cpu"], (25, 25, 60, 5, 3), strict=True)
        ),
        *(
            Goal(
                f"{shape.words}, over the best of pdist and cdist",
                TIMES,
                over(shape, "pdist", "cdist-mm", "cdist-direct"),
                least=10,
            )
            for shape in K30
        ),
        *(
            Goal(f"{shape.words}, over torch.compile", TIMES, over(shape, "compile"), least=4)
            for shape in SHAPES["cpu"]
        ),
        *(
            Goal(f"{shape.words}, over KeOps as shipped", TIMES, over(shape, "keops"), least=25)
            for shape in K30
        ),
        *(
            Goal(f"{shape.words}, of the peak", " %", share(shape), least=65)
            for shape in (ONE_SET, LARGE, K256, K1024)
        ),
        Goal(f"{LARGE.words}, memory", " MiB", value(LARGE, "peak_mib", 1), most=16),
        Goal(f"{LARGE.words}, energy's error", "", value(LARGE, "energy_error", 1), most=1e-6),
        Goal(
            f"{LARGE.words}, gradient's error", "", value(LARGE, "derivative_error", 1), most=2e-6
        ),
    ),
    "cuda": (
        Goal(ON_GPU.words, " µs", value(ON_GPU, "wall_ms", 1e3), most=250),
        Goal(f"{ON_GPU.words}, over naive", TIMES, over(ON_GPU, "naive"), least=25),
        Goal(f"{ON_GPU.words}, over KeOps", TIMES, over(ON_GPU, "keops"), least=8),
        Goal(MANY_SETS.words, " µs", value(MANY_SETS, "wall_ms", 1e3), most=300),
        Goal(LARGER.words, " ms", value(LARGER, "wall_ms", 1), most=22),
        Goal(LARGEST.words, " s", value(LARGEST, "wall_ms", 1e-3), most=2),
    ),
}
