"""Computes the self-training target, a mean field on the colors of the crop, and the loss against it.

Independent of network and schedule.

Letters: N crops, H rows, W columns, P = H·W pixels, T taps (half of a symmetric window, without its center).
M is the flat layout: one gap, then for each crop its P pixels in row order and another gap. Every neighbor has a fixed
distance in this layout, so a tap is a shifted view, without unfolding or padding.
"""

import functools
import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils.data import get_worker_info

from mal_train.core.errors import ConfigError
from mal_train.losses.mil import dice_distance

_LOG = logging.getLogger(__name__)

_GUARD = 1e-6
"""Published guard against 0/0 in x = a¹ / (10⁻⁶ + a⁰ + a¹). It affects the mask, so it must not change."""

_LEAST_WEIGHT = 1e-30
"""Smaller color weights are set to 0: they vanish in a float32 sum, and denormals are slow on some processors."""


def crf_loss(prob_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Returns the dice distance (N,) float32 between prob (N, H, W) and the refined mask (N, H, W), which is detached.

    prob is not clipped to the box, so foreground outside the box is penalized too. Source: MAL, section 3.4.
    """
    return dice_distance(prob_NHW, target_NHW.detach())


class MeanField:
    """Mean field that refines a mask to the colors around each pixel; its result is the target of the CRF loss.

    Source: MAL (Lan et al., CVPR 2023), section 3.4, as in its published code: no unary term after the start.
    With x the foreground probability, b the box mask and K_ij = exp(−‖f_i − f_j‖² / 2ζ²) over a k×k window,

        x ← clip(x·b, low, high),   then num_iter times   x ← clip(a¹ / (10⁻⁶ + a⁰ + a¹), low, high)
        with   a¹_i = b_i·Π_j x_j^K_ij   and   a⁰_i = Π_j (1 − x_j)^K_ij.

    Computed in logits z = log x − log(1 − x), where the products are a linear stencil:

        z ← clip(ΣKz + log b − log(1 + 10⁻⁶·exp(−ΣKv)), logit low, logit high)   with   v = log(1 − x).

    The last logarithm is the guard 10⁻⁶. Where a window contains both sides of a weak edge the products fall below it;
    without the guard, flat images and 5×5 windows get different masks, so v is computed too. Neighbors outside the
    image have weight 0. Half of the weights are stored, since K_ij = K_ji. Logarithms are to base 2, whose exponential
    is faster. Runs without gradients, in float32 also under autocast, on the device of its inputs; on a CPU with one
    thread.

    Args:
        kernel_size: side of the window in pixels, odd, at least 3.
        zeta: color bandwidth ζ > 0, in units of the guide image.
        num_iter: iterations, at least 0. All are run: some pixels still change after 300, so there is no fixed point.
        low: lower bound of x, 0 < low < high.
        high: upper bound of x, low < high < 1.
        compiled: True uses torch.compile or raises. False uses eager tensor operations, with the same masks. None
            compiles if a compiler is found; eager without one, in loader workers, and after a compilation failure,
            which is logged once.

    Raises:
        ConfigError: an argument is out of range, or compiled=True without a compiler.

    >>> guide = torch.zeros(1, 3, 1, 6)
    >>> guide[..., 3:] = 1.0  # two areas of one color; each area takes the value of its majority
    >>> prob, box_mask = torch.tensor([[[0.6, 0.6, 0.4, 0.1, 0.6, 0.1]]]), torch.ones(1, 1, 6)
    >>> MeanField(num_iter=10, compiled=False)(guide, prob, box_mask).int().tolist()
    [[[1, 1, 1, 0, 0, 0]]]
    """

    def __init__(
        self,
        kernel_size: int = 3,
        zeta: float = 0.1,
        num_iter: int = 100,
        low: float = 0.1,
        high: float = 0.9,
        *,
        compiled: bool | None = None,
    ) -> None:
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ConfigError(f"mean field: kernel_size {kernel_size}; it must be an odd number of pixels, at least 3")
        if not (math.isfinite(zeta) and zeta > 0):
            raise ConfigError(f"mean field: zeta {zeta}; it must be a finite number above 0")
        if num_iter < 0:
            raise ConfigError(f"mean field: num_iter {num_iter}; it must be at least 0")
        if not 0 < low < high < 1:
            raise ConfigError(f"mean field: low {low}, high {high}; it must be 0 < low < high < 1")
        if compiled and not can_compile(torch.device("cpu")):
            raise ConfigError("mean field: compiled=True, but there is no C++ compiler; install one or set CXX")
        self.kernel_size = kernel_size
        self.zeta = zeta
        self.num_iter = num_iter
        self.low = low
        self.high = high
        self.compiled = compiled
        self._compile_failed = False

    @torch.no_grad()
    def __call__(self, guide_NCHW: Tensor, prob_NHW: Tensor, box_mask_NHW: Tensor) -> Tensor:
        """Returns the refined mask (N, H, W) bool on the inputs' device; False where the box mask is 0.

        The mask of a crop does not depend on other crops of the batch, even if they contain NaN.

        Args:
            guide_NCHW: (N, C, H, W) colors, in the units of zeta (ImageNet-normalized for the published default).
            prob_NHW: (N, H, W) foreground probability, 0..1. NaN is treated as 0.
            box_mask_NHW: (N, H, W), 0..1, any dtype; a fraction adds its logarithm to the logit in each iteration.
        """
        with torch.autocast(prob_NHW.device.type, enabled=False), _one_thread():
            num, height, width = prob_NHW.shape
            grid = _Grid(num, height, width, reach=self.kernel_size // 2)
            box_mask_NHW = box_mask_NHW.float()
            start_NHW = torch.nan_to_num(prob_NHW.float() * box_mask_NHW, nan=0.0).clamp(self.low, self.high)
            fixed = _Fixed(
                weight_TM=_color_weights(guide_NCHW.float(), grid, self.zeta),
                # −1e30 for log 0: minus infinity times a weight of 0 would be NaN.
                log_box_M=grid.lay_out(box_mask_NHW.log2().clamp(min=-1e30)),
            )
            state = _State(
                logit_M=grid.lay_out(start_NHW.log2() - (1 - start_NHW).log2()),
                log_not_M=grid.lay_out((1 - start_NHW).log2()),
            )
            return grid.images(self._iterate(fixed, state, grid).logit_M) > 0

    def _iterate(self, fixed: "_Fixed", state: "_State", grid: "_Grid") -> "_State":
        rule = _Rule(shifts=grid.shifts, gap=grid.gap, low=_logit(self.low), high=_logit(self.high))
        spare = _State(torch.zeros_like(state.logit_M), torch.zeros_like(state.log_not_M))
        done = 0
        if self.num_iter % 2:
            _plain_step(rule, fixed, state, spare)
            state, spare, done = spare, state, 1
        if self._compiles(state.logit_M.device):
            done += self._compiled_steps(rule, fixed, state, spare, self.num_iter - done)
        while done < self.num_iter:
            _plain_step(rule, fixed, state, spare)
            _plain_step(rule, fixed, spare, state)
            done += 2
        return state

    def _compiles(self, device: torch.device) -> bool:
        if self.compiled is not None:
            return self.compiled
        # Each loader worker would compile again, and the threads of the compiler do not survive a fork.
        return not self._compile_failed and get_worker_info() is None and can_compile(device)

    def _compiled_steps(self, rule: "_Rule", fixed: "_Fixed", state: "_State", spare: "_State", num_iter: int) -> int:
        """Runs num_iter (even) iterations on state, in place. Returns the number run: 0 if the compilation failed."""
        step_pair = _compiled_pair(rule)
        for tensor in (*fixed, *state, *spare):
            # One program for all batch sizes: the last batch of an epoch must not compile again.
            torch._dynamo.mark_dynamic(tensor, tensor.ndim - 1)
        try:
            for _ in range(num_iter // 2):
                step_pair(fixed, state, spare)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            # Compilation precedes execution, so the state is unchanged.
            if self.compiled:
                raise
            self._compile_failed = True
            reason = " ".join(str(error).split())[:300]
            _LOG.warning("mean field: torch.compile failed; eager mode continues with the same masks: %s", reason)
            return 0
        return num_iter


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one CPU thread: several would synchronize after each of hundreds of steps of 0.1 ms.

    If another process, such as a loader worker, needs a core, the synchronization costs more than the parallelism
    saves: on two busy cores a call took 1.6 s with two threads and 0.03 s with one.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def can_compile(device: torch.device) -> bool:
    """Returns True if torch.compile is enabled and finds g++, clang++ or CXX, and on a GPU also Triton."""
    if torch._dynamo.config.disable:
        return False
    candidates = (os.environ.get("CXX", ""), "g++", "clang++")
    has_compiler = any(shutil.which(name) for name in candidates if name)
    return has_compiler and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


class _Rule(NamedTuple):
    """Constants that a compiled step is specialized for.

    Attributes:
        shifts: distance of each tap in M.
        gap: positions at both ends that no step writes.
        low: lower bound of the logit.
        high: upper bound of the logit.
    """

    shifts: tuple[int, ...]
    gap: int
    low: float
    high: float


class _Fixed(NamedTuple):
    """Constant inputs of all iterations, float32. weight_TM[t, i] is the weight between i and i + shifts[t]."""

    weight_TM: Tensor
    log_box_M: Tensor


class _State(NamedTuple):
    """State of the iteration, float32, to base 2: z = logit x and v = log(1 − x)."""

    logit_M: Tensor
    log_not_M: Tensor


class _Grid(NamedTuple):
    """Flat layout M of N images of height × width pixels, for windows that extend `reach` pixels to each side."""

    num: int
    height: int
    width: int
    reach: int

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """(dy, dx) of the later half of the window; the earlier half is symmetric."""
        span = range(-self.reach, self.reach + 1)
        return tuple((dy, dx) for dy in span for dx in span if (dy, dx) > (0, 0))

    @property
    def shifts(self) -> tuple[int, ...]:
        """Distance of each tap's neighbor in M."""
        return tuple(dy * self.width + dx for dy, dx in self.taps)

    @property
    def gap(self) -> int:
        """Positions between crops and at both ends: the longest shift, rounded up to a cache line (16 float32)."""
        return -(-max(self.shifts) // 16) * 16

    def zeros(self, like: Tensor) -> Tensor:
        """Returns (M,) float32 on the device of `like`. Zeros in the gaps have no effect, since their weight is 0."""
        return like.new_zeros(self.gap + self.num * (self.height * self.width + self.gap), dtype=torch.float32)

    def images(self, values_M: Tensor) -> Tensor:
        """Returns a view (N, H, W) of values in M, without the gaps."""
        pixels = self.height * self.width
        rows_NP = values_M[self.gap :].view(self.num, pixels + self.gap)[:, :pixels]
        return rows_NP.view(self.num, self.height, self.width)

    def lay_out(self, values_NHW: Tensor) -> Tensor:
        """Copies values (N, H, W) to (M,) float32."""
        values_M = self.zeros(values_NHW)
        self.images(values_M).copy_(values_NHW)
        return values_M


def _color_weights(guide_NCHW: Tensor, grid: _Grid, zeta: float) -> Tensor:
    """Returns the weights K (T, M) float32 of each pixel and its later neighbors, 0 for neighbors outside the image."""
    height, width = grid.height, grid.width
    weight_TM = torch.stack([grid.zeros(guide_NCHW)] * len(grid.taps))
    for tap, (dy, dx) in enumerate(grid.taps):
        left, right = max(0, -dx), min(width, width - dx)
        if dy < height and left < right:
            here = guide_NCHW[:, :, : height - dy, left:right]
            there = guide_NCHW[:, :, dy:, left + dx : right + dx]
            weight = torch.exp((there - here).square_().sum(1).mul_(-0.5 / zeta**2))
            # This comparison maps NaN to 0: an invalid crop must not affect its neighbors through the gap.
            weight = torch.where(weight > _LEAST_WEIGHT, weight, 0.0)
            grid.images(weight_TM[tap])[:, : height - dy, left:right] = weight
    return weight_TM


def _plain_step(rule: _Rule, fixed: _Fixed, state: _State, out: _State) -> None:
    """Runs one iteration from state to out, in place: allocating the intermediates would double the time.

    Uses exp2 and log2, because log1p and the natural exponential take 4 to 40 times as long.
    """
    inner = slice(rule.gap, -rule.gap)
    logit_M, log_not_M = out.logit_M[inner], out.log_not_M[inner]
    torch.add(fixed.log_box_M[inner], state.logit_M[inner], out=logit_M)
    log_not_M.copy_(state.log_not_M[inner])
    for tap, shift in enumerate(rule.shifts):
        later, earlier = _moved(rule, shift), _moved(rule, -shift)
        to_later, to_earlier = fixed.weight_TM[tap, inner], fixed.weight_TM[tap, earlier]
        logit_M.addcmul_(to_later, state.logit_M[later]).addcmul_(to_earlier, state.logit_M[earlier])
        log_not_M.addcmul_(to_later, state.log_not_M[later]).addcmul_(to_earlier, state.log_not_M[earlier])
    guard_M = log_not_M.neg_().exp2_().mul_(_GUARD).add_(1).log2_()
    logit_M.sub_(guard_M).clamp_(rule.low, rule.high)
    torch.exp2(logit_M, out=log_not_M)
    log_not_M.add_(1).log2_().neg_()


def _moved(rule: _Rule, shift: int) -> slice:
    """Returns the slice that a step writes, moved by `shift`. The stop is None for the end, since −0 is the start."""
    return slice(rule.gap + shift, (shift - rule.gap) or None)


@functools.cache
def _compiled_pair(rule: _Rule) -> Callable[..., None]:
    """Compiles two iterations, state → spare → state, as one program for any batch size.

    Two iterations need fewer calls and no copy; longer chains were slower.
    """
    log_not = _log_not_polynomial(rule)

    def step(fixed: _Fixed, state: _State, out: _State) -> None:
        inner = slice(rule.gap, -rule.gap)
        logit_M, log_not_M = fixed.log_box_M[inner] + state.logit_M[inner], state.log_not_M[inner]
        for tap, shift in enumerate(rule.shifts):
            later, earlier = _moved(rule, shift), _moved(rule, -shift)
            to_later, to_earlier = fixed.weight_TM[tap, inner], fixed.weight_TM[tap, earlier]
            logit_M = logit_M + to_later * state.logit_M[later] + to_earlier * state.logit_M[earlier]
            log_not_M = log_not_M + to_later * state.log_not_M[later] + to_earlier * state.log_not_M[earlier]
        logit_M = (logit_M - torch.log2(1 + _GUARD * torch.exp2(-log_not_M))).clamp(rule.low, rule.high)
        out.logit_M[inner] = logit_M
        out.log_not_M[inner] = log_not(logit_M)

    def pair(fixed: _Fixed, state: _State, spare: _State) -> None:
        step(fixed, state, spare)
        step(fixed, spare, state)

    # There is one kernel: a pool of compiler processes would cost more than it saves.
    return torch.compile(pair, fullgraph=True, options={"compile_threads": 1})


def _log_not_polynomial(rule: _Rule) -> Callable[[Tensor], Tensor]:
    """Returns a function for log₂(1 − x) of logits z = log₂(x / (1 − x)) within the bounds, accurate to about 3e-7.

    The value is −z/2 − log₂(2 cosh(z·ln2 / 2)), whose second term is even: a polynomial in z² takes a third of the time
    of an exponential and a logarithm. These are used for wide bounds, where the polynomial would need a high degree.
    """
    squares = np.linspace(0.0, max(abs(rule.low), abs(rule.high)) ** 2, 1001)
    even_part = np.log2(2 * np.cosh(np.sqrt(squares) * (math.log(2) / 2)))
    fit = np.polynomial.Chebyshev.fit(squares, even_part, deg=7)
    if np.abs(fit(squares) - even_part).max() > 1e-7:
        return lambda logit_M: -torch.log2(1 + torch.exp2(logit_M))
    highest, *others = [float(factor) for factor in reversed(fit.convert(kind=np.polynomial.Polynomial).coef)]

    def log_not(logit_M: Tensor) -> Tensor:
        square_M = logit_M.square()
        even_M = torch.full_like(square_M, highest)
        for factor in others:
            even_M = even_M * square_M + factor
        return -0.5 * logit_M - even_M

    return log_not


def _logit(probability: float) -> float:
    return math.log2(probability) - math.log2(1 - probability)
