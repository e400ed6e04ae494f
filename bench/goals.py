"""The numbers that the project set itself, held against the sweep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench import compare, roofline
from bench.shapes import Case, Shape
from bench.store import Row

Cases = dict[Case, list[Row]]


class Goal(NamedTuple):
    """`reached(cases, peaks)` is to be at least `least`, or at most `most`."""

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


def over(shape: str, *peers: str) -> Callable[[Cases, Row | None], float | None]:
    """How many times as long the fastest of the peers takes."""

    def reached(cases: Cases, peaks: Row | None) -> float | None:
        rows = cases.get(Case(Shape.parse(shape), "gradient"), [])
        mine = compare.ours(rows)
        ratios = [compare.times_faster(mine, row) for row in rows if row["method"] in peers]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    return reached


def share(shape: str) -> Callable[[Cases, Row | None], float | None]:
    """Percent of the machine's peak."""

    def reached(cases: Cases, peaks: Row | None) -> float | None:
        case = Case(Shape.parse(shape), "gradient")
        mine = compare.ours(cases.get(case, []))
        part = None if mine is None else roofline.share(case, mine, peaks)
        return None if part is None else 100 * part

    return reached


def value(shape: str, column: str, scale: float) -> Callable[[Cases, Row | None], float | None]:
    """A column of our own row."""

    def reached(cases: Cases, peaks: Row | None) -> float | None:
        mine = compare.ours(cases.get(Case(Shape.parse(shape), "gradient"), []))
        return None if mine is None or not mine[column] else scale * float(mine[column])

    return reached


TIMES = " times"
GOALS: dict[str, Sequence[Goal]] = {
    "cpu": (
        Goal("4,096 × 30, over naive", TIMES, over("1x4096x30", "naive"), least=25),
        Goal("16 sets of 2,048 × 30, over naive", TIMES, over("16x2048x30", "naive"), least=25),
        Goal("16,384 × 30, over naive", TIMES, over("1x16384x30", "naive"), least=60),
        Goal("4,096 × 256, over naive", TIMES, over("1x4096x256", "naive"), least=5),
        Goal("4,096 × 1,024, over naive", TIMES, over("1x4096x1024", "naive"), least=3),
        Goal(
            "4,096 × 30, over the best of pdist and cdist",
            TIMES,
            over("1x4096x30", "pdist", "cdist-mm", "cdist-direct"),
            least=10,
        ),
        Goal("4,096 × 30, over torch.compile", TIMES, over("1x4096x30", "compile"), least=4),
        Goal("4,096 × 30, over KeOps as shipped", TIMES, over("1x4096x30", "keops"), least=25),
        Goal("4,096 × 30, of the peak", " %", share("1x4096x30"), least=65),
        Goal("16,384 × 30, of the peak", " %", share("1x16384x30"), least=65),
        Goal("16,384 × 30, memory", " MiB", value("1x16384x30", "peak_mib", 1), most=16),
        Goal("16,384 × 30, energy's error", "", value("1x16384x30", "energy_error", 1), most=1e-6),
        Goal(
            "16,384 × 30, gradient's error",
            "",
            value("1x16384x30", "derivative_error", 1),
            most=2e-6,
        ),
    ),
    "cuda": (
        Goal("16,384 × 32", " µs", value("1x16384x32", "wall_ms", 1e3), most=250),
        Goal("16,384 × 32, over naive", TIMES, over("1x16384x32", "naive"), least=25),
        Goal("16,384 × 32, over KeOps", TIMES, over("1x16384x32", "keops"), least=8),
        Goal("20 sets of 4,096 × 32", " µs", value("20x4096x32", "wall_ms", 1e3), most=300),
        Goal("131,072 × 64", " ms", value("1x131072x64", "wall_ms", 1), most=22),
        Goal("1,000,000 × 64", " s", value("1x1000000x64", "wall_ms", 1e-3), most=2),
    ),
}
