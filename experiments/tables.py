"""What the rows of a study say: means over seeds, differences in pairs, bootstrap intervals, as tables of text.

Rows are dicts of texts, as they stand in a CSV file, with the columns task, arm and seed among others. `values` are
{arm: {seed: value}}. Arms of one seed share data, start and order, so they are compared in pairs.
"""

from collections import defaultdict
from statistics import mean, stdev

import torch


def resamples(n, times=10_000):
    """Indices (times, n), drawn with replacement: the bootstrap over seeds. The same in every call."""
    return torch.randint(n, (times, n), generator=torch.Generator().manual_seed(0))


def interval(values, level=0.95):
    """The bootstrap interval of a mean: [low, high]."""
    means = torch.tensor(values, dtype=torch.float64)[resamples(len(values))].mean(1)
    return means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()


def share_closed(low, high, ours):
    """(share, its 95 % bootstrap interval) of the gap between the losses `low` and `high` that `ours` closes."""
    low, high, ours = (torch.tensor(some, dtype=torch.float64) for some in (low, high, ours))
    index = resamples(len(low))
    shares = (low - ours)[index].mean(1) / (low - high)[index].mean(1)
    bounds = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ((low - ours).mean() / (low - high).mean()).item(), bounds


def paired(values, *arms):
    """The values {arm: {seed: value}} of these arms, a list each, over the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(values[arm]) for arm in arms)))
    return [[values[arm][seed] for seed in seeds] for arm in arms]


def distinct(rows, column):
    """The values of a column, each once, in order."""
    return list(dict.fromkeys(row[column] for row in rows))


def values_of(rows, column, task):
    """{arm: {seed: value}} of a column on one task."""
    found = defaultdict(dict)
    for row in rows:
        if row["task"] == task:
            found[row["arm"]][int(row["seed"])] = float(row[column])
    return dict(found)


def means_over(rows, column, tasks):
    """{arm: {seed: mean over the tasks}}, of seeds that have run on all of them."""
    found = {task: values_of(rows, column, task) for task in tasks}
    means = {}
    for arm in distinct(rows, "arm"):
        seeds = set.intersection(*(set(found[task].get(arm, ())) for task in tasks))
        means[arm] = {seed: mean(found[task][arm][seed] for task in tasks) for seed in sorted(seeds)}
    return means


def in_columns(lines):
    """Lists of cells -> text: the first column flush left, the others flush right."""
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    texts = []
    for first, *others in lines:
        texts.append(first.ljust(widths[0]) + "".join(cell.rjust(n + 2) for cell, n in zip(others, widths[1:])))
    return "\n".join(text.rstrip() for text in texts)


def means(rows, column, task):
    """A line an arm: its size, how many seeds, and the mean and standard deviation over them."""
    sizes = values_of(rows, "size", task)
    lines = [[f"{task}: {column}, means over seeds", "size", "seeds", "mean", "s.d."]]
    for arm, found in values_of(rows, column, task).items():
        values, size = list(found.values()), mean(sizes[arm].values())
        deviation = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        lines.append([f"  {arm}", f"{size:.4f}", f"{len(values)}", f"{mean(values):.4f}", deviation])
    return in_columns(lines)


def differences(values, rivals, title, same=None):
    """A line an arm and rival that share two seeds or more: the mean difference, and its interval over these seeds.

    values: {arm: {seed: value}}. same: a difference whose 90 % interval lies within +- same is called that, which is
    two one-sided tests at 5 %.
    """
    lines = [[title, "mean", "95 % interval", "below 0"]]
    for arm in values:
        for rival in rivals(arm, list(values)):
            gaps = [a - b for a, b in zip(*paired(values, arm, rival))]
            if len(gaps) < 2:
                continue
            low, high = interval(gaps)
            below = f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}"
            least, most = interval(gaps, 0.9)
            if same is not None and -same < least and most < same:
                below += ", same"
            lines.append([f"  {arm} - {rival}", f"{mean(gaps):+.4f}", f"[{low:+.4f}, {high:+.4f}]", below])
    return in_columns(lines) if len(lines) > 1 else ""
