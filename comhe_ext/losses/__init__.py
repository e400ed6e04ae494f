"""The pairwise losses of other papers, by the names that their users know.

Each is a function of tensors, and a module of the same name in capitals, which takes the options
when it is made and the tensors when it is called: `losses.Uniformity(t=2.0)(x)` is
`losses.uniformity(x, t=2.0)`. Rows are normalized inside. [B, N, d] are B independent sets, each of
which has a loss of its own. Where a set has no pair its loss is 0. All are differentiable twice.

docs/losses.md has the table of systems and formulas, and what each was compared with.
"""

from comhe_ext.losses.classes import (
    angular_visual_hardness,
    covering,
    polarization,
    sphereface_plus,
)
from comhe_ext.losses.modules import (
    DHEL,
    KCL,
    AngularVisualHardness,
    Covering,
    Dispersion,
    FramePotential,
    Gram,
    KoLeo,
    MeanCosine,
    MinimalAngle,
    Polarization,
    RegularFace,
    Separation,
    SphereFacePlus,
    Uniformity,
)
from comhe_ext.losses.nearest_rows import koleo, minimal_angle, regular_face, separation
from comhe_ext.losses.spread import dispersion, frame_potential, mean_cosine, uniformity
from comhe_ext.losses.views import dhel, gram, kcl

__all__ = [
    "DHEL",
    "KCL",
    "AngularVisualHardness",
    "Covering",
    "Dispersion",
    "FramePotential",
    "Gram",
    "KoLeo",
    "MeanCosine",
    "MinimalAngle",
    "Polarization",
    "RegularFace",
    "Separation",
    "SphereFacePlus",
    "Uniformity",
    "angular_visual_hardness",
    "covering",
    "dhel",
    "dispersion",
    "frame_potential",
    "gram",
    "kcl",
    "koleo",
    "mean_cosine",
    "minimal_angle",
    "polarization",
    "regular_face",
    "separation",
    "sphereface_plus",
    "uniformity",
]
