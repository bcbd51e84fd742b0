"""What samples are compared by: pixels, or the features of a network that the user names.

`load_features(name)` gives a callable from images (B, C, H, W) in [-1, 1] to features (B, D). Nothing
is downloaded: weights come from an installed package, from a file, from a seed, or from training.
"""

from rfkernels.metrics.features.classifier import Classifier, train_classifier
from rfkernels.metrics.features.efficientnet import EfficientNetLite0
from rfkernels.metrics.features.inception import Inception
from rfkernels.metrics.features.load import FEATURES, extract, load_features
from rfkernels.metrics.features.network import FeatureNetwork, Pixels
from rfkernels.metrics.features.random_conv import RandomConv
from rfkernels.metrics.features.vgg import Vgg16

__all__ = [
    "FEATURES",
    "Classifier",
    "EfficientNetLite0",
    "FeatureNetwork",
    "Inception",
    "Pixels",
    "RandomConv",
    "Vgg16",
    "extract",
    "load_features",
    "train_classifier",
]
