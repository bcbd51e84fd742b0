"""`MixedPairs`: a teacher's pairs with a share of real ones among them, as one store."""

from __future__ import annotations

from fractions import Fraction

import torch

from rfkernels.training.option_checks import number, require
from rfkernels.training.pairs import PairStore, StoredPairs

__all__ = ["MixedPairs"]


class MixedPairs(PairStore):
    """Two stores read as one, in which a fraction of the rows are of the second.

    The rows alternate evenly. A pass over the whole takes every pair of `made` once (but for the
    last few, where the counts do not divide) and as many of `real` as the fraction asks for, from
    the first on and around again; so with few real pairs a held-out one may also be trained on.

    Args:
        made: a teacher's pairs, of `make_pairs`.
        real: pairs of real data, of `invert_data`; their conditions have the same names.
        fraction: of `real`, in (0, 1); rounded to a fraction with a denominator up to 1000.

    Raises:
        ValueError: shapes or conditions that differ, or a fraction out of range.
    """

    def __init__(self, made: PairStore, real: PairStore, fraction: float) -> None:
        for name, store in (("made", made), ("real", real)):
            if not isinstance(store, PairStore):
                raise TypeError(f"{name}: must be a PairStore; got {type(store).__name__}")
        share = Fraction(number("fraction", fraction)).limit_denominator(1000)
        require(0 < share < 1, "fraction", "must be in (0, 1), from 0.001 to 0.999", fraction)
        if real.sample_shape != made.sample_shape:
            raise ValueError(
                f"real: samples must have the shape of made's, {made.sample_shape}; got "
                f"{real.sample_shape}"
            )
        names = [
            sorted(s.stored(torch.zeros(1, dtype=torch.int64, device="cpu")).condition)
            for s in (made, real)
        ]
        if names[0] != names[1]:
            raise ValueError(f"real: conditions must be made's, {names[0]}; got {names[1]}")
        self._made, self._real, self._share = made, real, share
        self.folder, self.seed, self.sample_shape = made.folder, made.seed, made.sample_shape
        kept = share.denominator - share.numerator
        self.manifest = {
            **made.manifest,
            "count": len(made) * share.denominator // kept,
            "x0": "stored",
            "real_fraction": [share.numerator, share.denominator],
            "real": real.manifest,
        }

    @property
    def x1(self) -> torch.Tensor:
        """Every x1, (len, *sample_shape), in the order of the rows."""
        return self.stored(torch.arange(len(self), device="cpu")).x1

    @property
    def labels(self) -> torch.Tensor | None:
        """The condition y of the pairs of both stores; None without it."""
        made, real = self._made.labels, self._real.labels
        return None if made is None else torch.cat([made, real.to(made.dtype)])

    def stored(self, indices: torch.Tensor) -> StoredPairs:
        """The rows of these positions, int64 (B,), their noise drawn where it is not stored."""
        p, q = self._share.numerator, self._share.denominator
        before = indices * p // q  # real pairs in the rows before
        is_real = (indices + 1) * p // q > before
        made = self._made.batch((indices - before)[~is_real])
        real = self._real.batch(before[is_real] % len(self._real))

        def merged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            out = one.new_empty((len(indices), *one.shape[1:]))
            out[~is_real], out[is_real] = one, other.to(one.dtype)
            return out

        condition = {name: merged(value, real[2][name]) for name, value in made[2].items()}
        return StoredPairs(merged(made[1], real[1]), indices, merged(made[0], real[0]), condition)
