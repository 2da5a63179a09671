"""How sure a mean is."""

import numpy as np


def bootstrap(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95% interval of the mean of values [pairs, pictures]: pairs are drawn anew, then pictures within each.

    NaN stands for a picture that is not there.
    """
    rng = np.random.default_rng(0)
    pairs, pictures = values.shape
    rows = rng.integers(pairs, size=(draws, pairs, 1))
    columns = rng.integers(pictures, size=(draws, pairs, pictures))
    drawn = values[rows, columns].reshape(draws, -1)
    there = ~np.isnan(drawn)
    means = np.where(there, drawn, 0.0).sum(1)[there.any(1)] / there.sum(1)[there.any(1)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
