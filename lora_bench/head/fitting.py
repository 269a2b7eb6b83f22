"""The output layer of a head as a regression on its frozen inputs, before the first step.

Linear probing before fine-tuning (Kumar et al. 2022, arXiv 2202.10054, section 3.4): gradients of a random head distort
the features, those of a fitted one do so less. The fit is a ridge regression of the classes, whose penalty minimises
the squared error of each example when it is left out, so that no data are set aside (Golub et al. 1979,
doi.org/10.2307/1268518). Logits are its predictions, times the factor with the smallest cross-entropy of the left-out
predictions, plus the log frequencies of the classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = tuple(10.0**k for k in range(-4, 5))
"""Ridge penalties per example that are tried; features have unit variance."""
_NEWTON_STEPS = 30


@torch.no_grad()
def fit_output_layer(features: Tensor, labels: Tensor, outputs: int) -> tuple[Tensor, Tensor] | None:
    """Return weight (C, F) and bias (C,) of the fitted layer, in fp32; None if the features do not predict the labels.

    Args:
        features: (N, F), N of 2 or more.
        labels: (N,) class numbers, or numbers where C is 1.
        outputs: C, the number of logits.
    """
    X, y = features.double(), labels.to(features.device)
    mean, deviation = X.mean(0), X.std(0)
    inverse = torch.where(deviation > 1e-8 * deviation.max(), 1 / deviation.clamp_min(1e-300), 0.0)  # (F,)
    targets = y.double()[:, None] if outputs == 1 else F.one_hot(y, outputs).double()  # (N, C)
    centre = targets.mean(0)
    slopes, left_out = _ridge((X - mean) * inverse, targets - centre)  # (F, C), (N, C)
    if outputs == 1:
        factor, offset = 1.0, centre
        error, variance = (targets - centre - left_out).square().mean(), (targets - centre).square().mean()
        if not error < variance:
            return None
    else:
        offset = centre.clamp_min(1 / (len(X) + outputs)).log()
        factor = _factor(left_out, offset, y)
        if factor <= 0:
            return None
    weight = factor * slopes * inverse[:, None]  # (F, C)
    return weight.T.float().contiguous(), (offset - mean @ weight).float()


def _ridge(Z: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ridge regression of centred targets (N, C) on centred features (N, F) with the best of `PENALTIES`.

    Returns:
        The slopes (F, C), and the prediction of each example by the regression on the others (N, C).
    """
    U, S, Vh = torch.linalg.svd(Z, full_matrices=False)  # (N, R), (R,), (R, F)
    projected = U.T @ Y  # (R, C)
    best: tuple[float, Tensor, Tensor] | None = None
    for penalty in PENALTIES:
        kept = S.square() / (S.square() + penalty * len(Z))  # (R,)
        leverage = (U.square() @ kept + 1 / len(Z)).clamp_max(1 - 1e-9)  # (N,); 1 / N is the mean's
        residual = (Y - U @ (kept[:, None] * projected)) / (1 - leverage)[:, None]
        error = float(residual.square().mean())
        if best is None or error < best[0]:
            slopes = Vh.T @ ((S / (S.square() + penalty * len(Z)))[:, None] * projected)
            best = error, slopes, Y - residual
    assert best is not None
    return best[1], best[2]


def _factor(scores: Tensor, offset: Tensor, labels: Tensor) -> float:
    """Return the factor a with the smallest cross-entropy of logits a · scores + offset, by Newton's method.

    Args:
        scores: (N, C).
        offset: (C,).
        labels: (N,).
    """
    a = torch.zeros((), dtype=scores.dtype, device=scores.device)
    of_label = scores.gather(1, labels[:, None])[:, 0]
    for _ in range(_NEWTON_STEPS):
        p = (a * scores + offset).softmax(1)  # (N, C)
        mean = (p * scores).sum(1)
        gradient = (mean - of_label).mean()
        curvature = ((p * scores.square()).sum(1) - mean.square()).mean()
        a = a - (gradient / curvature.clamp_min(1e-12)).clamp(-2, 2)
    return float(a)
