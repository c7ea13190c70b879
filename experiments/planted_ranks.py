"""Does SaLoRA find the ranks that are there? A student must copy a teacher = the same frozen network + known updates.

    python experiments/planted_ranks.py                                      a bank of 16 linear maps of 32 x 32
    python experiments/planted_ranks.py --network transformer --seeds 0 1 2  the tiny encoder with its word scores

Every matrix gets an update of a planted rank from 0 to 8. The student has rank 8 everywhere, sees only the teacher's
outputs, and may keep exactly the parameters that the teacher's updates need. Compared are
    ours, paper    SaLoRA by those recipes
    svd            LoRA of rank 8, cut by singular values to the same budget when it is trained
    uniform        LoRA of one rank for all matrices, the largest that fits the budget
and, if --methods names them, ours with one decision taken differently.
One row a length, seed, noise and method is added to a CSV file in --out; table and picture come from all its rows.
"""

import argparse
import copy
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from budget import FixedRanks, RankAllocator, Recipe, freeze_gates, total_parameters
from cli.files import append, has_row, make_folder, read_table
from cli.flags import positive
from cli.runs import STUDY, errors_as_lines
from cli.setup import TARGETS
from glue.metrics import spearman
from glue.pretrain import mini_encoder
from hub.checkpoints import write_atomically
from salora import adapt, canonicalize, prune, salora_layers
from tiny_transformer import MaskedLM, load_pretrained
from train_glue_mini import fine_tune

RANK = 8
COLUMNS = "network steps method noise seed right correlation share loss planted learned".split()
METHODS = {
    "ours": Recipe.ours(),
    "paper": Recipe.paper(),
    "svd": None,
    "uniform": None,
    "spread 0": Recipe.ours(spread=0.0),
    "not canonical": Recipe.ours(canonical=False, spread=0.0),
    "beta 0.1": Recipe.ours(beta=0.1),
    "warmup 0": Recipe.ours(warmup=0.0),
    "rule median": Recipe.ours(rule="median"),
    "quadratic": Recipe.ours(controller="quadratic"),
    "no restart": Recipe.ours(restart=False),
    "window 0.5-0.8": Recipe.ours(window=(0.5, 0.8)),
}  # the first four, unless others are asked for


class Bank(nn.ModuleList):
    """Independent linear maps: x (batch, maps, k) -> (batch, maps, d)."""

    def forward(self, x):
        return torch.stack([f(x[:, i]) for i, f in enumerate(self)], dim=1)


class WordScores(MaskedLM):
    """Token ids (batch, seq) -> the scores of every word at every place (batch, seq, vocab)."""

    def forward(self, ids):
        return super().forward(self.encoder(ids))


def bank(seed, rows):
    """(a fresh network, its targets, inputs)"""
    torch.manual_seed(seed)
    return Bank(nn.Linear(32, 32, bias=False) for _ in range(16)), [r"\d+"], torch.randn(rows, 16, 32)


def transformer(seed, rows):
    torch.manual_seed(seed)
    encoder, config = load_pretrained(mini_encoder())
    return WordScores(encoder).eval(), TARGETS, torch.randint(5, config.vocab_size, (rows, 12))


NETWORKS = {"bank": (bank, 1200, 64, 5e-3), "transformer": (transformer, 8000, 32, 3e-3)}  # steps, batch size, lr


def plant(network, targets, generator):
    """Give every target an update of a random rank with singular values from 0.5 to 1.5. Returns the ranks by name."""
    adapt(network, targets, RANK, alpha=RANK)
    ranks = {}
    for name, layer in salora_layers(network).items():
        for p in (layer.B, layer.A.T):
            p.data.copy_(torch.linalg.qr(torch.randn(p.shape, generator=generator))[0])  # orthonormal columns
        layer.B.data *= 0.5 + torch.rand(RANK, generator=generator)
        ranks[name] = int(torch.randint(RANK + 1, (), generator=generator))
        layer.gate.fix((torch.arange(RANK) < ranks[name]).float())
    return ranks


def cut_by_svd(layers, density):
    """Keep the largest singular values of all updates, as many as fit the budget."""
    for layer in layers:
        canonicalize(layer)
        layer.gate.log_theta.data = layer.B.norm(dim=0) * layer.A.norm(dim=1)
    freeze_gates(layers, density)
    for layer in layers:
        prune(layer)


def learn(kind, steps, method, noise, seed, allocator_of=None):
    """Plant, train, count: one row of the results.

    allocator_of(network, optimizer, steps, density) makes the allocator of a method that METHODS does not have.
    """
    make, _, size, lr = NETWORKS[kind]
    network, targets, inputs = make(seed, steps * size)
    test = make(seed + 10**6, 256)[2]
    generator = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(network)
    planted = plant(teacher, targets, generator)
    layers = list(salora_layers(teacher).values())
    needed = sum(rank * layer.triplet_size for rank, layer in zip(planted.values(), layers))
    density = needed / total_parameters(layers)
    uniform = needed // sum(layer.triplet_size for layer in layers)

    def batch_of(rows, model, device):
        x = torch.stack([row for row, in rows])  # a row of data is (its input,)
        with torch.no_grad():
            y = teacher.eval()(x)
        return (x,), y + noise * torch.randn(y.shape, generator=generator)

    torch.manual_seed(seed)
    rank, recipe = uniform if method == "uniform" else RANK, METHODS.get(method)
    adapt(network, targets, rank, alpha=rank)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr)
    if allocator_of:
        allocator = allocator_of(network, optimizer, steps, density)
    elif recipe is None:
        allocator = FixedRanks(network, steps, Recipe.ours().warmup)
    else:
        allocator = RankAllocator(network, optimizer, steps, density, recipe, seed)
    rows = [(x,) for x in inputs]
    fine_tune(network, rows, optimizer, allocator, lr=lr, batch_size=size, seed=seed, batch_of=batch_of)
    layers = salora_layers(network)
    if method == "svd":
        cut_by_svd(layers.values(), density)
    learned = {name: layer.r for name, layer in layers.items()}
    with torch.no_grad():
        loss = (network.eval()(test) - teacher(test)).square().mean().item()
    kept = sum(layer.r * layer.triplet_size for layer in layers.values())
    right = mean(learned[name] == planted[name] for name in planted)
    correlation = spearman(list(learned.values()), list(planted.values()))
    values = [kind, steps, method, noise, seed, right, correlation, kept / needed, loss, list(planted.values())]
    return dict(zip(COLUMNS, [*values, list(learned.values())], strict=True))


def table(rows):
    """A line a length, noise and method, means over seeds."""
    head = f"{'steps':>6} {'noise':>6} {'method':<14} {'seeds':>5} {'right':>7} {'correlation':>12}"
    lines = [f"{head} {'budget':>7} {'loss':>9} +-"]
    for group in dict.fromkeys((row["steps"], row["noise"], row["method"]) for row in rows):
        some = [row for row in rows if (row["steps"], row["noise"], row["method"]) == group]
        right, correlation, share, loss = ([float(row[key]) for row in some] for key in COLUMNS[5:9])
        spread = f"{stdev(loss) / len(loss) ** 0.5:.1e}" if len(loss) > 1 else "-"
        line = f"{group[0]:>6} {group[1]:>6} {group[2]:<14} {len(some):>5} {mean(right):>7.1%}"
        lines.append(f"{line} {mean(correlation):>12.3f} {mean(share):>7.3f} {mean(loss):>9.1e} {spread}")
    return "\n".join(lines)


def draw(rows, path):
    """Planted and learned ranks side by side: for the first length, noise and seed, a column a method."""
    from matplotlib.figure import Figure

    first = [row for row in rows if all(row[key] == rows[0][key] for key in ("steps", "noise", "seed"))]
    columns = {"planted": json.loads(first[0]["planted"])}
    columns |= {row["method"]: json.loads(row["learned"]) for row in first}
    figure = Figure(figsize=(1.5 + 0.9 * len(columns), 1 + 0.28 * len(columns["planted"])), layout="constrained")
    axis = figure.subplots()
    grid = list(zip(*columns.values(), strict=True))
    axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=RANK, aspect="auto")
    for i, row in enumerate(grid):
        for j, rank in enumerate(row):
            wrong = rank != row[0]
            color = "tab:red" if wrong else "white" if rank > 0.6 * RANK else "black"
            axis.text(j, i, rank, ha="center", va="center", color=color, weight="bold" if wrong else "normal")
    axis.set_xticks(range(len(columns)), columns)
    about = "{network}, seed {seed}, noise {noise}, {steps} steps".format(**first[0])
    axis.set(ylabel="matrix", title=f"ranks, planted and found (wrong ones red)\n{about}")
    figure.savefig(path, format="png", dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="bank", help="what is copied (default bank)")
    parser.add_argument("--steps", type=positive, metavar="N", help="how long a student trains (default 1200 for the "
                        "bank, 8000 for the transformer)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=range(20), metavar="S", help="default 0 to 19")
    parser.add_argument("--noise", type=float, nargs="+", metavar="SD", help="of the teacher's outputs (default: 0.1 "
                        "and 1 for the bank, whose outputs are near 1, and 0 for the transformer)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:4], metavar="M",
                        help=f"of {', '.join(METHODS)} (default: the first four)")
    parser.add_argument("--quick", action="store_true", help="one seed, one noise")
    parser.add_argument("--out", default="runs/planted-ranks", metavar="DIR", help="default runs/planted-ranks")
    args = parser.parse_args(argv)
    out = Path(args.out)
    path = out / f"{args.network}.csv"
    noises = args.noise or ([0.0] if args.network == "transformer" else [0.1, 1.0])
    steps = args.steps or NETWORKS[args.network][1]
    with errors_as_lines(parser, hint=STUDY):
        make_folder(out)
        for seed in args.seeds[:1] if args.quick else args.seeds:
            for noise in noises[:1] if args.quick else noises:
                for method in args.methods:
                    if has_row(path, steps=steps, method=method, noise=noise, seed=seed):
                        continue
                    started = time.time()
                    with redirect_stdout(None):
                        row = learn(args.network, steps, method, noise, seed)
                    append(path, row)
                    seconds = time.time() - started
                    right = f"{row['right']:.0%} of the ranks right"
                    print(f"seed {seed}, noise {noise}, {method}: {right}, {seconds:.0f} s")
        rows = read_table(path)
        print(table(rows))
        write_atomically(out / f"{args.network}.png", lambda path: draw(rows, path))
        print(f"see {path} and {out / args.network}.png")
        return rows


if __name__ == "__main__":
    main()
