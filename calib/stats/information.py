"""Mutual information of paired samples by the Cauchy-Schwarz divergence, for information planes."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_gram(x: Tensor, bandwidth: float) -> Tensor:
    """Gaussian Gram matrix exp(-|x_i - x_j|^2 / (2 s^2)) of rows with bandwidth s.  (n, d) -> (n, n) float64."""
    x = x.double()
    return (-torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * bandwidth**2)).exp()


def median_distance(x: Tensor) -> float:
    """Median Euclidean distance of rows that differ, a usual bandwidth; 1 where none do.  (n, d) -> float."""
    apart = torch.pdist(x.double())
    apart = apart[apart > 0]
    return float(apart.median()) if len(apart) else 1.0


def cauchy_schwarz_information(k: Tensor, other: Tensor) -> float:
    """Cauchy-Schwarz quadratic mutual information of two variables in nats, from Gram matrices K and L of n paired
    samples (arXiv:2404.17951, CS-QMI; published code takes log2).

    log mean(K o L) + log(mean K mean L) - 2 log mean_i(mean_j K_ij mean_j L_ij): the Cauchy-Schwarz divergence
    -2 log <p, q> + log <p, p> + log <q, q> of kernel density estimates (of bandwidth s / sqrt 2, where K and L are
    Gaussian of s) of the joint distribution and of the product of its marginals. Never negative; 0 where the estimates
    are equal. Of independent samples it is above 0 by a bias of order 1 / n.  (n, n), (n, n) -> float.
    """
    k, other = k.double(), other.double()
    joint, apart = (k * other).mean(), k.mean() * other.mean()
    between = (k.mean(1) * other.mean(1)).mean()
    return float(joint.log() + apart.log() - 2 * between.log())
