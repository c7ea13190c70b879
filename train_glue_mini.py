"""Fine-tune an encoder on a GLUE task, or on a generated stand-in, with SaLoRA: Algorithm 1 of Hu et al. 2023.

    python train_glue_mini.py                                                       mini-cola, two CPU cores, a minute
    python train_glue_mini.py --task all --method lora                              the eight generated tasks
    python train_glue_mini.py --task sst2 --data GLUE --weights ROBERTA --device cuda

`fine_tune` is the algorithm, one flat loop; around it stand the command line, checkpoints and pictures.
Left out: hyper-parameter search, choosing the best epoch on the dev set, ensembles.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from budget import GateSchedule, Lagrangian, expected_density, freeze_gates, kept_density, resample
from budget import kept_parameters, total_parameters
from glue import report
from glue.metrics import METRICS
from glue.mini import TASKS as MINI_TASKS
from glue.pretrain import mini_encoder
from glue.tasks import NAMES, load_task, task_of
from glue.tokens import MiniTokenizer, collate, load_tokenizer
from salora import adapt, adapter_state, canonicalize, load_adapter_state, orthogonality, prune, salora_layers
from salora import save_adapter
from tiny_transformer import SequenceClassifier, load_pretrained, read_torch

TARGETS = ["query", "key", "value", "out", "up", "down"]  # all six matrices of a layer, as in the paper
RECIPES = {  # decisions that go together; a single flag overrides its part
    "exact": {"rule": "budget", "survivors": "one", "canonical": True, "beta": 0.0, "controller": "quadratic"},
    "paper": {"rule": "median", "survivors": "median", "canonical": False, "beta": 0.1, "controller": "quadratic"},
}
LR = {"salora": (3e-3, 1e-3), "lora": (3e-3, 1e-3), "full": (1e-3, 5e-5), "head": (3e-3, 1e-3)}  # mini, official


GATE_FLAGS = ["recipe", "density", "rule", "survivors", "canonical", "beta", "controller", "gate_lr", "window"]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, without the usage


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def auto_or_float(text):
    return None if text == "auto" else float(text)


def build_parser():
    """Every flag with its help. None stands for a default that depends on other flags: see `settle`."""
    p = Parser(prog="train_glue_mini.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what to train")
    g.add_argument("--task", choices=[*NAMES, "all"], default="mini-cola", metavar="TASK",
                   help="mini-cola (default), all (the eight generated tasks), or one of " + ", ".join(NAMES[1:]))
    g.add_argument("--method", choices=list(LR), default="salora", metavar="METHOD",
                   help="salora (default); lora: the same with all gates open; full: every weight; head: only the head")
    g.add_argument("--data", metavar="DIR", help="folder with GLUE's official files, for an official task")
    g.add_argument("--weights", metavar="DIR", help="checkpoint folder of a RoBERTa- or BERT-family encoder; "
                   "without it a tiny encoder is pre-trained on first use")
    g.add_argument("--rows", type=positive, metavar="N", help="use only the first N training rows")
    g = p.add_argument_group("adapters and their budget")
    g.add_argument("--rank", type=positive, default=8, metavar="R", help="triplets a matrix at the start (default 8)")
    g.add_argument("--alpha", type=float, default=16.0, help="an update's scale is alpha / rank (default 16)")
    g.add_argument("--recipe", choices=list(RECIPES), help="exact (default): what measures best; "
                   "paper: as published; the flags below override parts of it")
    g.add_argument("--density", type=float, metavar="B", help="share of the adapter parameters to keep (default 0.5)")
    g.add_argument("--rule", choices=["budget", "median"], help="which triplets stay: the best that fit the budget, "
                   "or those whose median gate is positive")
    g.add_argument("--survivors", choices=["one", "median"], help="what a kept gate becomes")
    g.add_argument("--canonical", action=argparse.BooleanOptionalAction,
                   help="rotate the triplets into their singular basis when the gates' window opens")
    g.add_argument("--beta", type=float, help="weight of the orthogonal regulariser")
    g.add_argument("--controller", choices=["quadratic", "sgd", "linear"], help="how lambda drives C to the density: "
                   "quadratic penalty by Adam, the same by plain SGD, or linear + quadratic with target warm-up")
    g.add_argument("--gate-lr", type=auto_or_float, metavar="ETA", help="step length of log theta and lambda; "
                   "auto (default): max(0.01, 14 / steps in the window)")
    g.add_argument("--window", type=float, nargs=2, metavar=("START", "END"), help="the gates train between these "
                   "fractions of all steps (default 0.2 0.5)")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=positive, metavar="N", help="passes over the training rows (default 8 on a "
                   "generated task, 3 on an official one)")
    g.add_argument("--steps", type=positive, metavar="N", help="optimiser steps, instead of --epochs")
    g.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows a step (default 32)")
    g.add_argument("--lr", type=float, help="learning rate of A, B and the head (default by method)")
    g.add_argument("--max-length", type=positive, default=128, metavar="N", help="tokens a row at most (default 128)")
    g.add_argument("--seed", type=int, nargs="+", default=[0], metavar="S", help="one or more, one run each (default 0)")
    g.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    g = p.add_argument_group("output")
    g.add_argument("--out", metavar="DIR", help="a new folder for the run (default runs/TASK-METHOD-sSEED)")
    g.add_argument("--resume", metavar="RUN", help="go on with an interrupted run; its other settings come from there")
    return p  # fmt: skip


def settle(args):
    """Fill in the defaults that depend on other flags. Raises ValueError where flags do not go together."""
    given = [flag for flag in GATE_FLAGS if getattr(args, flag) is not None]
    if args.method != "salora" and given:
        flag = "--" + given[0].replace("_", "-")
        raise ValueError(f"{flag} is about trained gates, which method {args.method} has not: drop it")
    for flag, value in {**RECIPES[args.recipe or "exact"], "density": 0.5, "window": [0.2, 0.5]}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.method == "lora":  # gates open to the end, then all kept
        args.density, args.window, args.beta = 1.0, [1.0, 1.0], 0.0
    official = args.task not in MINI_TASKS
    args.lr = args.lr or LR[args.method][official]
    args.epochs = args.epochs or (3 if official else 8)
    Lagrangian(args.density), GateSchedule(1, *args.window)  # they check their values
    args.device = pick_device(args.device)
    return args


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    number = name.removeprefix(kind).removeprefix(":") or "0"
    if not number.isdecimal() or int(number) >= there.get(kind, 0):
        raise ValueError(f"no device {name!r} here; there are {there['cuda']} CUDA devices; use auto, cpu, cuda or mps")
    return name


def prepare(args):
    """Data, tokens and model of a run, everything that bad input can break. Returns (model, train, dev)."""
    task, mini = task_of(args.task), args.task in MINI_TASKS
    train, dev = load_task(args.task, args.data)
    if args.weights is None and not mini:
        raise ValueError(f"task {args.task} needs --weights DIR, the checkpoint folder of a RoBERTa or BERT encoder")
    folder = args.weights or mini_encoder(device=args.device)
    encoder, config = load_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        tokenizer = MiniTokenizer()
        if not mini or config.vocab_size < len(tokenizer.words) or config.pad_token_id != tokenizer.pad:
            raise FileNotFoundError(f"no tokenizer.json, vocab.json or vocab.txt in {folder}")
    torch.manual_seed(args.seed)
    model = SequenceClassifier(encoder, task.num_labels)
    if args.method in ("salora", "lora"):
        adapt(model, TARGETS, args.rank, args.alpha).classifier.requires_grad_(True)
    if args.method == "head":
        model.encoder.requires_grad_(False)
    length = min(args.max_length, config.max_length)
    train, dev = ([*zip(tokenizer.encode(rows, length), [r[2] for r in rows])] for rows in (train[: args.rows], dev))
    return model.to(args.device), train, dev


def batch_of(rows, model, device):
    """Rows ((ids, type ids), label) -> (inputs for the model, labels (batch,))."""
    config = model.encoder.config
    ids, mask, types = collate([encoded for encoded, _ in rows], config.pad_token_id, device)
    labels = torch.tensor([label for _, label in rows], device=device)
    return (ids, mask, types if config.type_vocab_size > 1 else None), labels


def task_loss(outputs, labels):
    """Cross-entropy for classes, squared error for scores."""
    return F.mse_loss(outputs[:, 0], labels) if outputs.shape[1] == 1 else F.cross_entropy(outputs, labels)


@torch.no_grad()
def predict(model, rows, device):
    """A class number or a score for every row."""
    model.eval()
    outputs = torch.cat([model(*batch_of(rows[i : i + 128], model, device)[0]) for i in range(0, len(rows), 128)])
    return (outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)).tolist()


def fine_tune(args, model, train, dev, out, saved=None):
    """Algorithm 1. Leaves a checkpoint in `out` after every epoch. Returns (log: a list of rows, C at T_end)."""
    if saved:
        load_adapter_state(model, saved["adapter"])
    layers = list(salora_layers(model).values())
    per_epoch = math.ceil(len(train) / args.batch_size)
    total = args.steps or args.epochs * per_epoch
    schedule = GateSchedule(total, *args.window)
    eta = args.gate_lr or max(0.01, 14 / max(1, schedule.window))  # log theta has about 14 to travel

    thetas = [layer.gate.log_theta for layer in layers]
    weights = [p for p in model.parameters() if p.requires_grad and all(p is not theta for theta in thetas)]
    optimizer = torch.optim.AdamW(weights, lr=args.lr)
    GateOptimizer = torch.optim.SGD if args.controller == "sgd" else torch.optim.Adam
    gate_optimizer = GateOptimizer(thetas, lr=eta) if thetas else None
    lagrangian = Lagrangian(args.density, eta, args.controller).to(args.device)
    first, log, C_end, seconds = 0, [], None, 0.0
    if saved:
        first, log, C_end, seconds = saved["step"], saved["log"], saved["C_end"], saved["seconds"]
        load_optimizers(saved, optimizer, gate_optimizer, lagrangian)
    else:
        freeze_gates(layers, 1.0)  # open until T_start: plain LoRA

    model.train()
    started, every, running, counted = time.time(), max(1, total // 200), 0.0, 0
    for step in range(first, total + 1):
        phase, (epoch, place) = schedule.phase(step), divmod(step, per_epoch)
        if place == 0 and step < total:
            if step > first:
                kept = seconds + time.time() - started
                save_checkpoint(out, args, step, model, optimizer, gate_optimizer, lagrangian, log, C_end, kept)
            generator = torch.Generator().manual_seed(1000 * args.seed + epoch)  # an epoch's rows and noise
            torch.manual_seed(1000 * args.seed + epoch)  # and dropout: a resumed run needs no more than this
            order = torch.randperm(len(train), generator=generator).tolist()

        if step == schedule.T_start and args.method == "salora":
            for layer in layers:
                layer.gate.fixed = None
                if args.canonical:
                    canonicalize(layer)
                    optimizer.state.pop(layer.A, None), optimizer.state.pop(layer.B, None)
        if step == schedule.T_end and layers:
            C_end = expected_density(layers).item()
            freeze_gates(layers, args.density, args.rule, args.survivors)
            for layer in layers:
                prune_with_state(layer, optimizer)
        if step == total:
            break

        rows = [train[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]]
        inputs, labels = batch_of(rows, model, args.device)
        if phase == "window":
            resample(layers, generator)  # one draw an optimiser step
        loss = task_loss(model(*inputs), labels)
        objective = loss
        if args.beta and layers:
            objective = objective + args.beta * orthogonality(layers)  # Eq. (9)
        if phase == "window":
            progress = (step - schedule.T_start) / schedule.window
            objective = objective + lagrangian(expected_density(layers), progress)  # Eq. (12)

        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / total)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()  # down: A, B, head
        if phase == "window":
            gate_optimizer.step()  # down: log theta
            gate_optimizer.zero_grad()
            lagrangian.ascend()  # up: lambda

        running, counted = running + loss.detach(), counted + 1
        if (step + 1) % every == 0 or step + 1 == total:
            log.append(log_row(step + 1, phase, running.item() / counted, layers, lagrangian))
            running, counted = 0.0, 0
            if len(log) % 10 == 0 or step + 1 == total:
                pace = (time.time() - started) / (step + 1 - first)  # seconds a step
                line = report.status_line(log[-1], total, args.density, args.batch_size / pace)
                print(f"{line} | eta {pace * (total - step - 1):.0f} s", flush=True)
    return log, C_end, seconds + time.time() - started


def log_row(step, phase, loss, layers, lagrangian):
    """One row of log.csv, the only place where training waits for the device."""
    row = {"step": step, "phase": phase, "loss": loss, "C": None, "kept": None, "triplets": "", "lambda": None}
    if layers:
        kept = sum(int((layer.gate.settled() > 0).sum()) for layer in layers)
        row.update(C=expected_density(layers).item(), kept=kept_density(layers), triplets=f"{kept}/{sum(x.r0 for x in layers)}")
        row["lambda"] = lagrangian.lam.sum().item()
    return row


def prune_with_state(layer, optimizer):
    """`prune`, and the same cut through the optimiser's moments of A and B."""
    old = (layer.A, layer.B)
    kept = prune(layer)
    for before, after, axis in zip(old, (layer.A, layer.B), (0, 1)):
        state = optimizer.state.pop(before, {})
        optimizer.state[after] = {k: v.index_select(axis, kept) if v.dim() == 2 else v for k, v in state.items()}
        for group in optimizer.param_groups:
            group["params"] = [after if p is before else p for p in group["params"]]


def save_checkpoint(out, args, step, model, optimizer, gate_optimizer, lagrangian, log, C_end, seconds):
    """All that `fine_tune` needs to go on at `step`, the first of an epoch, as if it had never stopped."""
    state = {
        "format": "salora-run-1", "settings": vars(args), "step": step, "adapter": adapter_state(model),
        "optimizer": optimizer.state_dict(), "gate_optimizer": gate_optimizer and gate_optimizer.state_dict(),
        "lagrangian": lagrangian.state_dict(), "ascent": lagrangian.optimizer.state_dict(),
        "log": log, "C_end": C_end, "seconds": seconds,
    }  # fmt: skip
    report.whole(out / "checkpoint.pt", lambda path: torch.save(state, path))


def load_optimizers(saved, optimizer, gate_optimizer, lagrangian):
    optimizer.load_state_dict(saved["optimizer"])
    if gate_optimizer:
        gate_optimizer.load_state_dict(saved["gate_optimizer"])
    lagrangian.load_state_dict(saved["lagrangian"])
    lagrangian.optimizer.load_state_dict(saved["ascent"])


def run(args, out, model, train, dev, saved):
    """Train, score, write the run's files; returns the summary."""
    task, layers = task_of(args.task), salora_layers(model)
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    budgeted = total_parameters(layers.values())
    print(f"{args.task}, {args.method}, seed {args.seed} on {args.device}: {len(train)} training and {len(dev)} dev rows;")
    print(f"{everything:,} parameters, {trained:,} trained, {budgeted:,} budgeted; run folder {out}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    log, C_end, seconds = fine_tune(args, model, train, dev, out, saved)

    layers = salora_layers(model)
    predicted, gold = predict(model, dev, args.device), [label for _, label in dev]
    ranks = {name: layer.r for name, layer in layers.items()}
    summary = {
        "task": args.task, "method": args.method, "metric": task.metric, "score": METRICS[task.metric](predicted, gold),
        "density_target": args.density if layers else None, "density_expected": C_end,
        "density_kept": kept_density(layers.values()) if layers else None,
        "adapter_params_total": budgeted, "adapter_params_kept": kept_parameters(layers.values()), "ranks": ranks,
        "steps": log[-1]["step"], "seconds": round(seconds, 2), "seed": args.seed, "device": args.device,
    }  # fmt: skip
    title = f"{args.task}, {args.method}, seed {args.seed}: {task.metric} {summary['score']:.3f}"
    report.whole(out / "log.csv", lambda path: report.write_log(log, path))
    report.whole(out / "training.png", lambda path: report.draw_training(log, path, args.density, title))
    if ranks:
        report.whole(out / "ranks.png", lambda path: report.draw_ranks(ranks, args.rank, path, title))
        print(report.rank_table(ranks))
        print(f"kept {summary['adapter_params_kept']:,} of {budgeted:,} adapter parameters: {summary['density_kept']:.4f}")
    save_adapter(model, out / "adapter.pt")
    also = f", {task.also} {METRICS[task.also](predicted, gold):.4f}" if task.also else ""
    print(f"{args.task}: {task.metric} {summary['score']:.4f}{also} in {seconds:.1f} s; see {out}", flush=True)
    report.whole(out / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return summary


def plan(args, parser):
    """The runs that the command line asks for: a list of (settings, folder, checkpoint or None)."""
    if args.resume:
        more = [k for k, v in vars(args).items() if v != parser.get_default(k) and k != "resume"]
        if more:
            raise ValueError(f"--resume takes its settings from the run: drop --{more[0].replace('_', '-')}")
        path = Path(args.resume) / "checkpoint.pt"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: expected the folder of an interrupted run (a finished one has none)")
        saved = read_torch(path)
        if not isinstance(saved, dict) or saved.get("format") != "salora-run-1":
            raise ValueError(f"{path} is not a checkpoint of this program")
        return [(argparse.Namespace(**saved["settings"]), path.parent, saved)]
    settle(args)
    tasks = list(MINI_TASKS) if args.task == "all" else [args.task]
    many = len(tasks) * len(args.seed) > 1
    name = f"{args.task}-{args.method}" + ("" if many else f"-s{args.seed[0]}")
    folders = [Path(args.out)] if args.out else (Path("runs") / (name + (f"-{i}" if i else "")) for i in range(10**6))
    folder = next((folder for folder in folders if not folder.exists() or not any(folder.iterdir())), None)
    if folder is None:
        raise FileExistsError(f"{args.out} is not empty: choose another --out, or --resume an interrupted run")
    return [
        (argparse.Namespace(**{**vars(args), "task": task, "seed": seed}), folder / f"{task}-s{seed}" if many else folder, None)
        for task in tasks
        for seed in args.seed
    ]


def main(argv=None):
    """Returns the summary of the run, or {"runs": [summaries]} of several."""
    parser = build_parser()
    args = parser.parse_args(argv)

    def checked(function, *arguments):
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            parser.error(str(error))

    summaries = []
    jobs = checked(plan, args, parser)
    for settings, out, saved in jobs:
        summaries.append(run(settings, out, *checked(prepare, settings), saved))
    if len(jobs) == 1:
        return summaries[0]
    print(report.score_table(summaries))
    return {"runs": summaries}


if __name__ == "__main__":
    main()
