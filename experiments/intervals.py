"""Bootstrap intervals over seeds, and arms compared in pairs."""

import torch


def resamples(n, times=10_000):
    """Indices (times, n), drawn with replacement: the bootstrap over seeds. The same in every call."""
    return torch.randint(n, (times, n), generator=torch.Generator().manual_seed(0))


def interval(values, level=0.95):
    """The bootstrap interval of a mean."""
    means = torch.tensor(values, dtype=torch.float64)[resamples(len(values))].mean(1)
    return means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()


def share_closed(low, high, ours):
    """(share, its 95 % bootstrap interval) of the gap between the losses `low` and `high` that `ours` closes."""
    low, high, ours = (torch.tensor(some, dtype=torch.float64) for some in (low, high, ours))
    index = resamples(len(low))
    shares = (low - ours)[index].mean(1) / (low - high)[index].mean(1)
    bounds = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ((low - ours).mean() / (low - high).mean()).item(), bounds


def paired(losses, *arms):
    """The losses of these arms, a list each, over the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(losses[arm]) for arm in arms)))
    return [[losses[arm][seed] for seed in seeds] for arm in arms]
