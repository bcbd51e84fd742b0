"""Steps and guidance scales that the methods were published with, by what guidance is on the network."""

from __future__ import annotations

from dataclasses import dataclass

from rfkernels.editing import FlowEdit, Method, UniEdit, get_method
from rfkernels.sampling.arguments import check_steps

__all__ = ["CFG", "EMBEDDED", "UNGUIDED", "Published", "published", "with_defaults"]

# The scale is told to the network; it is of classifier-free guidance; or the network needs none.
EMBEDDED, CFG, UNGUIDED = "embedded", "cfg", "unguided"


@dataclass(frozen=True)
class Published:
    """Steps of the grid, and the two guidance scales."""

    steps: int
    source: float
    target: float


_PUBLISHED: dict[str, dict[str, Published]] = {
    # Kulikov et al. 2025, of FLUX.1-dev and of Stable Diffusion 3.
    "flowedit": {EMBEDDED: Published(28, 1.5, 5.5), CFG: Published(50, 3.5, 13.5)},
    # Rout et al. 2024, of FLUX.1-dev, with an empty source prompt.
    "rf-inversion": {EMBEDDED: Published(28, 0.0, 3.5), CFG: Published(28, 1.0, 3.5)},
    # Jiao et al. 2025.
    "uniedit": {EMBEDDED: Published(15, 1.0, 1.0), CFG: Published(15, 1.0, 1.0)},
    # Wang et al. 2024 and Deng et al. 2024, of FLUX.1-dev.
    "rf-edit": {EMBEDDED: Published(30, 1.0, 2.0), CFG: Published(30, 1.0, 2.0)},
    "fireflow": {EMBEDDED: Published(8, 1.0, 2.0), CFG: Published(8, 1.0, 2.0)},
}
_OTHER = Published(28, 1.0, 1.0)
_TAKEN_WITH_CFG = 33 / 50  # n_max of FlowEdit over its steps, of Stable Diffusion 3


def published(method: str, guidance: str) -> Published:
    """The defaults of a method of that name; 28 steps and no guidance for one of the caller's own.

    Args:
        method: its name.
        guidance: EMBEDDED, CFG, or UNGUIDED, for which the scales are 1.
    """
    if method not in _PUBLISHED:
        return _OTHER
    if guidance == UNGUIDED:
        return Published(_PUBLISHED[method][EMBEDDED].steps, 1.0, 1.0)
    return _PUBLISHED[method][guidance]


def with_defaults(
    method: str | Method, steps: int | None, guidance: str, patch: int
) -> tuple[Method, int, Published]:
    """(method, steps, defaults). FlowEdit by name takes the published share of the steps, UniEdit tokens
    of that patch.

    Raises:
        TypeError, ValueError: steps, or as ``rfkernels.editing.get_method``.
    """
    found = get_method(method)
    defaults = published(found.name, guidance)
    steps = check_steps("edit", defaults.steps if steps is None else steps)
    if method == FlowEdit.name and guidance == CFG:
        found = FlowEdit(n_max=round(steps * _TAKEN_WITH_CFG))
    if method == UniEdit.name:
        found = UniEdit(patch=patch)
    return found, steps, defaults
