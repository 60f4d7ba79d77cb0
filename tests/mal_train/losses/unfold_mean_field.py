"""Reference mean field as published: in probability space, with unfolded neighborhoods, slow."""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def unfold_mean_field(
    guide_NCHW: Tensor,
    prob_NHW: Tensor,
    box_mask_NHW: Tensor,
    *,
    kernel_size: int = 3,
    zeta: float = 0.1,
    num_iter: int = 100,
    low: float = 0.1,
    high: float = 0.9,
) -> Tensor:
    """Returns the refined mask (N, H, W) bool: True where `unfold_marginals` exceeds one half."""
    settings = {"kernel_size": kernel_size, "num_iter": num_iter}
    return unfold_marginals(guide_NCHW, prob_NHW, box_mask_NHW, zeta=zeta, low=low, high=high, **settings) > 0.5


@torch.no_grad()
def unfold_marginals(
    guide_NCHW: Tensor,
    prob_NHW: Tensor,
    box_mask_NHW: Tensor,
    *,
    kernel_size: int = 3,
    zeta: float = 0.1,
    num_iter: int = 100,
    low: float = 0.1,
    high: float = 0.9,
) -> Tensor:
    """Returns the foreground marginals (N, H, W). Takes logarithms before unfolding, which is faster."""
    num, colors, height, width = guide_NCHW.shape
    pixels, pad = height * width, kernel_size // 2
    # +10 makes the zeros of the padding distant in color: K = 0 outside the image.
    guide = guide_NCHW.float() + 10
    window = F.unfold(guide, kernel_size, padding=pad).view(num, colors, kernel_size**2, pixels)
    distance = (window - guide.view(num, colors, 1, pixels)).square().sum(1, keepdim=True)
    weight = torch.exp(distance / (-2 * zeta**2))
    box_mask = box_mask_NHW.float().flatten(1)
    x = (prob_NHW.float().flatten(1) * box_mask).clamp(low, high)
    for _ in range(num_iter):
        logs = torch.stack([x, 1 - x], 1).log().view(num, 2, height, width)
        neighbors = F.unfold(logs, kernel_size, padding=pad).view(num, 2, kernel_size**2, pixels)
        products = (neighbors * weight).sum(2).exp()
        foreground, background = products[:, 0] * box_mask, products[:, 1]
        x = (foreground / (1e-6 + background + foreground)).clamp(low, high)
    return x.view(num, height, width)
