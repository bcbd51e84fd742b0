"""Whole pipelines of small random networks, with autoencoders, text encoders and tokenizers, made offline.

Words become numbers by a short list; text encoders are of the pipelines' own kinds. With `text=False` a pipeline has
neither and is called with embeddings."""

from __future__ import annotations

import types
from typing import Any

import diffusers
import diffusers_direct
import diffusers_direct_video
import diffusers_dispatched
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_video2video
from diffusers_family import Family, build

WORDS = ("a", "cat", "dog", "on", "grass", "blurry", "[INST]", "[/INST]")
FLUX = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
UNIPC = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
FAMILIES = {
    **diffusers_direct.FAMILIES,
    **diffusers_direct_video.FAMILIES,
    **diffusers_dispatched.FAMILIES,
}


def network(name: str, **options: Any) -> torch.nn.Module:
    """A family's network, with some of its options changed."""
    family = FAMILIES[name]
    return build(Family(family.cls, {**family.options, **options}, family.inputs, family.calls))[0]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", *WORDS, "<end>"]
    inner = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(names)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", len(names) - 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        model_max_length=8,
    )
    # Without the long system message, so that few tokens hold a prompt.
    made.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    return made


def _made(cls: type, config: Any) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return cls(config).eval().requires_grad_(False)


def clip(projected: bool = False) -> torch.nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=32 if not projected else 16, intermediate_size=32,
        projection_dim=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=len(WORDS) + 2,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return _made(cls, config)


def t5(kind: str = "T5") -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=16, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, pad_token_id=0
    )
    return _made(getattr(transformers, f"{kind}EncoderModel"), config)


def mistral() -> torch.nn.Module:
    """FLUX.2 reads the layers 10, 20 and 30."""
    import transformers

    config = transformers.MistralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=30,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _made(transformers.MistralModel, config)


AUTOENCODER = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 32,
}


def _certain(vae: torch.nn.Module, last: torch.nn.Module) -> torch.nn.Module:
    """The autoencoder with a distribution of deviation exp(-15), so that drawing gives its mean."""
    half = len(last.bias) // 2
    with torch.no_grad():
        last.weight[half:] = 0
        last.bias[half:] = -100
    return vae.eval().requires_grad_(False)


def vae() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = diffusers.AutoencoderKL(**AUTOENCODER, shift_factor=0.0609, scaling_factor=1.5035)
    return _certain(made, made.encoder.conv_out)


def flux2_vae() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = diffusers.AutoencoderKLFlux2(**AUTOENCODER)
        made.bn.running_mean.normal_()
        made.bn.running_var.uniform_(0.5, 2.0)
    return _certain(made, made.encoder.conv_out)


def wan_vae() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[-0.5, 0.1, 0.3, 0.9], latents_std=[2.0, 1.5, 0.8, 1.1],
        )  # fmt: skip
    return _certain(made, made.quant_conv)


def flux(
    scheduler: Any = None, cls: str = "FluxPipeline", text: bool = True, **options: Any
) -> Any:
    """FLUX.1-dev, that is, with an embedding of the guidance scale; schnell with guidance_embeds=False."""
    parts = {
        "text_encoder": clip,
        "tokenizer": tokenizer,
        "text_encoder_2": t5,
        "tokenizer_2": tokenizer,
    }
    return getattr(diffusers, cls)(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**FLUX),
        vae=vae(),
        transformer=network("Flux", **{"in_channels": 16, "guidance_embeds": True, **options}),
        **{name: make() if text else None for name, make in parts.items()},
    )


def flux2(
    scheduler: Any = None, cls: str = "Flux2Pipeline", text: bool = True, **options: Any
) -> Any:
    return getattr(diffusers, cls)(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**FLUX),
        vae=flux2_vae(),
        transformer=network("Flux2", in_channels=16, joint_attention_dim=48, **options),
        text_encoder=mistral() if text else None,
        tokenizer=tokenizer() if text else None,
    )


def sd3(
    scheduler: Any = None, cls: str = "StableDiffusion3Pipeline", text: bool = True, **parts: Any
) -> Any:
    """`parts` in place of its own."""
    names = ("", "_2", "_3")
    encoders = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in names)
    if text:
        encoders = {f"tokenizer{name}": tokenizer() for name in names}
        encoders |= {f"text_encoder{name}": clip(projected=True) for name in names[:2]}
        encoders["text_encoder_3"] = t5()
    return getattr(diffusers, cls)(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **{"vae": vae(), "transformer": network("SD3"), **encoders, **parts},
    )


def wan(scheduler: Any = None, cls: str = "WanPipeline", text: bool = True, **options: Any) -> Any:
    # The pipeline repairs the text of prompts by ftfy, which these prompts do not need.
    for module in (pipeline_wan, pipeline_wan_video2video):
        if not hasattr(module, "ftfy"):
            module.ftfy = types.SimpleNamespace(fix_text=lambda text: text)
    return getattr(diffusers, cls)(
        scheduler=scheduler or UniPCMultistepScheduler(**UNIPC),
        vae=wan_vae(),
        transformer=network("Wan"),
        text_encoder=t5("UMT5") if text else None,
        tokenizer=tokenizer() if text else None,
        **options,
    )
