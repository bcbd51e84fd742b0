"""Which diffusers models take `rf.attention`, and by which way.

Every row was found by running a small random configuration of the model under diffusers 0.42 and
counting kernel calls; the tests repeat that with the version that is installed.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Coverage", "coverage"]


class Coverage(NamedTuple):
    """One model.

    Attributes:
        model: what it is known as.
        cls: its class in diffusers.
        backend: how much `model.set_attention_backend("rfkernels")` reaches: "all" its attention
            layers, "some", or "none", in which case diffusers accepts the name and nothing changes.
        set_attention: how much `set_attention(model)` reaches.
        note: what is left out or special, or "".
    """

    model: str
    cls: str
    backend: str
    set_attention: str
    note: str = ""


_ROWS = (
    Coverage("FLUX.1", "FluxTransformer2DModel", "all", "all"),
    Coverage("FLUX.2", "Flux2Transformer2DModel", "all", "all"),
    Coverage("Chroma", "ChromaTransformer2DModel", "all", "all"),
    Coverage("Qwen-Image", "QwenImageTransformer2DModel", "all", "all"),
    Coverage("Z-Image", "ZImageTransformer2DModel", "all", "all"),
    Coverage("Wan 2.x", "WanTransformer3DModel", "all", "all"),
    Coverage("SkyReels 2", "SkyReelsV2Transformer3DModel", "all", "all"),
    Coverage("Kandinsky 5", "Kandinsky5Transformer3DModel", "all", "all"),
    Coverage("Bria 3", "BriaTransformer2DModel", "all", "all"),
    Coverage(
        "Cosmos",
        "CosmosTransformer3DModel",
        "all",
        "all",
        "its layers have no backend of their own: the method's process-wide default reaches them",
    ),
    Coverage(
        "Sana-Video",
        "SanaVideoTransformer3DModel",
        "all",
        "all",
        "cross-attention; its self-attention is linear and has no softmax",
    ),
    Coverage("LTX-Video", "LTXVideoTransformer3DModel", "all", "all"),
    Coverage(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        "some",
        "all",
        "the text refiner's layers do not ask the dispatcher",
    ),
    Coverage("Stable Diffusion 3, 3.5", "SD3Transformer2DModel", "none", "all"),
    Coverage("DiT", "DiTTransformer2DModel", "none", "all"),
    Coverage("PixArt", "PixArtTransformer2DModel", "none", "all"),
    Coverage(
        "Sana",
        "SanaTransformer2DModel",
        "none",
        "all",
        "cross-attention; its self-attention is linear and has no softmax",
    ),
    Coverage("AuraFlow", "AuraFlowTransformer2DModel", "none", "all"),
    Coverage("CogVideoX", "CogVideoXTransformer3DModel", "none", "all"),
    Coverage("CogView4", "CogView4Transformer2DModel", "none", "all"),
    Coverage("Lumina-Image 2", "Lumina2Transformer2DModel", "none", "all"),
    Coverage("Lumina-Next", "LuminaNextDiT2DModel", "none", "all"),
    Coverage("HiDream", "HiDreamImageTransformer2DModel", "none", "all"),
    Coverage("CogView3+", "CogView3PlusTransformer2DModel", "none", "all"),
    Coverage("Allegro", "AllegroTransformer3DModel", "none", "all"),
    Coverage("Latte", "LatteTransformer3DModel", "none", "all"),
    Coverage("unCLIP prior", "PriorTransformer", "none", "all"),
    Coverage("HunyuanDiT", "HunyuanDiT2DModel", "none", "all"),
    Coverage(
        "Mochi",
        "MochiTransformer3DModel",
        "none",
        "all",
        "one call per sample; the text pooling stays with PyTorch",
    ),
    Coverage("Stable Audio", "StableAudioDiTModel", "none", "all"),
    Coverage("Stable Diffusion 1, 2, XL", "UNet2DConditionModel", "none", "all"),
    Coverage("UNet2D", "UNet2DModel", "none", "all"),
)


def coverage() -> tuple[Coverage, ...]:
    """The table of covered models, as data; a model that is not in it may be covered as well.

    `set_attention(model)` says for any model which of its layers it took.
    """
    return _ROWS
