"""The sweeps behind comhe_ext, one backend a module; installed as `comhe_ext.kernels`.

Nothing here imports the package above it, and imports are relative: `kernels` by itself is the
import name of another well-known package.
"""

__all__: list[str] = []
