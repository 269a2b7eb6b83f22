"""The low-rank linear: a trained B A beside a frozen weight, alone, less a start, or under a trained magnitude.

    h = W x + s · B A x                           LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3)
    h = W x + s · (B A − B₀ A₀) x                 a start that is not zero and leaves the function as it was (PiSSA, …)
    h = m ⊙ (W + s · B A) x / ‖W + s · B A‖       DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5), norms of output rows

A: (rank, in), B: (out, rank), s the scaling, m: (out,). What the literature does by writing W − s B₀ A₀ into the frozen
weight is kept beside it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Update

if TYPE_CHECKING:
    from lora_bench.adapters.lowrank.quantization import Quantized


class LowRank(Update):
    """scaling · B A, held in fp32 whatever the backbone's precision.

    Args:
        base: the frozen linear beside it; never written to.
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: the factor s.
        dropout: probability with which an input feature of A is dropped in training.
        generator: the member's stream of dropout.
        freeze_A: keep lora_A as it is (LoRA-FA).
    """

    takes_output = False  # its products add up in place

    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    magnitude: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
        generator: torch.Generator,
        *,
        freeze_A: bool = False,
    ) -> None:
        super().__init__()
        device = base.weight.device
        self.base = (base,)  # in a tuple: not a submodule, never trained or saved
        if freeze_A:
            self.register_buffer("lora_A", lora_A.to(device))
        else:
            self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(lora_B.to(device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.register_parameter("magnitude", None)
        self.quantized: QuantizedLinear | None = None
        self.rank = lora_A.shape[0]
        self.scaling = scaling
        self.dropout = dropout
        self.generator = generator

    # -- how it begins --

    @torch.no_grad()
    def initialise(self, lora_A: Tensor, lora_B: Tensor, *, subtract: bool) -> None:
        """Set the factors that training starts from; with `subtract` the function stays that of the frozen weight."""
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        if subtract:
            self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        if self.magnitude is not None:
            self.magnitude.copy_(self._norm(*self.factors()))

    @torch.no_grad()
    def add_magnitude(self) -> None:
        """Train the norms of the output rows apart from their directions; they start at what they are."""
        self.register_buffer("squared_norm", self.frozen_weight().float().square().sum(1), persistent=False)  # (out,)
        self.magnitude = nn.Parameter(self._norm(*self.factors()))

    @torch.no_grad()
    def quantize_base(self, quantized: Quantized) -> None:
        """Take a quantised weight in the frozen weight's stead."""
        self.quantized = QuantizedLinear(quantized, self.base[0])

    # -- what it computes --

    def frozen_weight(self) -> Tensor:
        """W, (out, in), in the precision that products are computed in: the backbone's, or the quantised one."""
        return (self.quantized or self.base[0]).weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """(R, in) and (out, R) whose product, times the scaling, is added to the frozen weight.

        Less a start, B A − B₀ A₀ is taken as (B − B₀) A + B₀ (A − A₀): the same, but small steps away from a large
        start survive a product in bf16, and the start itself gives exactly zero.
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A, self.lora_A - self.start_A])  # (2 rank, in)
        B = torch.cat([self.lora_B - self.start_B, self.start_B], 1)  # (out, 2 rank)
        return A, B

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.factors()
        W = self.frozen_weight()
        ratio = None if self.magnitude is None else self.magnitude / self._norm(A, B)  # (out,)
        rows = dropped = x.flatten(0, -2)  # (N, in)
        if self.dropout and self.training:
            dropped = (x * keep_mask(x, self.dropout, self.generator)).flatten(0, -2)
        out = _LowRankLinear.apply(rows, dropped, W, self.base[0].bias, A, B, self.scaling, ratio)  # type: ignore[no-untyped-call]
        # Laid out here: some models (DeBERTa) change it in place, which a view made inside the function forbids.
        return out.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _norm(self, A: Tensor, B: Tensor) -> Tensor:
        """‖W + s B A‖ of each output row, (out,), without forming B A; a constant for gradients (DoRA, sec. 4.3).

        ‖W‖² + 2s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩, row by row.
        """
        W, s = self.frozen_weight(), self.scaling
        cross = F.linear(W, (2 * s * A).to(W.dtype)).to(B.dtype)  # (out, R)
        cross.addmm_(B, A @ A.T, alpha=s * s)
        return (self.squared_norm + (cross * B).sum(1)).clamp_min(1e-12).sqrt()  # type: ignore[operator]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.factors()
        W = weight if self.quantized is None else self.frozen_weight().float()
        adapted = W + self.scaling * B @ A  # (out, in)
        if self.magnitude is not None:
            adapted = adapted * (self.magnitude / adapted.norm(dim=1))[:, None]
        return adapted, bias

    # -- what is kept of it --

    def to_tensors(self) -> dict[str, Tensor]:
        """peft's tensors: less a start, a LoRA of twice the rank that says the same, B A − B₀ A₀ = [B, −B₀] [A; A₀]."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if self.start_A is not None and self.start_B is not None:
            A, B = torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], 1)
        tensors = {"lora_A.weight": A, "lora_B.weight": B}
        if self.magnitude is not None:
            tensors["lora_magnitude_vector"] = self.magnitude.detach()
        if self.quantized is not None:
            tensors |= {"base.codes": self.quantized.codes, "base.scales": self.quantized.scales}
        return tensors

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        self.lora_A.copy_(A[: self.rank])
        self.lora_B.copy_(B[:, : self.rank])
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(A[self.rank :])
            self.start_B.copy_(-B[:, self.rank :])
        if self.magnitude is not None:
            self.magnitude.copy_(tensors["lora_magnitude_vector"])
        if self.quantized is not None:
            self.quantized.restore(tensors["base.codes"], tensors["base.scales"])
            if self.magnitude is not None:
                self.squared_norm.copy_(self.frozen_weight().float().square().sum(1))  # type: ignore[operator]


class _LowRankLinear(torch.autograd.Function):
    """ratio ⊙ (W x + s · B A x′) + bias, with x′ the x that dropout left; without a ratio 1 stands for it.

    x, x′ (N, in), W (out, in), bias (out,), A (R, in), B (out, R), ratio (out,). One function, so that products add up
    in place and a backward pass needs x, A x′ and, for the ratio, the output. The ratio scales weights, not
    activations; W · (ratio − 1) is added to W, so that in bf16, whose numbers around 1 lie far apart, it is not rounded
    beforehand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        ratio: Tensor | None,
    ) -> Tensor:
        scale = scaling * lora_B if ratio is None else scaling * ratio[:, None] * lora_B
        # Laid out and multiplied in the order in which thin products are quickest: up to five times.
        A, B = lora_A.to(x.dtype), scale.T.contiguous().to(x.dtype)  # (R, in), (R, out)
        if ratio is not None:
            weight = torch.addcmul(weight, weight, (ratio - 1).to(weight.dtype)[:, None])  # (out, in)
        low = dropped @ A.T  # (N, R)
        y = F.linear(x, weight, bias if ratio is None else None)  # (N, out)
        torch.addmm(y, low, B, out=y)  # in place; `addmm_` is unknown to the FLOP counter
        ctx.save_for_backward(dropped, low, weight, A, B, ratio, None if ratio is None else y)
        ctx.alone, ctx.scaling, ctx.dtype = dropped is x, scaling, lora_A.dtype
        if ratio is None:
            return y
        return y.clone() if bias is None else y + bias  # what the backward pass needs is not given away

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dropped, low, weight, A, B, ratio, y = ctx.saved_tensors
        low_grad = grad @ B.T  # (N, R)
        x_grad = dropped_grad = ratio_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight  # (N, in)
            if ctx.alone:
                torch.addmm(x_grad, low_grad, A, out=x_grad)
            else:
                dropped_grad = low_grad @ A
        A_grad = (low_grad.T @ dropped).to(ctx.dtype) if ctx.needs_input_grad[4] else None  # (R, in)
        B_grad = (low.T @ grad).T.to(ctx.dtype) * ctx.scaling  # (out, R)
        if ratio is not None:
            B_grad = B_grad * ratio[:, None]
            ratio_grad = (grad * y).sum(0) / ratio  # y without its bias
        return x_grad, dropped_grad, None, None, A_grad, B_grad, None, ratio_grad


class QuantizedLinear(nn.Module):
    """The quantised weight of a frozen linear. It is dequantised once, into the precision of products: what is measured
    is what quantisation costs in quality, not what it saves in memory, since the backbone stays for other members."""

    codes: Tensor
    scales: Tensor
    weight: Tensor

    def __init__(self, quantized: Quantized, original: nn.Linear) -> None:
        super().__init__()
        device = original.weight.device
        self.quantized = quantized
        self.register_buffer("codes", quantized.codes.to(device))
        self.register_buffer("scales", quantized.scales.to(device))
        self.register_buffer("weight", quantized.dequantize().to(original.weight), persistent=False)  # (out, in)

    @torch.no_grad()
    def restore(self, codes: Tensor, scales: Tensor) -> None:
        """Take the codes and scales of an adapter file."""
        self.quantized = dataclasses.replace(self.quantized, codes=codes.cpu(), scales=scales.cpu())
        self.codes.copy_(codes)
        self.scales.copy_(scales)
        self.weight.copy_(self.quantized.dequantize())


def keep_mask(x: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """Inverted-dropout mask from the member's own stream, so that a member of a pack drops what it would drop alone."""
    keep = 1.0 - dropout
    return torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)
