"""Drop-ins: what makes existing code use `rf.attention` and the ODE steps without being changed.

    sdpa()                                torch's scaled_dot_product_attention, for a block or for good
    diffusers.set_attention(model)        a diffusers model, whichever way it calls attention
    diffusers.register_attention_backend  then model.set_attention_backend("rfkernels")
    transformers.register_attention()     then attn_implementation="rfkernels"
    diffusers.RFMidpointScheduler, ...    schedulers for diffusers' pipelines
    diffusers.edit(pipe, image, ...)      editing without training on a whole pipeline
    sageattention, comfyui, k_diffusion   functions with the signatures of those projects
    set_precision(model, {pattern: ...})  a precision per layer

Nothing here imports the library it integrates with before it is asked to.
"""

from __future__ import annotations

import importlib

from rfkernels.integrations.precision import set_precision
from rfkernels.integrations.torch_sdpa import SdpaPatch, sdpa

_MODULES = ("comfyui", "diffusers", "k_diffusion", "sageattention", "transformers")

__all__ = ["SdpaPatch", "sdpa", "set_precision"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"rfkernels.integrations.{name}")
    raise AttributeError(f"module 'rfkernels.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
