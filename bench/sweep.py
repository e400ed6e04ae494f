"""`python -m bench sweep`: time, memory and error of every method at every shape."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import compare, machine
from bench.contest import FIGURES, Entry, OutOfTime, hold
from bench.methods import METHODS, run
from bench.options import Options
from bench.screen import Steps
from bench.shapes import Case
from bench.store import Table
from bench.truth import Errors, Truth, errors, points, truth
from bench.worker import Call, Job, load_result

TABLE = Table(
    "sweep",
    key=(*machine.STAMP, "sets", "rows", "dim", "mode", "method"),
    values=("date", "version", *FIGURES, "compiled", "energy_error", "derivative_error"),
)


def sweep(options: Options, cases: Sequence[Case]) -> int:
    """Measure all cases, store each once it is complete, and return how many are left over."""
    stamp = machine.stamp(options.device, options.threads)
    if options.resume:
        cases = [case for case in cases if TABLE.lacks(options.out, _keys(options, case, stamp))]
    options.console.print(
        f"{len(cases)} cases, {stamp['machine']}, threads: {options.threads}, "
        f"PyTorch {stamp['torch']}, comhe_ext {stamp['comhe_ext']} at {stamp['commit'] or '?'}"
    )
    with TemporaryDirectory() as caches, Steps(options.console, len(cases)) as steps:
        runner = _Runner(options, Path(caches), steps)
        for index, case in enumerate(cases):
            try:
                rows = runner.measure(case)
            except OutOfTime:
                return len(cases) - index
            TABLE.upsert(options.out, [stamp | row for row in rows])
            steps.advance(_summary(options, case))
    return 0


def _keys(options: Options, case: Case, stamp: dict[str, object]) -> list[dict[str, object]]:
    return [stamp | _names(case, method) for method in _taking_part(options, case)]


def _taking_part(options: Options, case: Case) -> list[str]:
    return [
        name
        for name in options.methods
        if case.mode in METHODS[name].modes
        and (case.shape.sets > 1 or not METHODS[name].only_batches)
    ]


def _names(case: Case, method: str) -> dict[str, object]:
    return {**case.shape._asdict(), "mode": case.mode, "method": method}


def _summary(options: Options, case: Case) -> str:
    setting = machine.name(options.device), options.device, str(options.threads)
    rows = compare.by_case(compare.by_setting(TABLE.newest(options.out))[setting])[case]
    mine = compare.ours(rows)
    words = f"{case.shape} {case.mode}: "
    if mine is None:
        return words + f"{sum(bool(row['wall_ms']) for row in rows)} of {len(rows)} timed"
    words += f"comhe_ext {compare.milliseconds(mine):.3g} ms"
    if (nearest := compare.nearest(rows)) is not None:
        row, ratio = nearest
        words += f", nearest {METHODS[row['method']].label}: {ratio:.3g} times as long"
    return words


def make_call(method: str, case: Case, device: str) -> Call:
    """Load the method and make the points, in the process that measures."""
    rows = points(case.shape, device)
    energies = METHODS[method].load()
    return lambda: run(energies, rows, case.mode)


class _Runner:
    """Measures case after case, and estimates from their times what the next will take."""

    def __init__(self, options: Options, caches: Path, steps: Steps) -> None:
        self.options, self.caches, self.steps = options, caches, steps
        self.seconds: dict[tuple[str, str, int], dict[float, float]] = {}  # by number of pairs

    def measure(self, case: Case) -> list[dict[str, object]]:
        rows: dict[str, dict[str, object]] = {}
        entries: dict[str, Entry] = {}
        found: dict[str, Errors] = {}
        compiled: dict[str, bool] = {}
        names = _taking_part(self.options, case)
        refused = {name: reason for name in names if (reason := self._refusal(name, case))}
        if len(refused) < len(names):
            self.steps.say(f"{case.shape} {case.mode}: float64")
            right = truth(case.shape, case.mode, self.options.device)
        for name in names:
            rows[name] = _names(case, name) | {"version": METHODS[name].version()}
            if name in refused:
                rows[name] |= dict(zip(("status", "note"), refused[name], strict=True))
                continue
            cache = self.caches / name
            cache.mkdir(exist_ok=True)
            job = Job(
                partial(make_call, name, case, self.options.device),
                self.options.device,
                self.options.threads,
                METHODS[name].environment | cache_environment(cache),
            )
            check = partial(_check, name, right, cache, _files(cache), found, compiled)
            entries[name] = Entry(job, check, METHODS[name].compiles)
        outcomes = hold(
            entries, self.options.rules, lambda words: self.steps.say(f"{case.shape} {words}")
        )
        for name, outcome in outcomes.items():
            rows[name] |= outcome.figures() | {"compiled": compiled.get(name)}
            if name in found:
                rows[name]["energy_error"] = found[name].energy
                rows[name]["derivative_error"] = found[name].derivative
            known = self.seconds.setdefault((name, case.mode, case.shape.dim), {})
            if outcome.wall:
                known[case.shape.pairs] = min(outcome.wall)
            elif outcome.status == "timeout":
                known[case.shape.pairs] = self.options.rules.limit
        return list(rows.values())

    def _refusal(self, name: str, case: Case) -> tuple[str, str] | None:
        """Give the status and note of what need not be tried, or None."""
        method, device = METHODS[name], self.options.device
        if (reason := method.unavailable(device)) is not None:
            return "unavailable", reason
        needed = method.needed_bytes(case.shape.sets, case.shape.rows)
        if needed > (free := machine.free_memory(device)):
            return "out of memory", f"needs about {gib(needed)}, {gib(free)} free"
        known = self.seconds.get((name, case.mode, case.shape.dim), {})
        for pairs, seconds in sorted(known.items(), reverse=True):
            # estimated from a smaller case, unless that is too small for its fixed costs
            if pairs < case.shape.pairs and seconds > 0.1:
                expected = seconds * case.shape.pairs / pairs
                if expected > self.options.rules.limit:
                    limit = self.options.rules.limit
                    return "timeout", f"about {expected:.0f} s expected, the limit is {limit:.0f} s"
                break
        return None


def _check(
    name: str,
    right: Truth,
    cache: Path,
    files: int,
    found: dict[str, Errors],
    compiled: dict[str, bool],
    result: Path,
) -> str | None:
    """Say what is wrong with the result of the first call, or None."""
    compiled[name] = _files(cache) > files
    energies, derivatives = load_result(result)
    if not METHODS[name].same_energy:
        finite = all(
            bool(part.isfinite().all()) for part in (energies, derivatives) if part is not None
        )
        return None if finite else "not finite"
    found[name] = errors(right, energies, derivatives)
    return found[name].verdict()


def cache_environment(folder: Path) -> dict[str, str]:
    """Give compilers an empty cache, so that the first call takes as long as a user's."""
    names = ("KEOPS_CACHE_FOLDER", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return dict.fromkeys(names, str(folder))


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
