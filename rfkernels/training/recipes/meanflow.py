"""MeanFlow and improved MeanFlow: one-step flows from scratch, by learning average velocities.

(Geng, Deng, Bai, Kolter, He, "Mean Flows for One-step Generative Modeling", 2025; Geng, Lu, Wu,
Shechtman, Kolter, He, "Improved Mean Flows", 2025. Both count time from the data, s = 1 - t; the
formulas here are the same in t, where velocities change sign.)

The average velocity u(x, t, h) = (1/h) integral of v over [t, t + h] along the flow satisfies, with
the end t + h held,

    u = v + h du/dt,   du/dt = v . grad_x u + d_t u - d_h u,

which turns into a regression on samples: v is replaced by the conditional velocity, and du/dt of
the network itself, one forward derivative without gradient, becomes part of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rfkernels.flow.times import LogitNormal, get_time_distribution
from rfkernels.ops.flow_loss import flow_loss
from rfkernels.ops.ode_step import linear_step
from rfkernels.training.config import OwnObject, TrainConfig, check_linear
from rfkernels.training.objective import Batch, Setting, SourceObjective, batch_condition
from rfkernels.training.option_checks import number, require
from rfkernels.training.recipes.recipe import Recipe

__all__ = ["ImprovedMeanFlow", "MeanFlow", "MeanFlowObjective", "MeanFlowOptions"]

AverageVelocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MeanFlowOptions:
    """What the recipes of this family share.

    Attributes:
        span_fraction: fraction of the samples that learn an average, h > 0, spread evenly over
            steps; the others learn the velocity, h = 0.
        weight_power, weight_floor: p and c of the loss, the mean of e / stop_gradient(e + c)^p with
            e the squared error summed over a sample; p = 0 is that error itself.
        target_guidance_scale, target_guidance_mix: w and k of classifier-free guidance inside the
            target, so that sampling needs no second call: v becomes

                w v + (1 - w - k) u(x, t, 0 | null) + k u(x, t, 0 | y),

            of an effective scale w / (1 - k). Samples whose label is dropped (train.label_dropout)
            keep v. w = 1, k = 0 is no guidance.

    Class attributes:
        own_tangent: whether du/dt is taken along the network's own velocity, not the sample's.
    """

    flow_map: ClassVar[bool] = True
    sample_solver: ClassVar[str] = "flow-map"
    own_tangent: ClassVar[bool] = False

    span_fraction: float = 0.25
    weight_power: float = 1.0
    weight_floor: float = 0.01
    target_guidance_scale: float = 1.0
    target_guidance_mix: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = number("span_fraction", self.span_fraction)
        require(0 <= fraction <= 1, "span_fraction", "must be in [0, 1]", self.span_fraction)
        power = number("weight_power", self.weight_power)
        require(power >= 0, "weight_power", "must not be negative", self.weight_power)
        floor = number("weight_floor", self.weight_floor)
        require(floor > 0, "weight_floor", "must be positive", self.weight_floor)
        number("target_guidance_scale", self.target_guidance_scale)
        mix = number("target_guidance_mix", self.target_guidance_mix)
        require(mix < 1, "target_guidance_mix", "must be below 1", self.target_guidance_mix)
        check_own_loss(self.train)

    @property
    def guided(self) -> bool:
        """Whether the target has guidance in it."""
        return (self.target_guidance_scale, self.target_guidance_mix) != (1.0, 0.0)


def check_own_loss(train: TrainConfig) -> None:
    """Refuses a loss or a path of `train` that a recipe of flow maps would not use."""
    require(train.loss == "mse", "train.loss", "this recipe has its own loss", train.loss)
    check_linear(train, "this recipe is of the linear path")


@dataclass(frozen=True, kw_only=True)
class MeanFlow(MeanFlowOptions, Recipe):
    """MeanFlow: |u(x_t, t, h) - sg(v + h du/dt)|^2 with v = x1 - x0 of the sample.

    Two times are drawn, t is the smaller and h the difference; x_t lies on the sample's line. du/dt
    is one forward derivative (`torch.func.jvp`) along (v, 1, -1) in (x, t, h), for the samples with
    h > 0 only. Sample with solver "flow-map", in one step or a few.

    Attributes:
        times: distribution of the two times; train.time_distribution is not used.

    Published (ImageNet 256, latents, DiT XL/2; FID 3.43 in one step and 2.93 in two, second-hand):
    logit-normal times with mean -0.4 and std 1 on s, which is mean 0.4 here; 25 % of averages (in
    the ablation with B/4, 0, 25, 50 and 100 % gave 328.9, 61.1, 63.1 and 67.3); p = 1, c = 0.01;
    label dropout 0.1; Adam at 1e-4 with betas (0.9, 0.95), batch 256, EMA 0.9999. Guidance limited
    to an interval of times is left out. The network may have no BatchNorm, and its attention takes
    PyTorch's plain form inside the derivative, since fused ones have none; the derivative is in
    float32 also under train.autocast. Where there is dropout, u and du/dt draw masks of their own.
    The held-out loss is that of the velocity, h = 0, against v.
    """

    name: ClassVar[str] = "meanflow"

    times: Any = field(default_factory=lambda: LogitNormal(mean=0.4))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.times, OwnObject):
            get_time_distribution(self.times)

    def objective(self, setting: Setting) -> MeanFlowObjective:
        return MeanFlowObjective(setting, self)


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlow(MeanFlow):
    """Improved MeanFlow: as MeanFlow, with du/dt along the network's own velocity u(x_t, t, 0).

    The paper writes it as the regression of V = u - h sg(du/dt) onto v, which has the value and the
    gradient of MeanFlow's loss. What differs is that V is a function of x_t alone: MeanFlow's du/dt
    follows v of the sample, whose noise enters the target twice. Half of the samples learn
    averages.

    The published guidance v + (1 - 1/w) (v_c - v_u) of scale w is target_guidance_scale = 1,
    target_guidance_mix = 1 - 1/w here. Published: FID 1.72 in one step (ImageNet 256, second-hand),
    with w drawn from [1, 8] and a guidance interval, both given to the network, and a second head
    for v. Those need a network of their own and are left out.
    """

    name: ClassVar[str] = "improved-meanflow"
    own_tangent: ClassVar[bool] = True

    span_fraction: float = 0.5


class MeanFlowObjective(SourceObjective):
    """The regression of average velocities; subclasses say which intervals [t, t + h]."""

    def __init__(self, setting: Setting, recipe: MeanFlowOptions) -> None:
        super().__init__(setting)
        self._recipe = recipe
        if recipe.guided:
            conditional = "y" in self.source.draw(0, 1).condition
            require(
                conditional and setting.null_label is not None,
                "target_guidance_scale",
                "guidance in the target needs labels and a network with a null_label",
                (recipe.target_guidance_scale, recipe.target_guidance_mix),
            )

    def intervals(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """t and h > 0 of every sample, (b,) float32."""
        distribution = get_time_distribution(self._recipe.times)
        one = self.scaled(self.times(step, distribution, "first time"))
        two = self.scaled(self.times(step, distribution, "second time"))
        return torch.minimum(one, two), (one - two).abs()

    def batch(self, step: int) -> Batch:
        t, span = self.intervals(step)
        batch = self.state(self.draw(step), t)
        batch["span"] = span * self.chosen(step, self._recipe.span_fraction)
        if self.guides(step):
            y = batch["condition.y"]
            batch["dropped"] = (y == self.setting.null_label).reshape(len(y), -1).all(1)
        return batch

    def guides(self, step: int) -> bool:
        """Whether the targets of a step have guidance in them."""
        return self._recipe.guided

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        x, t, condition = batch["xt"], batch["t"], batch_condition(batch)
        if "span" not in batch:  # held out
            velocity = self.call(model, x, t, span=torch.zeros_like(t), **condition)
            return self.regression(velocity, batch["target"])
        target = self._average_target(model, batch, self._guided_velocity(model, batch))
        average = self.call(model, x, t, span=batch["span"], **condition)
        return adaptive_loss(
            average,
            target,
            power=self._recipe.weight_power,
            floor=self._recipe.weight_floor,
            weight=batch.get("weight"),
        )

    @torch.no_grad()
    def _guided_velocity(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """v, or the v with guidance in it."""
        v, condition = batch["target"], batch_condition(batch)
        if "dropped" not in batch:
            return v
        scale, mix = self._recipe.target_guidance_scale, self._recipe.target_guidance_mix
        x, t, still = batch["xt"], batch["t"], torch.zeros_like(batch["t"])
        null = {"y": torch.full_like(condition["y"], self.setting.null_label)}
        terms = [self.call(model, x, t, span=still, **{**condition, **null})]
        coefficients = [1.0 - scale - mix]
        if mix:
            terms.append(self.call(model, x, t, span=still, **condition))
            coefficients.append(mix)
        guided = linear_step(v, terms, coefficients, x_coefficient=scale)
        dropped = batch["dropped"].reshape(-1, *[1] * (v.dim() - 1))
        return torch.where(dropped, v, guided)

    @torch.no_grad()
    def _average_target(
        self, model: nn.Module, batch: Batch, velocity: torch.Tensor
    ) -> torch.Tensor:
        """v + h du/dt, which is v in the rows of h = 0; these skip the derivative."""
        rows = batch["span"].nonzero()[:, 0]
        if not len(rows):  # one call all the same: processes that share the weights stay in step
            rows = rows.new_zeros(1)
        part = {name: value[rows] for name, value in batch.items()}
        x, t, span, condition = part["xt"], part["t"], part["span"], batch_condition(part)
        direction = velocity[rows]

        network = exact_network(model, condition)
        along = direction
        if self._recipe.own_tangent:
            along = self.call(model, x, t, span=torch.zeros_like(span), **condition)
        change = derivative_along(network, x, t, span, along)
        return velocity.index_copy(0, rows, linear_step(direction, (change,), (span,)))


def exact_network(model: nn.Module, condition: dict[str, torch.Tensor]) -> AverageVelocity:
    """u(x, t, span) of a network in the precision of x whatever train.autocast, to differentiate.

    A difference of nearly equal numbers is what bfloat16 has no digits for; and autocast gives a
    group norm on the CPU values and tangents of two dtypes, which a convolution refuses.
    """

    def network(x: torch.Tensor, t: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return model(x, t, span=span, **condition).to(x.dtype)

    return network


def derivative_along(
    network: AverageVelocity,
    x: torch.Tensor,
    t: torch.Tensor,
    span: torch.Tensor,
    direction: torch.Tensor,
) -> torch.Tensor:
    """du/dt of u(x, t, span) along dx/dt = direction, with the end t + span held: the tangents are
    (direction, 1, -1).

    Attention takes its plain form inside, since the fused ones have no forward derivative.

    Args:
        network: u(x, t, span) -> (B, ...) like x.
        x, direction: (B, ...). t, span: (B,).

    Returns:
        (B, ...) like x.
    """
    with sdpa_kernel(SDPBackend.MATH):
        _, change = torch.func.jvp(
            network, (x, t, span), (direction, torch.ones_like(t), -torch.ones_like(span))
        )
    return change


def adaptive_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    power: float,
    floor: float,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over the samples of weight e / stop_gradient(e + floor)^power, e the squared error summed
    over a sample, weight (B,) or 1 (Geng et al. 2025, appendix)."""
    size = prediction[0].numel()
    error = flow_loss(prediction, target, reduction="none") * size
    scale = (error.detach() + floor).pow(-power)
    return (error * (scale if weight is None else scale * weight)).mean()
