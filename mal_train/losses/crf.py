"""Self-training target: mean field on the colors of the crop, and the loss against it. Knows no network, no schedule.

Letters: N crops, H rows, W columns, P = H·W pixels, T taps (half of a symmetric window, without its center).
M is the flat layout: for each crop its P pixels in row order and a gap, with one more gap before the first crop.
In it every neighbor is a fixed distance away, so a tap is a shifted view and nothing is unfolded or padded.
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
"""Published guard against 0/0 in x = a¹ / (10⁻⁶ + a⁰ + a¹). It decides pixels, so it is part of the result."""

_LEAST_WEIGHT = 1e-30
"""Color weights below vanish in a float32 sum anyway; as denormals they would slow some processors down."""


def crf_loss(prob_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Dice distance (N,) float32 between prob (N, H, W) and the refined mask (N, H, W), which carries no gradient.

    prob is not cut to the box, so foreground outside it is penalized here too. Source: MAL, section 3.4.
    """
    return dice_distance(prob_NHW, target_NHW.detach())


class MeanField:
    """Binary mask that agrees with the colors around each pixel: the target of the CRF loss.

    Source: MAL (Lan et al., CVPR 2023), section 3.4, as its published code runs it: no unary term after the start.
    With x the foreground probability, b the box mask and K_ij = exp(−‖f_i − f_j‖² / 2ζ²) over a k×k window,

        x ← clip(x·b, low, high),   then num_iter times   x ← clip(a¹ / (10⁻⁶ + a⁰ + a¹), low, high)
        with   a¹_i = b_i·Π_j x_j^K_ij   and   a⁰_i = Π_j (1 − x_j)^K_ij.

    Here the same in logits z = log x − log(1 − x), where the products are a linear stencil:

        z ← clip(ΣKz + log b − log(1 + 10⁻⁶·exp(−ΣKv)), logit low, logit high)   with   v = log(1 − x).

    The last logarithm is the guard 10⁻⁶. Where a window holds both sides of a weak edge the products fall below it, and
    without it flat images and windows of 5×5 get other masks; so v is carried along. Neighbors outside the image weigh
    0. As K_ij = K_ji, half of the weights is kept. Logarithms are to base 2 inside, which has the faster exponential.
    Runs without gradients, in float32 also under autocast, on the device of its inputs; on a CPU in one thread.

    Args:
        kernel_size: side of the window in pixels, odd, at least 3.
        zeta: color bandwidth ζ > 0, in units of the guide image.
        num_iter: iterations, at least 0. All are run: single pixels still creep after 300, so no fixed point ends it.
        low: lower bound of x, 0 < low < high.
        high: upper bound of x, low < high < 1.
        compiled: True: torch.compile, or raise. False: plain tensor operations, the same masks. None: compiled where a
            compiler is found; plain elsewhere, inside loader workers, and when compiling fails, which is logged once.

    Raises:
        ConfigError: an argument is out of range, or compiled=True without a compiler.

    >>> guide = torch.zeros(1, 3, 1, 6)
    >>> guide[..., 3:] = 1.0  # two flat areas; the weak start in the middle of each takes the color area over
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
            raise ConfigError(f"mean field: kernel_size {kernel_size}; give an odd number of pixels, 3 or more")
        if not (math.isfinite(zeta) and zeta > 0):
            raise ConfigError(f"mean field: zeta {zeta}; give a finite number above 0")
        if num_iter < 0:
            raise ConfigError(f"mean field: num_iter {num_iter}; give 0 or more iterations")
        if not 0 < low < high < 1:
            raise ConfigError(f"mean field: low {low}, high {high}; give 0 < low < high < 1")
        if compiled and not can_compile(torch.device("cpu")):
            raise ConfigError("mean field: compiled=True, but no C++ compiler was found; install one or set CXX")
        self.kernel_size = kernel_size
        self.zeta = zeta
        self.num_iter = num_iter
        self.low = low
        self.high = high
        self.compiled = compiled
        self._compile_failed = False

    @torch.no_grad()
    def __call__(self, guide_NCHW: Tensor, prob_NHW: Tensor, box_mask_NHW: Tensor) -> Tensor:
        """Refined mask (N, H, W) bool on the inputs' device; False wherever the box mask is 0.

        A crop's mask depends on nothing else in the batch, also when another crop holds NaN.

        Args:
            guide_NCHW: (N, C, H, W) colors, in the units of zeta (ImageNet-normalized for the published default).
            prob_NHW: (N, H, W) foreground probability, 0..1. NaN counts as 0.
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
        # A loader worker would compile once more in each process, and forks do not go with the compiler's threads.
        return not self._compile_failed and get_worker_info() is None and can_compile(device)

    def _compiled_steps(self, rule: "_Rule", fixed: "_Fixed", state: "_State", spare: "_State", num_iter: int) -> int:
        """Run num_iter (even) iterations on state, in place. Returns how many were run: 0 if compiling failed."""
        step_pair = _compiled_pair(rule)
        for tensor in (*fixed, *state, *spare):
            # One program for every batch size: the last batch of an epoch must not compile again.
            torch._dynamo.mark_dynamic(tensor, tensor.ndim - 1)
        try:
            for _ in range(num_iter // 2):
                step_pair(fixed, state, spare)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            # Compiling comes before running, so the state is untouched here.
            if self.compiled:
                raise
            self._compile_failed = True
            reason = " ".join(str(error).split())[:300]
            _LOG.warning("mean field: torch.compile failed, the plain form goes on with the same masks: %s", reason)
            return 0
        return num_iter


@contextmanager
def _one_thread() -> Iterator[None]:
    """CPU work in one thread: threads would meet after each of hundreds of steps of a tenth of a millisecond.

    As soon as anything else wants a core (loader workers do) those meetings cost more than they share out: on two busy
    cores a call took 1.6 s with two threads and 0.03 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile may run (TORCH_COMPILE_DISABLE) and finds g++, clang++ or CXX, on a GPU also Triton."""
    if torch._dynamo.config.disable:
        return False
    candidates = (os.environ.get("CXX", ""), "g++", "clang++")
    has_compiler = any(shutil.which(name) for name in candidates if name)
    return has_compiler and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


class _Rule(NamedTuple):
    """What a compiled step is specialized on.

    shifts: distance of each tap in M; gap: places at both ends that no step writes; low, high: bounds of the logit.
    """

    shifts: tuple[int, ...]
    gap: int
    low: float
    high: float


class _Fixed(NamedTuple):
    """What stays the same in all iterations, float32. weight_TM[t, i] joins the places i and i + shifts[t]."""

    weight_TM: Tensor
    log_box_M: Tensor


class _State(NamedTuple):
    """What an iteration changes, float32, to base 2: z = logit x and v = log(1 − x)."""

    logit_M: Tensor
    log_not_M: Tensor


class _Grid(NamedTuple):
    """The flat layout M of N images of height × width pixels for windows that reach `reach` pixels to each side."""

    num: int
    height: int
    width: int
    reach: int

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """(dy, dx) of the later half of the window; the earlier half mirrors it."""
        span = range(-self.reach, self.reach + 1)
        return tuple((dy, dx) for dy in span for dx in span if (dy, dx) > (0, 0))

    @property
    def shifts(self) -> tuple[int, ...]:
        """Distance of each tap's neighbor in M."""
        return tuple(dy * self.width + dx for dy, dx in self.taps)

    @property
    def gap(self) -> int:
        """Places between crops and at both ends: the longest shift, rounded up to a cache line (16 float32)."""
        return -(-max(self.shifts) // 16) * 16

    def zeros(self, like: Tensor) -> Tensor:
        """(M,) float32 on the device of `like`. The zeros in the gaps stay harmless: they weigh 0 as neighbors."""
        return like.new_zeros(self.gap + self.num * (self.height * self.width + self.gap), dtype=torch.float32)

    def images(self, values_M: Tensor) -> Tensor:
        """(N, H, W) view of values in M without their gaps."""
        pixels = self.height * self.width
        rows_NP = values_M[self.gap :].view(self.num, pixels + self.gap)[:, :pixels]
        return rows_NP.view(self.num, self.height, self.width)

    def lay_out(self, values_NHW: Tensor) -> Tensor:
        """(M,) float32 copy of values (N, H, W)."""
        values_M = self.zeros(values_NHW)
        self.images(values_M).copy_(values_NHW)
        return values_M


def _color_weights(guide_NCHW: Tensor, grid: _Grid, zeta: float) -> Tensor:
    """(T, M) float32 weights K of each pixel and its later neighbors, 0 where the neighbor is outside the image."""
    height, width = grid.height, grid.width
    weight_TM = torch.stack([grid.zeros(guide_NCHW)] * len(grid.taps))
    for tap, (dy, dx) in enumerate(grid.taps):
        left, right = max(0, -dx), min(width, width - dx)
        if dy < height and left < right:
            here = guide_NCHW[:, :, : height - dy, left:right]
            there = guide_NCHW[:, :, dy:, left + dx : right + dx]
            weight = torch.exp((there - here).square_().sum(1).mul_(-0.5 / zeta**2))
            # Written so that NaN becomes 0: a broken crop must not reach its neighbors through the gap.
            weight = torch.where(weight > _LEAST_WEIGHT, weight, 0.0)
            grid.images(weight_TM[tap])[:, : height - dy, left:right] = weight
    return weight_TM


def _plain_step(rule: _Rule, fixed: _Fixed, state: _State, out: _State) -> None:
    """One iteration from state into out, in place: fresh memory for each intermediate would double the time.

    exp2, log2: log1p and the natural exponential take 4 to 40 times as long here.
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
    """The places that a step writes, moved by `shift`. None for the very end, where −0 would mean the beginning."""
    return slice(rule.gap + shift, (shift - rule.gap) or None)


@functools.cache
def _compiled_pair(rule: _Rule) -> Callable[..., None]:
    """Two iterations, state → spare → state, as one compiled program for any batch size.

    Two, because calls and ping-pong cost less; not more, because longer chains came out slower.
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

    # One kernel: a pool of compiler processes would cost more than it saves.
    return torch.compile(pair, fullgraph=True, options={"compile_threads": 1})


def _log_not_polynomial(rule: _Rule) -> Callable[[Tensor], Tensor]:
    """Gives log₂(1 − x) of logits z = log₂(x / (1 − x)) within the rule's bounds, to about 3e-7.

    It is −z/2 − log₂(2 cosh(z·ln2 / 2)), whose last part is even: a polynomial in z² takes a third of the time of an
    exponential and a logarithm. Bounds so wide that it would need a high degree get those two instead.
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
