"""GLUE's metrics. Each takes predictions and gold labels, two sequences of equal length, and returns a float.

Correlations of a constant are 0 by definition here, as in scikit-learn's Matthews. Of a NaN they are NaN, as in SciPy.
"""

import numpy as np


def accuracy(predicted, gold):
    return float(np.mean(np.asarray(predicted) == np.asarray(gold)))


def f1(predicted, gold):
    """F1 of class 1: 2 tp / (2 tp + fp + fn)."""
    predicted, gold = np.asarray(predicted) == 1, np.asarray(gold) == 1
    hits, both = np.sum(predicted & gold), np.sum(predicted) + np.sum(gold)
    return float(2 * hits / both) if both else 0.0


def pearson(predicted, gold):
    """Covariance over the product of deviations."""
    x, y = (np.asarray(v, dtype=np.float64) - np.mean(v, dtype=np.float64) for v in (predicted, gold))
    constant = np.ptp(predicted) == 0 or np.ptp(gold) == 0  # whose x or y need not be exactly 0
    if np.isnan(x @ y):
        return float("nan")
    return 0.0 if constant else float(x @ y / np.sqrt((x @ x) * (y @ y)))


def matthews(predicted, gold):
    """Matthews' correlation of two binary labelings is their Pearson correlation."""
    return pearson(predicted, gold)


def spearman(predicted, gold):
    """Pearson correlation of ranks; equal values share their mean rank."""

    def ranks(values):
        if np.isnan(values).any():  # NumPy would take all NaN for one number and give it a rank
            return np.full(len(values), np.nan)
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return pearson(ranks(predicted), ranks(gold))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}
