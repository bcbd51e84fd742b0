"""Video and audio models that call torch's function in their own attention processors."""

from __future__ import annotations

import torch
from diffusers_family import HEADS, Family, padding, steps, text, video

FAMILIES: dict[str, Family] = {
    "CogVideoX": Family(
        "CogVideoXTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 3,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 7,
        },
        lambda: {
            "hidden_states": torch.randn(2, 2, 4, 8, 8),
            "encoder_hidden_states": text(),
            "timestep": steps(),
        },
        calls=3,
    ),
    "Mochi": Family(
        "MochiTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "text_embed_dim": 32,
            "time_embed_dim": 4,
            "max_sequence_length": 7,
        },
        lambda: {
            "hidden_states": video(),
            "encoder_hidden_states": text(),
            "timestep": steps(),
            "encoder_attention_mask": padding().bool(),
        },
        calls=6,  # one per sample of the batch
        mask="encoder_attention_mask",
    ),
    "StableAudio": Family(
        "StableAudioDiTModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 32,
        },
        lambda: {
            "hidden_states": torch.randn(2, 4, 16),
            "timestep": torch.tensor([0.2, 0.7]),
            "encoder_hidden_states": text(),
            "global_hidden_states": torch.randn(2, 1, 8),
            "rotary_embedding": (torch.ones(17, 8), torch.zeros(17, 8)),
        },
        calls=6,
    ),
    "Allegro": Family(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 3,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 32,
        },
        lambda: {
            "hidden_states": video(),
            "encoder_hidden_states": text(),
            "timestep": steps(),
            "attention_mask": torch.ones(2, 2, 8, 8),
            "encoder_attention_mask": padding(),
            "image_rotary_emb": (
                [(torch.ones(4, 8), torch.zeros(4, 8))] * 3,
                [torch.zeros(1, 32, dtype=torch.int64)] * 3,
            ),
        },
        calls=6,
        mask="encoder_attention_mask",
    ),
    "Latte": Family(
        "LatteTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 32,
            "video_length": 2,
        },
        lambda: {
            "hidden_states": video(),
            "timestep": steps(),
            "encoder_hidden_states": text(),
        },
        calls=6,
    ),
}
