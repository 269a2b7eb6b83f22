"""Pair features: products and differences of the two texts' mean vectors, added to the head's logits.

    u, v = mean token vectors of the first and the second text (special tokens too) in the last layer, at length 1
    s = w · [D · u ⊙ v, √D · |u − v|] + b        added to the logit of label 1, taken from that of label 0

With more classes each has its own w and b, and s is added to its logit; with a number to predict, s is added to it.
A label that depends on the order of the texts, such as entailment, has u − v in place of |u − v|. A single text has no
second vector: u itself takes that place.

Product and difference are the features of Conneau et al. 2017 (arXiv 1705.02364, section 3.1.1) and of Sentence-BERT
(Reimers and Gurevych 2019, arXiv 1908.10084); the factors give all of them a size of about 1, whatever D. They are
initialised as the logistic regression of the label (of each class against the rest; the linear regression of a number)
on the cosine u · v over a few training batches: equal weights of the products. Those of single texts start at zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCHES = 8
"""Training batches that the initialisation reads."""


RIDGE = 1e-3
"""Ridge penalty of the regression, per pair: keeps the slope finite where the pairs are perfectly separable."""


class PairFeatures(nn.Module):
    """One member's weights of the pair features, held in fp32.

    Args:
        hidden_size: D.
        device: of the backbone.
        outputs: C, the number of logits.
        signed: the differences are u − v, not |u − v|.
    """

    def __init__(self, hidden_size: int, device: torch.device, outputs: int = 2, *, signed: bool = False) -> None:
        super().__init__()
        self.outputs, self.signed = outputs, signed
        shape = (2 * hidden_size,) if outputs <= 2 else (outputs, 2 * hidden_size)
        self.weight = nn.Parameter(torch.zeros(shape, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs if outputs > 2 else 1, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Return the part of the logits, (…, C), that features (…, 2 D) give."""
        if self.outputs > 2:
            return F.linear(features, self.weight, self.bias)  # (…, C)
        s = features @ self.weight + self.bias  # (…,)
        return torch.stack([-s, s], -1) if self.outputs == 2 else s[..., None]

    @torch.no_grad()
    def initialise(self, features: Tensor, labels: Tensor) -> None:
        """Initialise as the regression of labels (N,) on the cosines that features (N, 2 D) hold.

        It sets equal weights of the D products, and the bias. The weights of the differences stay as they are, 0 at
        first.
        """
        D = self.weight.shape[-1] // 2
        cosines = features[:, :D].double().mean(1)  # (N,); the products are D times as large
        if self.outputs > 2:
            for c in range(self.outputs):
                slope, intercept = fit_logistic_regression(cosines, labels == c)
                self.weight[c, :D] = slope / D
                self.bias[c] = intercept
            return
        fit, scale = (fit_logistic_regression, 2) if self.outputs == 2 else (fit_linear_regression, 1)
        slope, intercept = fit(cosines, labels)
        self.weight[:D] = slope / scale / D
        self.bias.fill_(intercept / scale)


def compute_pair_features(hidden: Tensor, first: Tensor, second: Tensor, *, signed: bool = False) -> Tensor:
    """Return features (N, 2 D) in fp32, from hidden states (N, T, D) and the two texts' token masks, (N, T) each.

    The D products come first, then the D differences, absolute or `signed`; without a second text, zeros and then the
    first one's vector. A text without tokens has the mean 0.
    """
    u, v = (F.normalize(_mean(hidden.float(), tokens), dim=-1) for tokens in (first, second))  # (N, D) each
    D = hidden.shape[-1]
    has_second = second.bool().any(1, keepdim=True)  # (N, 1)
    differences = u - v if signed else (u - v).abs()
    return torch.cat([D * u * v, D**0.5 * torch.where(has_second, differences, u)], -1)


def _mean(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean (N, D) of hidden states (N, T, D) over the tokens of a mask (N, T); 0 for rows without tokens."""
    mask = tokens[..., None].to(hidden.dtype)  # (N, T, 1)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1.0)


def fit_logistic_regression(x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return slope and intercept of the logistic regression of labels (N,) on x (N,), by 30 steps of Newton's method.

    A ridge penalty keeps both finite, also if one label is absent or x separates the labels.
    """
    X = torch.stack([x, torch.ones_like(x)], 1)  # (N, 2)
    y = labels.to(X.dtype)
    beta = X.new_zeros(2)
    ridge = RIDGE * len(X) * torch.diag(X.new_tensor([1.0, 0.0]))
    ridge[1, 1] = RIDGE  # an intercept is no effect
    for _ in range(30):
        p = torch.sigmoid(X @ beta)
        hessian = (X * (p * (1 - p)).clamp_min(1e-6)[:, None]).T @ X + ridge
        beta = beta + torch.linalg.solve(hessian, X.T @ (y - p) - ridge @ beta)
    return float(beta[0]), float(beta[1])


def fit_linear_regression(x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return slope and intercept of the least squares of numbers (N,) on x (N,), with a ridge penalty on the slope."""
    y = labels.to(x.dtype)
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred.square().sum() + RIDGE * len(x)))
    return slope, float(y.mean() - slope * x.mean())
