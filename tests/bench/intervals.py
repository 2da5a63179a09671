"""How sure a mean is."""

import numpy as np


def bootstrap(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95% interval of the mean of values [pairs, pictures]: pairs are drawn anew, then pictures within each.

    NaN stands for a picture that is not there.
    """
    rows, columns = _drawn(values.shape, draws)
    drawn = values[rows, columns].reshape(draws, -1)
    there = ~np.isnan(drawn)
    means = np.where(there, drawn, 0.0).sum(1)[there.any(1)] / there.sum(1)[there.any(1)]
    return interval(means)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of drawn values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def resampled(values: np.ndarray, draws: int = 1000) -> np.ndarray:
    """Means [draws, ...] of values [..., pairs, pictures], drawn anew as above, the same way for all that go before."""
    rows, columns = _drawn(values.shape[-2:], draws)
    return np.stack([values[..., r, c].mean((-2, -1)) for r, c in zip(rows, columns, strict=True)])


def _drawn(shape: tuple[int, int], draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [draws, pairs, 1] and [draws, pairs, pictures]."""
    rng, (pairs, pictures) = np.random.default_rng(0), shape
    return rng.integers(pairs, size=(draws, pairs, 1)), rng.integers(pictures, size=(draws, pairs, pictures))
