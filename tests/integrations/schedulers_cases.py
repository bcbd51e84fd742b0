"""Our diffusers schedulers by short names, for the tests that run over all of them."""

from __future__ import annotations

from typing import Any

from rfkernels.integrations import diffusers as rfd

CLASSES = ["Euler", "Heun", "Midpoint", "FireFlow", "Multistep"]
ALGORITHMS = ["ab2", "dpm++", "unipc"]  # of the multistep one, whose default is the first
RULES = [*CLASSES[:-1], *ALGORITHMS]  # everything that steps in a way of its own


def cls_of(name: str) -> type:
    return getattr(rfd, f"RF{name}Scheduler")


def made(name: str, **config: Any) -> Any:
    """A scheduler of a class or, by an algorithm's name, a multistep one."""
    if name in ALGORITHMS:
        return rfd.RFMultistepScheduler(algorithm=name, **config)
    return cls_of(name)(**config)
