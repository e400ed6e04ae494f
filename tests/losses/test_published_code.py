"""The named losses beside the published code of their papers, on one small input.

Each number was computed once, in float64, by the steps of that code, written out in the comment;
x and y are the normalized rows of X and Y, c the cosines of x, and r the distances of all pairs.
The code itself is not part of the tests. What differs by a constant is turned into theirs here as
docs/losses.md says.
"""

import math

import pytest
import torch

from comhe_ext import Gaussian, Riesz, losses, pair_energy

X = torch.tensor([[1, 2, 2], [2, -1, 2], [0, 3, -4], [-6, 2, 3]], dtype=torch.float64)
Y = torch.tensor([[2, 2, 1], [1, -2, 2], [3, 4, 0], [-2, 1, 2]], dtype=torch.float64)
POLE = torch.tensor([2, 1, -2], dtype=torch.float64)
N = len(X)

PUBLISHED = {
    # ssnl/align_uniform, uniform_loss: log(mean(exp(-2 r^2)))
    "align_uniform": (lambda: losses.uniformity(X), -3.548868889500891),
    # facebookresearch/dinov2, koleo_loss.py: -mean(log(|x_i - x_I + 1e-8| + 1e-8)), I = argmax of
    # c with -1 on the diagonal
    "dinov2 koleo": (lambda: losses.koleo(X), -0.18885868373105916),
    # wznpub/MMA_Regularization, MMA.py: -mean(acos(clamp(max_j (c - 2 diag c), -+0.99999)))
    "MMA": (lambda: losses.minimal_angle(X), -1.3260404295628665),
    # pytorch-metric-learning, RegularFaceRegularizer: mean of the largest c off the diagonal
    "RegularFace": (lambda: losses.regular_face(X), 0.2365079365079365),
    # psmmettes/hpn, prototype_loss: the same of c + 1
    "hpn": (lambda: losses.regular_face(X) + 1, 1.2365079365079366),
    # wy1iu/Sphere-Uniformity, mhs, output layer: -min(2 - 2c), without its eps of 1e-4 in the norm
    "MHS": (lambda: losses.separation(X), -10 / 9),
    # the same, hidden layer: rows and their opposites, the sum over all pairs that have the least
    # value, which are two: i and j, and -i and -j
    "MHS, hidden": (lambda: 2 * losses.separation(X, half_space=True), -16 / 15),
    # mhp, output layer: mean(1 / (2 - 2 <x_i, v>)); hidden layer: of rows and their opposites
    "MHP": (lambda: losses.polarization(X, POLE), 0.7771959459459458),
    "MHP, hidden": (lambda: losses.polarization(X, POLE, half_space=True), 0.8199681652806652),
    # mhc: -log(mean(exp(-10 (2 - 2 <x_i, v>)))) / 10, likewise
    "MHC": (lambda: losses.covering(X, POLE), 0.6719627221267561),
    "MHC, hidden": (lambda: losses.covering(X, POLE, half_space=True), 0.6393638862882713),
    # KrishnaswamyLab/LM-Dispersion, angular_spread: logsumexp(-acos(c) / pi / 0.5) - log(N (N - 1))
    # off the diagonal, with epsilon = 0
    "LM-Dispersion": (lambda: losses.dispersion(X), -1.0588985749124764),
    # vector-quantize-pytorch, orthogonal_loss_fn: sum(c^2) / N^2 - 1 / N
    "VQ": (lambda: losses.frame_potential(X) * (N - 1) / N, 0.12048500881834212),
    # sentence-transformers, GlobalOrthogonalRegularizationLoss, "gemma": sum of c^2 off the
    # diagonal / (N (N - 1)); its mean term is the square of the mean of c there
    "GOR": (lambda: losses.frame_potential(X), 0.16064667842445618),
    "GOR, mean": (lambda: losses.mean_cosine(X) ** 2, 0.13068783068783071**2),
    # soft orthogonality: |x x^T - I|_F^2 of normalized rows
    "SO": (lambda: losses.frame_potential(X) * N * (N - 1), 1.9277601410934742),
    # VITA-Group/Diverse-ViT: mean of c over all N^2 entries
    "Diverse-ViT": (lambda: (losses.mean_cosine(X) * (N - 1) + 1) / N, 0.15198412698412697),
    # pakoromilas/DHEL-KCL, DHEL: -mean(log(exp(<x_i, y_i> / 0.3) / (a_i b_i))), a_i and b_i the
    # sums over j != i of exp(<x_i, x_j> / 0.3) and exp(<y_i, y_j> / 0.3)
    "DHEL": (lambda: losses.dhel(X, Y), 0.556318954012152),
    # KCL: 16 (mean k of the pairs of x + of y) - 2 mean k(|x_i - y_i|), k = exp(-2 r^2)
    "KCL": (lambda: losses.kcl(X, Y), 1.5737141813373536),
    # kernel "riesz" with t = 1: k = 1 / r
    "KCL, riesz": (lambda: losses.kcl(X, Y, Riesz(1.0)), 23.308060099479405),
    # kernel "imq" with c = 2: k = c / sqrt(c^2 + r^2)
    "KCL, imq": (lambda: 2 * losses.kcl(X, Y, Riesz(1.0, shift=4.0)), 24.298386699731683),
    # kernel "log" with t = 2: k = -log(2 r^2 + 1) / 2 of pairs, but -log(2 r^2 + 1) of x_i and y_i
    "KCL, log": (
        lambda: 2 * losses.kcl(X, Y, Riesz(0.0, shift=0.5), gamma=8.0) - 14 * math.log(2.0),
        -23.8236787241585,
    ),
    # facebookresearch/dinov3, gram_loss.py, remove_neg off: mean of (x x^T - y y^T)^2
    "dinov3 gram": (lambda: losses.gram(X, Y), 0.20977072310405642),
    # SphereFace+, as the MHE paper writes it: mean over i in (0, 2, 2) and j != i of |x_i - x_j|^-2
    "SphereFace+": (
        lambda: losses.sphereface_plus(X, torch.tensor([0, 2, 2])),
        0.47463978712185306,
    ),
    # ltl-uva/ledoh-torch, gaussian and euclidean, gamma = 4: mean of exp(4 c)
    "LEDoH": (lambda: pair_energy(X, pair=Gaussian(2.0)) * math.exp(4.0), 1.5700871235053304),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_the_published_value(name):
    ours, theirs = PUBLISHED[name]
    assert float(ours()) == pytest.approx(theirs, rel=1e-7)  # KoLeo has an eps of 1e-8 more


def test_angular_visual_hardness():
    # Chen et al. (2020), definition 1: acos(<y_i, x_label>) / sum over j of acos(<y_i, x_j>)
    hardness = losses.angular_visual_hardness(Y[:3], X, torch.tensor([0, 2, 2]))
    expected = [0.09843687887783473, 0.42866402907150697, 0.2092024929223507]
    assert hardness.tolist() == pytest.approx(expected, rel=1e-10)
