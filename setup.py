"""Build of comhe_ext: static metadata; the folder kernels/ is installed as comhe_ext.kernels."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# read, not imported: building must not need torch
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "comhe_ext/__init__.py").read_text(), re.M)[1]

setup(
    name="comhe-ext",
    version=VERSION,
    description="Exact hyperspherical energy (MHE, CoMHE) and its gradient, fused, without N x N matrices",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=["torch>=2.13,<2.14"],
    packages=["comhe_ext", "comhe_ext.kernels"],
    # `kernels` alone is the import name of another well-known package: ours lives inside comhe_ext
    package_dir={"comhe_ext.kernels": "kernels"},
    package_data={"comhe_ext": ["py.typed"]},
)
