"""Reference velocity networks: every one is called as velocity(x, t, y=None) with t = 0 at the
source, 1 at the data.

`build(name, **options)` makes one by name. A conditional network carries `null_label`, the value of
y that stands for "no condition"; `y=None` means the same. Any other `torch.nn.Module` of this call
shape works as well.
"""

from rfkernels.models.denoisers import DenoiserVelocity, EDMVelocity, VEVelocity, VPVelocity
from rfkernels.models.diffusers_unet import DiffusersUNet
from rfkernels.models.dit import DiT
from rfkernels.models.mlp import MLPVelocity
from rfkernels.models.noise_prediction import NoisePrediction
from rfkernels.models.registry import available, build, describe
from rfkernels.models.time_scaled import TimeScaled
from rfkernels.models.unet import UNet
from rfkernels.models.windowed_prediction import WindowedNoisePrediction

__all__ = [
    "DenoiserVelocity",
    "DiT",
    "DiffusersUNet",
    "EDMVelocity",
    "MLPVelocity",
    "NoisePrediction",
    "TimeScaled",
    "UNet",
    "VEVelocity",
    "VPVelocity",
    "WindowedNoisePrediction",
    "available",
    "build",
    "describe",
]
