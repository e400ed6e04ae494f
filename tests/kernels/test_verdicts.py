"""A Triton kernel serves backend=None once it has been found right: the mechanism, without a GPU.

The launcher is a stub, plain torch on CPU tensors, that may be told to be wrong; the last tests run
the real kernels in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
import threading
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import comhe_ext
from comhe_ext import Gaussian, backends, check, verdicts
from comhe_ext.kernels import portable
from comhe_ext.kernels.sweep import DifferenceRequest, Projected
from comhe_ext.testing import exact_energy_and_gradient, random_rows, relative_error

triton = pytest.importorskip("triton")
from comhe_ext.kernels import gpu  # noqa: E402
from comhe_ext.kernels.gpu import variant  # noqa: E402

CPU = torch.device("cpu")


class Stub:
    """Backend "triton" on CPU tensors."""

    def __init__(self):
        self.calls = Counter()
        self.examined = []
        self.spoil = lambda result: result

    def sweep(self, request):
        self.calls["sweep"] += 1
        return self._compute(request)

    def angle_difference(self, *arguments):
        self.calls["angle_difference"] += 1
        return portable.angle_difference(*arguments)

    def sweep_as(self, which, request):
        self.examined.append(which)
        if isinstance(request, DifferenceRequest):
            return self.spoil(portable.angle_difference(*vars(request).values()))
        return self.spoil(self._compute(request))

    def _compute(self, request):
        source = request.source
        if isinstance(source, Projected):
            parts = [
                w.float() if m is None else (w.float() @ m.mT).flatten(0, 1)
                for w, m in zip(*source, strict=True)
            ]
            request = replace(request, source=torch.cat(parts))
        return portable.sweep(request)

    @property
    def checks(self):
        """Variants examined, each by two runs."""
        return len(self.examined) // 2


@pytest.fixture
def restart(monkeypatch, tmp_path):
    """What begins a new process; the first one finds an empty cache."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))

    def forget():
        monkeypatch.setattr(verdicts.Verdicts, "_all", {})

    forget()
    return forget


@pytest.fixture
def stub(monkeypatch, restart):
    """Triton as the best backend for CPU tensors, on a GPU of the allow-list."""
    stub = Stub()
    monkeypatch.delenv("COMHE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_BEST_ON", {"cpu": "triton"})
    monkeypatch.setattr(backends, "_DEVICE_OF", {"triton": "cpu", "cpu": "cpu"})
    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    monkeypatch.setattr(gpu, "sweep", stub.sweep)
    monkeypatch.setattr(gpu, "angle_difference", stub.angle_difference)
    monkeypatch.setattr(variant, "sweep_as", stub.sweep_as)
    monkeypatch.setattr(variant, "target_of", lambda device: "sm_90")
    return stub


def run(k=12, n=40, backend=None, **options):
    """Energy and gradient by the public function, found to be right."""
    weight = random_rows(n, k).requires_grad_()
    energy = comhe_ext.hyperspherical_energy(weight, backend=backend, **options)
    (gradient,) = torch.autograd.grad(energy, weight)
    expected, expected_gradient = exact_energy_and_gradient(weight.detach(), **options)
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, expected_gradient) <= 1e-5


# --- one check a variant --------------------------------------------------------------------------


def test_what_passes_serves_and_is_checked_once(stub):
    for _ in range(3):
        run()
    assert stub.checks == 1
    assert stub.calls["sweep"] == 3
    (verdict,) = verdicts.Verdicts.of(CPU).found.values()
    assert verdict.passed


def test_the_gradient_of_columns_alone_needs_both_kernels(stub):
    rows, columns = random_rows(40, 12), random_rows(30, 12, seed=1).requires_grad_()
    comhe_ext.pair_energy(rows, columns).backward()
    assert [variant.gradient for variant in stub.examined[::2]] == [False, True]
    rows.requires_grad_()
    comhe_ext.pair_energy(rows, columns.detach()).backward()
    assert stub.checks == 2


def test_variants_are_checked_apart(stub):
    run(12)
    for number, options in enumerate((dict(k=20), dict(half_space=True), dict(angular=True)), 2):
        run(**options)
        assert stub.checks == number
    with torch.no_grad():  # the energy alone
        comhe_ext.hyperspherical_energy(random_rows(40, 12))
    comhe_ext.compressive_energy(random_rows(40, 30), random_rows(24, 30).view(2, 12, 30))
    comhe_ext.hyperspherical_energy(random_rows(40, 12).bfloat16())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        comhe_ext.hyperspherical_energy(random_rows(40, 12))
    finally:
        torch.set_float32_matmul_precision(before)
    assert stub.checks == 8
    assert len(set(stub.examined)) == 8
    assert len(set(map(str, stub.examined))) == 8


def test_what_runs_the_same_code_shares_a_check(stub):
    run(n=40)
    run(n=55)
    comhe_ext.hyperspherical_energy(random_rows(90, 12).view(3, 30, 12).requires_grad_())
    run(min_distance=0.01)
    run(eps=1e-3)
    assert stub.checks == 1
    run(s=3.0)
    run(s=2.5)
    assert stub.checks == 2
    for tau in (2.0, 3.0, 0.9, 0.3):
        comhe_ext.pair_energy(random_rows(40, 12).requires_grad_(), pair=Gaussian(tau))
    assert stub.checks == 4


def test_differences_of_angles_are_checked_too(stub):
    weight, projection = random_rows(40, 30), random_rows(24, 30, seed=1).view(2, 12, 30)

    def compare(kind="cosine", weight=weight, projection=projection):
        return comhe_ext.angle_preserving_loss(weight, projection, kind=kind)

    expected = compare(weight=weight.double(), projection=projection.double())  # by torch
    assert stub.checks == 0
    asked = projection.clone().requires_grad_()
    for _ in range(2):
        assert relative_error(compare(projection=asked), expected) <= 1e-6
    assert stub.checks == 1
    assert stub.calls["angle_difference"] == 2
    compare("angle", projection=asked)
    compare(weight=weight.clone().requires_grad_(), projection=asked)
    compare(weight=weight[:, :20], projection=asked[..., :20])
    assert stub.checks == 4
    assert len(set(map(str, stub.examined))) == 4
    assert all(x.passed for x in verdicts.Verdicts.of(CPU).found.values())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_wrong_difference_of_angles_is_replaced(stub, number):
    def spoil(result):
        result = list(result)
        result[number] = result[number] * (1 + 1e-4)
        return result

    stub.spoil = spoil
    weight = random_rows(40, 30).requires_grad_()
    projection = random_rows(12, 30, seed=1).unsqueeze(0).requires_grad_()
    with pytest.warns(UserWarning, match="failed its check .* error of 1.0e-04"):
        comhe_ext.angle_preserving_loss(weight, projection)
    comhe_ext.angle_preserving_loss(weight, projection)
    assert stub.checks == 1
    assert stub.calls["angle_difference"] == 0


def test_nothing_is_checked_where_no_kernel_runs(stub):
    assert comhe_ext.hyperspherical_energy(torch.ones(0, 12)) == 0
    assert stub.checks == 0


def test_tracing_never_sees_the_choice(stub):
    weight = random_rows(40, 12)
    with FakeTensorMode() as mode:
        comhe_ext.hyperspherical_energy(mode.from_tensor(weight))
    assert stub.checks == 0

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(comhe_ext.hyperspherical_energy, fullgraph=True, backend=keep)
    energy = compiled(weight)
    assert relative_error(energy, exact_energy_and_gradient(weight)[0]) <= 1e-6
    assert stub.checks == 1
    assert stub.calls["sweep"] == 1
    assert "auto" in graphs[0].code
    assert "triton" not in graphs[0].code


def test_threads_wait_for_one_check(stub):
    barrier = threading.Barrier(8)
    errors = []

    def one():
        try:
            barrier.wait()
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert stub.checks == 1
    assert stub.calls["sweep"] == 8


# --- what fails -----------------------------------------------------------------------------------


def wrong_energy(result):
    return result._replace(energy=result.energy * (1 + 3e-6))


def wrong_row(result):
    """A row whose near twin has a force a thousand times larger."""
    gradient = result.gradient.clone()
    gradient[5] *= 1.01
    return result._replace(gradient=gradient)


def not_a_number(result):
    gradient = result.gradient.clone()
    gradient[-1, -1] = torch.nan
    return result._replace(gradient=gradient)


def random_bits(result):
    flips = torch.rand_like(result.gradient) < 0.5
    return result._replace(gradient=torch.where(flips, result.gradient * (1 + 2**-23), 1.0))


def crash(result):
    raise RuntimeError("PassManager::run failed")


SPOILED = [
    (wrong_energy, "in the energy"),
    (wrong_row, "in the gradient of other rows of 165"),
    (not_a_number, "error of nan in the gradient of near rows of 70"),
    (random_bits, "two runs differ"),
    (crash, "RuntimeError: PassManager::run failed"),
]


@pytest.mark.parametrize(("spoil", "detail"), SPOILED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_fails_is_replaced_with_one_warning(stub, restart, spoil, detail):
    stub.spoil = spoil
    with pytest.warns(UserWarning, match="comhe-ext check") as caught:
        run()
    assert len(caught) == 1
    assert detail in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
        run(n=50)
    examined = len(stub.examined)
    # another process knows, and says it again; of an exception it knows nothing
    restart()
    with pytest.warns(UserWarning, match="failed its check"):
        run()
    assert (len(stub.examined) > examined) == (spoil is crash)
    assert stub.calls["sweep"] == 0


def test_a_failure_is_one_of_its_variant_alone(stub):
    stub.spoil = crash
    with pytest.warns(UserWarning, match="failed its check"):
        run(12)
    stub.spoil = lambda result: result
    run(20)
    assert stub.calls["sweep"] == 1


def test_too_little_memory_says_nothing_about_the_kernel(stub):
    def full(result):
        raise torch.OutOfMemoryError("no memory")

    stub.spoil = full
    with pytest.raises(torch.OutOfMemoryError):
        run()
    stub.spoil = lambda result: result
    run()
    assert stub.calls["sweep"] == 1


def test_a_capture_takes_the_verdict_that_exists(stub, monkeypatch):
    monkeypatch.setattr(verdicts, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="call once before the capture"):
        run()
    assert stub.checks == 0
    monkeypatch.setattr(verdicts, "_capturing", lambda device: False)
    run()
    monkeypatch.setattr(verdicts, "_capturing", lambda device: True)
    run()
    assert stub.checks == 1
    assert stub.calls["sweep"] == 2


# --- what is kept ---------------------------------------------------------------------------------


def test_another_process_reads_the_verdict(stub, restart):
    run()
    restart()
    run()
    assert stub.checks == 1
    assert stub.calls["sweep"] == 2


def test_processes_add_to_one_file(stub, restart):
    run(12)
    first = verdicts.Verdicts.of(CPU)
    restart()
    run(20)
    run(30)
    restart()
    first.keep("another", verdicts.Verdict(True, ""))
    assert len(verdicts.Verdicts.of(CPU).kept) == 4


@pytest.mark.parametrize("what", ["sources", "comhe_ext", "torch", "triton", "driver", "device"])
def test_a_verdict_of_another_version_is_ignored(stub, restart, monkeypatch, what):
    run()
    before = verdicts.environment
    monkeypatch.setattr(verdicts, "environment", lambda d: {**before(d), what: "another"})
    restart()
    run()
    assert stub.checks == 2
    # even if it lies in the same place
    changed = verdicts.Verdicts.of(CPU).file
    content = json.loads(changed.path.read_text())
    changed.path.write_text(json.dumps({**content, "environment": before(CPU)}))
    restart()
    run()
    assert stub.checks == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"environment": {}}', "\0\xff"])
def test_a_spoiled_file_is_ignored(stub, restart, content):
    run()
    path = verdicts.Verdicts.of(CPU).file.path
    path.write_text(content)
    restart()
    run()
    assert stub.checks == 2
    restart()
    run()
    assert stub.checks == 2


def test_a_folder_that_takes_no_file_does_no_harm(stub, restart, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    run()
    run()
    assert stub.checks == 1
    assert stub.calls["sweep"] == 2


def test_a_full_disk_leaves_nothing_half_written(stub, restart, monkeypatch):
    run(12)

    def refuse(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        run(20)
    folder = verdicts.Verdicts.of(CPU).file.path.parent
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    restart()
    run(12)
    assert stub.checks == 2


# --- who decides ----------------------------------------------------------------------------------


def test_the_environment_overrides(stub, monkeypatch):
    stub.spoil = crash
    monkeypatch.setenv("COMHE_BACKEND", "triton")
    run()
    assert stub.checks == 0
    assert stub.calls["sweep"] == 1
    monkeypatch.setenv("COMHE_BACKEND", "torch")
    run()
    assert stub.checks == 0
    assert stub.calls["sweep"] == 1
    # not for what it cannot take
    monkeypatch.setenv("COMHE_BACKEND", "triton")
    comhe_ext.hyperspherical_energy(random_rows(5, 3, dtype=torch.float64))
    assert stub.calls["sweep"] == 1
    monkeypatch.setenv("COMHE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="COMHE_BACKEND must be one of triton, cpu, torch"):
        run()


def test_the_environment_names_what_is_missing(stub, monkeypatch):
    monkeypatch.setenv("COMHE_BACKEND", "triton")
    monkeypatch.setattr(gpu, "unavailable", lambda: "Triton is not installed: install it")
    with pytest.raises(RuntimeError, match="COMHE_BACKEND=triton, but Triton is not installed"):
        run()
    monkeypatch.delenv("COMHE_BACKEND")
    run()


def test_the_environment_is_for_those_who_do_not_ask(monkeypatch):
    monkeypatch.setenv("COMHE_BACKEND", "torch")
    if backends.unavailable("cpu") is None:
        weight = random_rows(30, 20)
        compiled = comhe_ext.hyperspherical_energy(weight, backend="cpu")
        assert backends.choose(None, comhe_ext.Riesz(), CPU, torch.float32) == "torch"
        monkeypatch.setenv("COMHE_BACKEND", "cpu")
        assert torch.equal(comhe_ext.hyperspherical_energy(weight), compiled)
    # a processor has no Triton: there it means nothing
    monkeypatch.setenv("COMHE_BACKEND", "triton")
    run()


def test_a_backend_that_is_asked_for_is_not_checked(stub):
    stub.spoil = crash
    run(backend="triton")
    run(backend="torch")
    assert stub.checks == 0
    assert stub.calls["sweep"] == 1


def test_other_targets_serve_when_asked_for_or_once_checked(stub, restart, monkeypatch):
    monkeypatch.setattr(variant, "target_of", lambda device: "gfx1201")
    run()
    assert stub.checks == 0
    assert stub.calls["sweep"] == 0
    monkeypatch.setattr(variant, "target_of", lambda device: "sm_100")
    restart()
    run()
    assert stub.checks == 0
    assert stub.calls["sweep"] == 0
    verdicts.Verdicts.of(CPU).keep(verdicts.ALL, verdicts.Verdict(False, ""))
    run()
    assert stub.calls["sweep"] == 0
    verdicts.Verdicts.of(CPU).keep(verdicts.ALL, verdicts.Verdict(True, ""))
    restart()
    run()
    assert stub.checks == 1
    assert stub.calls["sweep"] == 1


# --- the sample -----------------------------------------------------------------------------------


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 12, 40, 128, 200])
def test_samples_are_exact_in_any_arithmetic(k, dtype, projected):
    *_, (_, request) = check.requests(CPU)
    which = variant.variant_of(request)
    assert which is not None
    which = replace(which, k=k, dtype=dtype, projected=projected)
    request = verdicts.sample_request(which, CPU)
    assert list(request.sizes) == [2 * which.tiles.block_m + 37, 70]
    exact = verdicts.exact_points(request)
    assert exact.shape == (sum(request.sizes), k)
    if projected:
        for w, m in zip(*request.source, strict=True):
            rounded = w.bfloat16().float() @ m.bfloat16().float().mT
            assert torch.equal(rounded.double(), w.double() @ m.double().mT)
    else:
        assert torch.equal(request.source.double(), exact)
    if k > 1:
        for rows in exact.split(list(request.sizes)):
            unit = torch.nn.functional.normalize(rows)
            apart = (unit[-1] - unit[0]).norm(), (unit[-2] + unit[1]).norm()
            assert all(0 < distance < 0.1 for distance in apart)


def test_a_sample_leaves_the_random_numbers_alone(stub):
    before = torch.get_rng_state()
    run()
    assert stub.checks == 1
    assert torch.equal(torch.get_rng_state(), before)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("restart")
def test_a_gpu_serves_what_it_has_checked():
    weight = random_rows(300, 40, device="cuda")
    expected, expected_gradient = exact_energy_and_gradient(weight, half_space=True)
    weight.requires_grad_()

    def call():
        energy = comhe_ext.hyperspherical_energy(weight, half_space=True)
        return energy, *torch.autograd.grad(energy, weight)

    capture = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="before the capture"), capture:
        call()
    torch.cuda.synchronize()
    energy, gradient = call()
    found = verdicts.Verdicts.of(weight.device)
    assert found.serves
    assert all(verdict.passed for verdict in found.found.values()), found.found
    assert relative_error(energy, expected) <= 1e-6
    assert relative_error(gradient, expected_gradient) <= 2e-6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert torch.equal(captured[0], energy)
    assert torch.equal(captured[1], gradient)


# --- the command ----------------------------------------------------------------------------------


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "comhe_ext", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_check_runs_real_kernels_and_keeps_the_verdicts(tmp_path):
    arguments = ("check", "--quick", "--device", "cpu")
    environment = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    result = command(*arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed, 0 failed" in result.stdout
    assert "interpreter" in result.stdout
    (file,) = (tmp_path / "comhe_ext").iterdir()
    assert str(file) in result.stdout
    kept = json.loads(file.read_text())["verdicts"]
    assert len(kept) == 2
    assert all(passed for passed, _ in kept.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to check")
def test_check_says_that_there_is_nothing_to_check():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "comhe_ext", "check"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "nothing to check: no CUDA or ROCm device is available" in result.stdout


@pytest.mark.parametrize(
    ("end", "message"),
    [("os.abort()", "its process ended with -6"), ("time.sleep(600)", "hangs")],
    ids=["dies", "hangs"],
)
def test_a_check_that_dies_or_hangs_is_reported(end, message, restart, capsys):
    environment = verdicts.environment(CPU)
    program = f"""
import json, os, time
print(json.dumps(dict(environment={environment!r})), flush=True)
print(json.dumps(dict(starts="first")), flush=True)
print(json.dumps(dict(ends="first", passed=True, detail="errors: none")), flush=True)
print(json.dumps(dict(starts="second")), flush=True)
{end}
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        passed = check._report(process, patience=5.0)
        process.kill()
    assert not passed
    report = capsys.readouterr().out
    assert "ok     first: errors: none" in report
    assert f"FAILED second: {message}" in report
    kept = verdicts.VerdictFile(environment).read()
    assert not kept["second"].passed
    assert not kept[verdicts.ALL].passed
