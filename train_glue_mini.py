"""Fine-tune an encoder on a GLUE task, or on a generated stand-in, with SaLoRA: Algorithm 1 of Hu et al. 2023.

    python train_glue_mini.py                                                       mini-cola, two CPU cores, a minute
    python train_glue_mini.py --task all --method lora                              the eight generated tasks
    python train_glue_mini.py --task sst2 --data GLUE --weights ROBERTA --device cuda

`fine_tune` is the algorithm, one flat loop; around it stand what it needs before and what it leaves behind. Flags and
their defaults are in glue/flags.py. Left out: hyper-parameter search, choosing an epoch by its dev score, ensembles.
"""

import json
import math
import os
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from budget import (
    GateSchedule,
    Lagrangian,
    expected_density,
    freeze_gates,
    kept_density,
    project,
    resample,
    start_gates,
    total_parameters,
)
from cli import report
from cli.flags import build_parser, finished, plan
from cli.workers import sum_over_workers, workers
from glue.metrics import METRICS
from glue.mini import TASKS as MINI_TASKS
from glue.pretrain import mini_encoder
from glue.tasks import load_task, read_rows, task_of
from glue.tokens import batch_of, batches_of, tokenizer_for
from hub.checkpoints import read_torch
from salora import (
    adapt,
    adapter_state,
    canonicalize,
    load_adapter_state,
    orthogonality,
    prune,
    salora_layers,
    save_adapter,
)
from tiny_transformer import SequenceClassifier, load_pretrained

TARGETS = ["query", "key", "value", "out", "up", "down"]  # all six matrices of a layer, as in the paper


def build(args):
    """The model of a run, with its adapters, and `encode`: rows of sentences -> rows of token ids."""
    task, mini = task_of(args.task), args.task in MINI_TASKS
    if args.weights is None and not mini:
        raise ValueError(f"task {args.task} needs --weights DIR, the checkpoint folder of a RoBERTa or BERT encoder")
    folder = args.weights or mini_encoder(device=args.device)
    rates = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    encoder, config = load_pretrained(folder, **({} if args.dropout is None else dict.fromkeys(rates, args.dropout)))
    encoder.recompute = args.recompute
    tokenizer = tokenizer_for(folder, config, mini)
    args.weights = str(Path(folder).resolve())  # so that --evaluate and --resume find it from anywhere
    torch.manual_seed(args.seed)
    model = SequenceClassifier(encoder, task.num_labels)
    if args.method in ("salora", "lora"):
        adapt(model, TARGETS, args.rank, args.alpha).classifier.requires_grad_(True)
    if args.method == "head":
        model.encoder.requires_grad_(False)
    length = min(args.max_length, config.max_length)
    return model.to(args.device), lambda rows: tokenizer.encode(rows, length)


def prepare(args, out):
    """Data, tokens, model and folder of a run, all that bad input can break. Returns (model, train, dev)."""
    train, dev = load_task(args.task, args.data)
    model, encode = build(args)
    train, dev = encode(train[: args.rows]), encode(dev)
    out.mkdir(parents=True, exist_ok=True)
    return model, train, dev


def task_loss(outputs, labels):
    """Cross-entropy for class numbers, squared error for scores."""
    if labels.is_floating_point():
        return F.mse_loss(outputs.view_as(labels), labels)
    return F.cross_entropy(outputs, labels)


@torch.no_grad()
def predict(model, rows, device):
    """A class number or a score for every row."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # rows of like length meet: little padding
    batches = [order[i : i + 128] for i in range(0, len(rows), 128)]
    outputs = torch.cat([model(*batch_of([rows[i] for i in batch], model, device)[0]) for batch in batches])
    outputs = outputs[torch.tensor(order).argsort().to(device)].float()  # (rows, labels), as they came
    return (outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)).tolist()


def fine_tune(args, model, train, out, saved=None, batch_of=batch_of):
    """Algorithm 1. Leaves a checkpoint in `out` after every epoch. Returns (log: a list of rows, C at T_end, seconds).

    `batch_of(rows, model, device)` makes what the model eats, (inputs, labels), of some rows of `train`.
    """
    if saved:
        load_adapter_state(model, saved["adapter"])
    me, many = workers()
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
    lagrangian = Lagrangian(args.density, eta, args.controller, args.device)
    parts = {"optimizer": optimizer, "gates": gate_optimizer, "lagrangian": lagrangian, "ascent": lagrangian.optimizer}
    first, log, C_end, seconds = 0, [], None, 0.0
    if saved:
        first, log, C_end, seconds = saved["step"], saved["log"], saved["C_end"], saved["seconds"]
        for name, state in saved["parts"].items():
            parts[name].load_state_dict(state)
    else:
        for layer in layers:
            layer.gate.fixed = torch.ones_like(layer.gate.log_theta)  # open until T_start: plain LoRA
    if schedule.window and layers:
        print(f"gates train from step {schedule.T_start} to {schedule.T_end} of {total}, gate lr {eta:.3g}", flush=True)
    half = torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.precision == "bf16" else nullcontext()
    if args.compile:
        model.compile()

    model.train()
    started, every = time.time(), max(1, total // 200)
    for step in range(first, total + 1):
        phase, (epoch, place) = schedule.phase(step), divmod(step, per_epoch)
        if place == 0 and first < step < total and me == 0:
            state = {"format": "salora-run-1", "step": step, "adapter": adapter_state(model),
                     "parts": {name: part.state_dict() for name, part in parts.items() if part}, "log": log,
                     "C_end": C_end, "seconds": seconds + time.time() - started}  # fmt: skip
            report.whole(out / "checkpoint.pt", lambda path, state=state: torch.save(state, path))
        if place == 0:
            seed = 1000 * args.seed + epoch  # an epoch draws from its own seed: nothing more is needed to resume here
            batches = batches_of(train, args.batch_size, args.pool, seed)
            noise = torch.Generator().manual_seed(seed)  # for the gates, the same in all workers
            torch.manual_seed(seed + 10**6 * me)  # for dropout
            running, counted = 0.0, 0

        if step == schedule.T_start and args.method == "salora":
            for layer in layers:
                layer.gate.fixed = None
                if args.canonical:
                    canonicalize(layer)
                    optimizer.state.pop(layer.A, None), optimizer.state.pop(layer.B, None)  # of other triplets
            if args.spread:
                start_gates(layers, args.spread)
        if step == schedule.T_end and layers:
            C_end = expected_density(layers).item()
            freeze_gates(layers, args.density, args.rule, args.survivors)
            for layer in layers:
                prune_with_state(layer, optimizer)
        if step == total:
            break

        since = step - max(t for t in (0, schedule.T_start, schedule.T_end) if t <= step)
        falls_from = schedule.T_end if args.restart and phase == "frozen" else 0
        fall = (total - step) / (total - falls_from)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (fall * min(1, (since + 1) / (args.warmup * total + 1)))
        optimizer.zero_grad()
        if phase == "window":
            progress = (step + 1 - schedule.T_start) / schedule.window
            resample(layers, noise)  # one draw an optimiser step
            gate_optimizer.zero_grad()
        rows, loss = batches[place], torch.zeros((), device=args.device)
        for i in range(args.accumulate):
            part = rows[me + many * i :: many * args.accumulate]  # this worker's i-th share of the batch
            if part:
                inputs, labels = batch_of(part, model, args.device)
                with half:
                    outputs = model(*inputs)
                share = task_loss(outputs.float(), labels) * (len(part) / len(rows))
                share.backward()
                loss = loss + share.detach()
        if many > 1:
            loss = sum_over_workers(loss, [p for p in model.parameters() if p.requires_grad])
        terms = [args.beta * orthogonality(layers)] if args.beta else []  # Eq. (9)
        if phase == "window" and args.controller != "projection":
            terms.append(lagrangian(expected_density(layers), progress))  # Eq. (12)
        if terms:
            sum(terms).backward()

        optimizer.step()  # down: A, B, head
        if phase == "window":
            gate_optimizer.step()  # down: log theta
            if args.controller == "projection":
                project(layers, lagrangian.target_at(progress))
            else:
                lagrangian.ascend()  # up: lambda

        running, counted = running + loss, counted + 1
        if (step + 1) % every == 0 or step + 1 == total:
            log.append(report.log_row(step + 1, phase, running / counted, layers, lagrangian))
            running, counted = 0.0, 0
            if len(log) % 10 == 0 or step + 1 == total:
                pace = (time.time() - started) / (step + 1 - first)  # seconds a step
                line = report.status_line(log[-1], total, args.density, args.batch_size / pace)
                print(f"{line} | eta {pace * (total - step - 1):.0f} s", flush=True)
    return log, C_end, seconds + time.time() - started


def prune_with_state(layer, optimizer):
    """`prune`, and the same cut through the optimiser's moments of A and B."""
    old = (layer.A, layer.B)
    kept = prune(layer)
    for before, after, axis in zip(old, (layer.A, layer.B), (0, 1)):
        state = optimizer.state.pop(before, {})
        optimizer.state[after] = {k: v.index_select(axis, kept) if v.dim() == 2 else v for k, v in state.items()}
        for group in optimizer.param_groups:
            group["params"] = [after if p is before else p for p in group["params"]]


def run(args, out, model, train, dev, saved):
    """Train, score, write the run's files; returns the summary, or None in all workers but the first."""
    task, budgeted = task_of(args.task), total_parameters(salora_layers(model).values())
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    me, many = workers()
    device = args.device + (f" and {many - 1} more" if many > 1 else "")
    print(f"{args.task}, {args.method}, seed {args.seed} on {device}: {len(train)} training rows, {len(dev)} dev")
    print(f"{everything:,} parameters, {trained:,} trained, {budgeted:,} budgeted; run folder {out}", flush=True)
    if me == 0:
        report.whole(out / "settings.json", lambda path: path.write_text(json.dumps(vars(args), indent=1) + "\n"))
    log, C_end, seconds = fine_tune(args, model, train, out, saved)
    if me > 0:
        return None

    layers = salora_layers(model)
    predicted, gold = predict(model, dev, args.device), [row[2] for row in dev]
    ranks = {name: layer.r for name, layer in layers.items()}
    summary = {
        "task": args.task, "method": args.method, "metric": task.metric, "score": METRICS[task.metric](predicted, gold),
        "density_target": args.density if layers else None, "density_expected": C_end,
        "density_kept": kept_density(layers.values()) if layers else None,
        "adapter_params_total": budgeted, "ranks": ranks,
        "adapter_params_kept": sum(layer.r * layer.triplet_size for layer in layers.values()),
        "steps": log[-1]["step"], "seconds": round(seconds, 2), "seed": args.seed, "device": args.device,
    }  # fmt: skip
    save_adapter(model, out / "adapter.pt")
    report.write_run(out, log, summary, args.rank)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    if ranks:
        print(report.rank_table(ranks))
        kept = summary["adapter_params_kept"]
        print(f"kept {kept:,} of {budgeted:,} adapter parameters: {summary['density_kept']:.4f}")
    print(f"{args.task}: {report.scores(task, predicted, gold)} in {seconds:.1f} s; see {out}", flush=True)
    return summary


def evaluate(args, out, test=None):
    """Score a finished run on its dev rows or, given a test file without labels, write what GLUE wants submitted."""
    task = task_of(args.task)
    rows = load_task(args.task, args.data)[1] if test is None else read_rows(Path(test), task, labelled=False)
    model, encode = build(args)
    predicted = predict(load_adapter_state(model, read_torch(out / "adapter.pt")), encode(rows), args.device)
    if test is not None:
        path = report.write_predictions(out, task, Path(test).name, predicted)
        print(f"{args.task}: {len(rows)} rows of {test} labelled; see {path}")
        return {"predictions": str(path)}
    gold = [row[2] for row in rows]
    print(f"{args.task}: {report.scores(task, predicted, gold)} on {len(rows)} dev rows with {out}")
    return {"task": args.task, "metric": task.metric, "score": METRICS[task.metric](predicted, gold)}


def main(argv=None):
    """Returns the summary of the run, or {"runs": [summaries]} of several."""
    parser = build_parser()
    args = parser.parse_args(argv)

    def checked(function, *arguments):
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            parser.error(str(error))

    if args.evaluate is not None or args.predict is not None:
        return checked(evaluate, *checked(finished, args, parser))
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():  # torchrun started us
        dist.init_process_group("nccl" if torch.cuda.is_available() and args.device != "cpu" else "gloo")
    me, many = workers()
    summaries, quiet = [], redirect_stdout(None) if me else nullcontext()
    jobs = checked(plan, args, parser)
    with quiet:
        for settings, out, saved in jobs:
            try:
                for turn in range(many):  # one after the other: the first may have an encoder to pre-train
                    if turn == me:
                        prepared = checked(prepare, settings, out)
                    if many > 1:
                        dist.barrier()
                summaries.append(run(settings, out, *prepared, saved))
            except KeyboardInterrupt:
                begun = (out / "checkpoint.pt").is_file()
                hint = f"go on from the last whole epoch with --resume {out}" if begun else "no epoch was finished"
                parser.exit(130, f"\ninterrupted; {hint}\n")
            except FloatingPointError as error:
                parser.error(str(error))
    if len(jobs) == 1:
        return summaries[0]
    if me == 0:
        print(report.score_table(summaries))
    return {"runs": summaries}


if __name__ == "__main__":
    main()
