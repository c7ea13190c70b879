"""What the rows of a study say: means over seeds, differences in pairs, and their t intervals, as text.

Rows are dicts of strings, as they stand in a CSV file, with the columns task, arm and seed among others. `values` are
{arm: {seed: value}}. Arms with the same seed share data, start and order, so they are compared in pairs.
"""

from collections import defaultdict
from functools import cache
from math import pi
from statistics import mean, stdev

import numpy as np
import torch


@cache
def t_quantile(level, df):
    """The t within +- which a share `level` of Student's distribution lies, with df degrees of freedom.

    With t = sqrt(df) tan(angle) its density is proportional to cos(angle)^(df - 1), so that a sum over angles will do.
    """
    edges = np.linspace(0, pi / 2, 10_001)
    shares = np.cumsum(np.cos((edges[:-1] + edges[1:]) / 2) ** (df - 1))
    return float(df**0.5 * np.tan(np.interp(level * shares[-1], shares, edges[1:])))


def interval(values, level=0.95):
    """The t interval of a mean: [low, high]."""
    reach = t_quantile(level, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return [mean(values) - reach, mean(values) + reach]


def paired(values, *arms):
    """The values {arm: {seed: value}} of these arms, a list each, over the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(values[arm]) for arm in arms)))
    return [[values[arm][seed] for seed in seeds] for arm in arms]


def distinct(rows, column):
    """The values of a column, each once, in order."""
    return list(dict.fromkeys(row[column] for row in rows))


def groups(rows):
    """What a report is about: every task, and where there are several, all of them together."""
    tasks = distinct(rows, "task")
    return [[task] for task in tasks] + ([tasks] if len(tasks) > 1 else [])


def values_of(rows, column, *tasks):
    """{arm: {seed: value}} of a column: means over the tasks, for the seeds that have run on all of them."""
    found = defaultdict(list)
    for row in rows:
        if row["task"] in tasks:
            found[row["arm"], int(row["seed"])].append(float(row[column]))
    values = defaultdict(dict)
    for (arm, seed), some in found.items():
        if len(some) == len(tasks):
            values[arm][seed] = mean(some)
    return dict(values)


def in_columns(lines):
    """Lists of cells -> text: the first column flush left, the others flush right."""
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    texts = []
    for first, *others in lines:
        texts.append(first.ljust(widths[0]) + "".join(cell.rjust(n + 2) for cell, n in zip(others, widths[1:])))
    return "\n".join(text.rstrip() for text in texts)


def number(x):
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.4f}" if x == 0 or abs(x) >= 0.001 else f"{x:.1e}"


def means(values, title, more):
    """A line for every arm: its number of seeds, their mean, s.d. and interval, and the means of {column: values}."""
    lines = [[title, *more, "seeds", "mean", "s.d.", "95 % interval"]]
    for arm, found in values.items():
        some = list(found.values())
        line = [f"  {arm}", *(number(mean(others[arm].values())) for others in more.values())]
        line += [str(len(some)), f"{mean(some):.4f}"]
        spread = [f"{stdev(some):.4f}", "[{:.4f}, {:.4f}]".format(*interval(some))] if len(some) > 1 else ["-", "-"]
        lines.append(line + spread)
    return in_columns(lines)


def differences(values, rivals, title, same=None):
    """A line for every arm and rival that share two seeds or more: the mean difference, its s.e. and interval.

    A difference whose 90 % interval lies within +- same is called "same": two one-sided tests at 5 %.
    """
    lines = [[title, "mean", "s.e.", "95 % interval", "below 0"]]
    for arm in values:
        for rival in rivals(arm, list(values)):
            gaps = [a - b for a, b in zip(*paired(values, arm, rival))]
            if len(gaps) < 2:
                continue
            error = stdev(gaps) / len(gaps) ** 0.5
            bounds = "[{:+.4f}, {:+.4f}]".format(*interval(gaps))
            below = f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}"
            least, most = interval(gaps, 0.9)
            if same is not None and -same < least and most < same:
                below += ", same"
            lines.append([f"  {arm} - {rival}", f"{mean(gaps):+.4f}", f"{error:.4f}", bounds, below])
    return in_columns(lines) if len(lines) > 1 else ""


def gaps_closed(losses, title, low="lora-4", high="lora-8"):
    """A line for every arm cut to the size of `low`: the share that it closes of the gap from `low` to `high`.

    The share is one of means; its interval is that of the mean of what each seed deviates from it (the delta method).
    """
    lines = [[title, "share", "95 % interval"]]
    for arm in losses:
        if "-to-4" not in arm or not {low, high} <= set(losses):
            continue
        lows, highs, mine = (torch.tensor(some, dtype=torch.float64) for some in paired(losses, low, high, arm))
        if len(lows) > 1:
            share = (lows - mine).mean() / (lows - highs).mean()
            deviations = (lows - mine) - share * (lows - highs)
            bounds = interval((share + deviations / (lows - highs).mean()).tolist())
            lines.append([f"  {arm}", f"{share:.2f}", "[{:.2f}, {:.2f}]".format(*bounds)])
    return in_columns(lines) if len(lines) > 1 else ""
