"""Captions as fixed vectors, so that text-conditioned recipes run without a language model."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from rfkernels.data.dataset import Dataset

__all__ = ["caption_conditioned", "caption_vectors"]

_GRAMS = (3, 4)


def _features(caption: str) -> Iterator[tuple[str, float]]:
    """(feature, weight) of a caption: its words, and the character n-grams of each word.

    A word's n-grams weigh as much together as the word, so that long words do not drown short ones.
    """
    text = unicodedata.normalize("NFKC", caption).casefold()
    for word in re.findall(r"\w+", text):
        yield f"w {word}", 1.0
        bounded = f"<{word}>"
        grams = [bounded[i : i + n] for n in _GRAMS for i in range(len(bounded) - n + 1)]
        for gram in grams:
            yield f"g {gram}", 1.0 / math.sqrt(len(grams))


def caption_vectors(captions: Sequence[str], dim: int = 64) -> torch.Tensor:
    """Unit vectors (N, dim) float32 of captions: words and character 3- and 4-grams, hashed.

    Each feature adds its weight, with a sign, to one coordinate; BLAKE2b of the feature says which,
    so the vectors are the same everywhere and for ever (feature hashing: Weinberger et al.,
    "Feature hashing for large scale multitask learning", ICML 2009). The inner product of two
    vectors is, in expectation, that of the captions' feature counts: captions that share words, or
    parts of words, are close; word order is lost. A caption without a letter or digit gives the zero
    vector, which networks take for "no condition".

    Args:
        captions: N strings.
        dim: length of the vectors, at least 1; the estimate's deviation falls as dim^-1/2.
    """
    if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
        raise TypeError("captions: must be a sequence of strings")
    if dim < 1:
        raise ValueError(f"dim: must be at least 1; got {dim}")
    vectors = torch.zeros(len(captions), dim, dtype=torch.float64, device="cpu")
    for row, caption in enumerate(captions):
        for feature, weight in _features(caption):
            digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
            bits = int.from_bytes(digest, "little")
            vectors[row, (bits >> 1) % dim] += weight if bits & 1 else -weight
    norms = vectors.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, vectors).to(torch.float32)


def caption_conditioned(data: Dataset, dim: int = 64) -> Dataset:
    """The data set with its captions' vectors for labels, for a network with `condition_dim=dim`.

    Raises:
        ValueError: the data set has no captions.
    """
    if data.captions is None:
        raise ValueError(f"data: must have captions; {data.name} has none")
    return replace(data, labels=caption_vectors(data.captions, dim))
