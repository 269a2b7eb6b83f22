"""The low-rank linear: a trained B A beside a frozen weight.

    h = W x + s · B A x                           LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3)
    h = W x + s · (B A − B₀ A₀) x                 an initialisation that leaves the function unchanged (PiSSA, …)
    h = m ⊙ (W + s · B A) x / ‖W + s · B A‖       DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5), norms of output rows

A: (rank, in), B: (out, rank), s the scaling, m: (out,). The literature writes W − s B₀ A₀ into the frozen weight; here
B₀ A₀ is kept beside it.

A LoRA variant with another trained tensor (a gate, a scale per rank) is a subclass of `LowRank` that registers the
tensor and overrides `trained_factors`. It keeps initialisation, magnitude, quantisation, batching in packs, adapter
files, merging and PEFT export.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_bench.adapters.base import Update
from lora_bench.backbones.dropout import keep_mask
from lora_bench.backbones.quantized_modules import QuantizedWeight, quantized_weight

if TYPE_CHECKING:
    from lora_bench.backbones.quantization import Quantized
    from lora_bench.backbones.quantized_modules import QuantizedRows


class LowRank(Update):
    """scaling · B A, held in fp32 whatever the backbone's precision.

    A subtracted initialisation, DoRA's magnitude and a quantised base are absent until `initialise`, `add_magnitude`
    and `quantize_base` add them.

    Args:
        base: the frozen linear beside it; never written to.
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: the factor s.
        dropout: probability with which an input feature of A is dropped in training.
        generator: the member's random stream of dropout.
        freeze_A: do not train lora_A (LoRA-FA).
    """

    takes_output = False  # its products add up in place

    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor | None
    """A₀, (rank, in); None where nothing is subtracted."""
    start_B: Tensor | None
    """B₀, (out, rank)."""
    magnitude: Tensor | None
    """m, (out,); None without DoRA's magnitude."""

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
        self.quantized: QuantizedWeight | None = None
        """The weight of its own that it uses in place of the frozen one."""
        self.rank = lora_A.shape[0]
        self.scaling = scaling
        self.dropout = dropout
        self.generator = generator

    # -- what a variant may override --

    def trained_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank) as functions of the trained tensors, with gradients.

        A variant overrides it, for example `return self.lora_A, self.lora_B * self.gate`. In a pack it is called with
        the tensors of several members at once (`torch.vmap`), so it must not depend on their values by `if`.
        """
        return self.lora_A, self.lora_B

    # -- initialisation --

    @torch.no_grad()
    def initialise(self, lora_A: Tensor, lora_B: Tensor, *, subtract: bool) -> None:
        """Set lora_A (rank, in) and lora_B (out, rank); reset DoRA's magnitude, if there is one, to the new norms.

        Args:
            lora_A, lora_B: the new values.
            subtract: subtract their product from now on, so that the function stays that of the frozen weight. Without
                it, an earlier product that is subtracted stays subtracted.
        """
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        if subtract:
            self.start_A, self.start_B = (factor.detach().clone() for factor in self.trained_factors())
        if self.magnitude is not None:
            self.magnitude.copy_(self._norm(*self.factors()))

    @torch.no_grad()
    def add_magnitude(self) -> None:
        """Add DoRA's magnitude: a trained norm of each output row, (out,), that starts from the row's present norm."""
        self.register_buffer("squared_norm", self.frozen_weight().float().square().sum(1), persistent=False)  # (out,)
        self.magnitude = nn.Parameter(self._norm(*self.factors()))

    @torch.no_grad()
    def quantize_base(self, quantized: Quantized) -> None:
        """Use a quantised weight in place of the frozen one, whose type and device stay those of the products."""
        self.quantized = QuantizedWeight(quantized, self.base[0].weight)

    @property
    def needs_weight(self) -> bool:
        return self.quantized is None

    # -- computation --

    @property
    def quantized_weight(self) -> QuantizedWeight | QuantizedRows | None:
        """The quantised W, its own or that of the backbone; None if W is held as numbers."""
        return self.quantized or quantized_weight(self.base[0])

    def frozen_weight(self) -> Tensor:
        """Return W (out, in) in the precision of the products, dequantised if it is quantised."""
        quantized = self.quantized_weight
        return self.base[0].weight if quantized is None else quantized.dequantize()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (R, in) and (out, R) whose product, times the scaling, is added to the frozen weight.

        With a subtracted initialisation, B A − B₀ A₀ is computed as (B − B₀) A + B₀ (A − A₀). The two are equal, but
        small steps away from a large B₀ A₀ survive a product in bf16, and B₀ A₀ itself gives exactly zero.
        """
        A, B = self.trained_factors()
        if self.start_A is None or self.start_B is None:
            return A, B
        return torch.cat([A, A - self.start_A]), torch.cat([B - self.start_B, self.start_B], 1)  # R = 2 rank

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output (B, T, out), bias included, from the input x (B, T, in) alone; `y` is not read.

        Only the input of A is dropped out, and only in training.
        """
        A, B = self.factors()
        quantized = self.quantized_weight
        W = self.base[0].weight if quantized is None else quantized
        ratio = None if self.magnitude is None else self.magnitude / self._norm(A, B)  # (out,)
        rows = dropped = x.flatten(0, -2)  # (N, in)
        if self.dropout and self.training:
            dropped = (x * keep_mask(x, self.dropout, self.generator)).flatten(0, -2)  # (N, in)
        out = _LowRankLinear.apply(rows, dropped, W, self.base[0].bias, A, B, self.scaling, ratio)  # type: ignore[no-untyped-call]
        # Some models (DeBERTa) change the output in place, which a view made inside the function forbids.
        return out.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]  # (B, T, out)

    @torch.no_grad()
    def _norm(self, A: Tensor, B: Tensor) -> Tensor:
        """Return ‖W + s B A‖ of each output row, (out,), without forming B A.

        ‖W‖² + 2s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩, row by row; a constant for gradients (DoRA, sec. 4.3).
        """
        W, s = self.frozen_weight(), self.scaling
        cross = F.linear(W, (2 * s * A).to(W.dtype)).to(B.dtype)  # (out, R)
        cross.addmm_(B, A @ A.T, alpha=s * s)
        return (self.squared_norm + (cross * B).sum(1)).clamp_min(1e-12).sqrt()  # type: ignore[operator]

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (W + s · B A), (out, in), its rows scaled to the magnitude if there is one, and the bias unchanged.

        With a subtracted initialisation this is W + s · (B A − B₀ A₀). A quantised weight takes the place of `weight`.
        """
        A, B = self.factors()
        W = weight if self.quantized is None else self.frozen_weight().float()
        adapted = W + self.scaling * B @ A  # (out, in)
        if self.magnitude is not None:
            adapted = adapted * (self.magnitude / adapted.norm(dim=1))[:, None]
        return adapted, bias

    @property
    def is_product(self) -> bool:
        """True if the update is s times the product of `factors`: False for a subclass with another forward pass."""
        cls = type(self)
        return cls.forward is LowRank.forward and cls.factors is LowRank.factors

    # -- saving and loading --

    def variant_tensors(self) -> dict[str, Tensor]:
        """Return lora_A, lora_B and the parameters and buffers that a subclass adds, by name; empty for plain LoRA."""
        if type(self) is LowRank:
            return {}
        others = {"start_A", "start_B", "magnitude", "quantized"}
        state = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name.partition(".")[0] not in others}

    @torch.no_grad()
    def to_tensors(self) -> dict[str, Tensor]:
        """Return PEFT's tensors, and those that PEFT has no name for.

        A subtracted initialisation is a LoRA of twice the rank: B A − B₀ A₀ = [B, −B₀] [A; A₀]. `lora_A.weight` and
        `lora_B.weight` of a variant are its `trained_factors`, and its own tensors follow as `variant.<name>`.
        """
        A, B = (factor.detach() for factor in self.trained_factors())
        if self.start_A is not None and self.start_B is not None:
            A, B = torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], 1)  # (2 rank, in), (out, 2 rank)
        tensors = {"lora_A.weight": A, "lora_B.weight": B}
        if self.magnitude is not None:
            tensors["lora_magnitude_vector"] = self.magnitude.detach()
        if self.quantized is not None:
            tensors |= {"base.codes": self.quantized.codes, "base.scales": self.quantized.scales}
        return tensors | {f"variant.{name}": tensor.detach().clone() for name, tensor in self.variant_tensors().items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors that `to_tensors` returned into this update, which must have the same rank and the same parts.

        A missing tensor is a `KeyError`; tensors of parts that this update does not have are ignored. Quantised codes
        are replaced.
        """
        A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        self.lora_A.copy_(A[: self.rank])
        self.lora_B.copy_(B[:, : self.rank])
        for name, tensor in self.variant_tensors().items():
            tensor.copy_(tensors[f"variant.{name}"])
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(A[self.rank :])
            self.start_B.copy_(-B[:, self.rank :])
        if self.magnitude is not None:
            self.magnitude.copy_(tensors["lora_magnitude_vector"])
        if self.quantized is not None:
            self.quantized.load(tensors["base.codes"], tensors["base.scales"])
            if self.magnitude is not None:
                self.squared_norm.copy_(self.frozen_weight().float().square().sum(1))  # type: ignore[operator]


class _LowRankLinear(torch.autograd.Function):
    """Compute ratio ⊙ (W x + s · B A x′) + bias, with x′ the x that dropout left; a ratio of None means 1.

    x, x′ (N, in), W (out, in), bias (out,), A (R, in), B (out, R), ratio (out,). In one function products add up in
    place, and the backward pass needs only x, A x′ and, for the ratio, the output. The ratio scales weights, not
    activations. W · (ratio − 1) is added to W, so that the ratio is not rounded to bf16, whose numbers around 1 lie far
    apart. A quantised W is dequantised in the forward pass and again in the backward pass, and not held in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        frozen: Tensor | QuantizedWeight | QuantizedRows,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        ratio: Tensor | None,
    ) -> Tensor:
        """Return y (N, out); without dropout `dropped` is x itself, which saves a product in the backward pass."""
        scale = scaling * lora_B if ratio is None else scaling * ratio[:, None] * lora_B
        # Thin products are up to five times as fast with this layout and order.
        A, B = lora_A.to(x.dtype), scale.T.contiguous().to(x.dtype)  # (R, in), (R, out)
        weight = _scaled(frozen, ratio)  # (out, in)
        low = dropped @ A.T  # (N, R)
        y = F.linear(x, weight, bias if ratio is None else None)  # (N, out)
        torch.addmm(y, low, B, out=y)  # (N, out), in place; the FLOP counter does not know `addmm_`
        ctx.quantized = None if isinstance(frozen, Tensor) else frozen
        held = weight if ctx.quantized is None else None
        ctx.save_for_backward(dropped, low, held, A, B, ratio, None if ratio is None else y)
        ctx.without_dropout, ctx.scaling, ctx.dtype = dropped is x, scaling, lora_A.dtype
        if ratio is None:
            return y
        return y.clone() if bias is None else y + bias  # the caller may change it; the saved y must stay

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, x′, A, B and ratio from that of y (N, out); None for the other inputs.

        They are None, too, for a frozen A, for a ratio of None, and for x and x′ if x needs none. Without dropout the
        gradient of x′ is in that of x.
        """
        dropped, low, held, A, B, ratio, y = ctx.saved_tensors
        low_grad = grad @ B.T  # (N, R)
        x_grad = dropped_grad = ratio_grad = None
        if ctx.needs_input_grad[0]:
            weight = held if ctx.quantized is None else _scaled(ctx.quantized, ratio)
            x_grad = grad @ weight  # (N, in)
            if ctx.without_dropout:
                torch.addmm(x_grad, low_grad, A, out=x_grad)
            else:
                dropped_grad = low_grad @ A
        A_grad = (low_grad.T @ dropped).to(ctx.dtype) if ctx.needs_input_grad[4] else None  # (R, in)
        B_grad = (low.T @ grad).T.to(ctx.dtype) * ctx.scaling  # (out, R)
        if ratio is not None:
            B_grad = B_grad * ratio[:, None]
            ratio_grad = (grad * y).sum(0) / ratio  # y without its bias
        return x_grad, dropped_grad, None, None, A_grad, B_grad, None, ratio_grad


def _scaled(frozen: Tensor | QuantizedWeight | QuantizedRows, ratio: Tensor | None) -> Tensor:
    """Return W (out, in) with its rows multiplied by the ratio (out,); None means 1."""
    weight = frozen if isinstance(frozen, Tensor) else frozen.dequantize()
    return weight if ratio is None else torch.addcmul(weight, weight, (ratio - 1).to(weight.dtype)[:, None])
