"""Fine-tune an encoder on a GLUE task, or on a generated stand-in, with SaLoRA: Algorithm 1 of Hu et al. 2023.

    python train_glue_mini.py                                                       mini-cola, two CPU cores, a minute
    python train_glue_mini.py --task all --method lora                              the eight generated tasks
    python train_glue_mini.py --task sst2 --data GLUE --weights ROBERTA --device cuda

`fine_tune` is the training loop, for every method; what makes it SaLoRA is its `allocator` (rank_allocator.py). `run`
is one run from model to score, `main` the program. Flags, run folders, resume, processes, reports and pictures are in
cli/, data in glue/. Left out: hyper-parameter search, choosing an epoch by its dev score, ensembles.
"""

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()  # before the imports that take long

import shlex
import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from functools import cache, partial
from math import ceil

import torch
import torch.nn.functional as F

from cli import report
from cli.afterwards import evaluate, export, predict
from cli.files import claimed
from cli.flags import build_parser
from cli.journal import Journal
from cli.program import errors_as_lines
from cli.runs import read_finished, runs_of
from cli.setup import fingerprint, prepare, seed_of
from cli.workers import add_up, one_at_a_time, share_of, start_workers, worker
from glue.tokens import batch_of, batches_of
from hub.adapters import load_adapter_state
from hub.recorded import Recorded, forward_backward
from peers import allocator_for
from peers.alora import hold_out


def task_loss(outputs, labels):
    """Cross-entropy for class indices, squared error for scores."""
    if labels.is_floating_point():
        return F.mse_loss(outputs.view_as(labels), labels)
    return F.cross_entropy(outputs, labels)


def fine_tune(model, rows, optimizer, allocator, *, lr, batch_size, seed=0, accumulate=1, autocast=nullcontext(),
              recorded=False, journal=None, batch_of=batch_of):  # fmt: skip
    """Train the model in place on encoded rows, for the allocator's number of steps: Algorithm 1.

    allocator: a RankAllocator, or any object with the same hooks. lr: the learning rate, before the allocator's
    lr_factor. accumulate: the number of parts in which a batch is processed, to save memory. recorded: as CUDA graphs
    (hub/recorded.py). journal: keeps the log and the checkpoints. batch_of(rows, model, device) -> (model inputs,
    labels). Resumed at step k, it draws what an uninterrupted run draws from there on.
    """

    def part_loss(share, labels, *inputs):
        with autocast:
            outputs = model(*inputs)
        return share * task_loss(outputs.float(), labels)

    add_gradients = Recorded(model, part_loss) if recorded else partial(forward_backward, part_loss)
    device = next(model.parameters()).device
    journal = journal or Journal(allocator.total_steps)
    steps_per_epoch = ceil(len(rows) / batch_size)
    model.train()
    for step in range(allocator.step, allocator.total_steps):
        # Sample a mini-batch from D
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0:
            journal.begin_epoch(step, model, optimizer, allocator)
            batches = batches_of(rows, batch_size, seed_of(seed, "batches", epoch))
            torch.manual_seed(seed_of(seed, "dropout", epoch, worker()))
        batch = batches[index]

        # If T_start <= t < T_end: sample a gate mask set G, shared by the whole batch. At T_end triplets go for good
        allocator.before_step(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * allocator.lr_factor(step)

        # Forward and backward pass: the gradient of the task's loss, in a part for every worker and micro-batch
        loss = torch.zeros((), device=device)
        for part in share_of(batch, accumulate):
            inputs, labels = batch_of(part, model, device)
            loss = loss + add_gradients(len(part) / len(batch), labels, *inputs)

        # ... of which the allocator makes one, and adds that of beta R_orth + lambda (C - b)^2
        allocator.after_backward()

        # One step down for A, B and the head; then Theta down, and lambda up
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
        journal.add(step, add_up(loss), optimizer, allocator, batch_size)
    allocator.finish()
    return journal


@torch.no_grad()
def loss_of(model, rows):
    """The task's loss of encoded rows, without dropout: a number."""
    training = model.training
    inputs, labels = batch_of(rows, model, next(model.parameters()).device)
    loss = task_loss(model.eval()(*inputs), labels).item()
    model.train(training)
    return loss


def losses_of(model, rows, batch_size):
    """Yields the task's loss of one batch of encoded rows after the other, with gradient."""
    for i in range(0, len(rows), batch_size):
        inputs, labels = batch_of(rows[i : i + batch_size], model, next(model.parameters()).device)
        yield task_loss(model(*inputs).float(), labels)


def data_for(method, model, rows, batch_size):
    """(rows to train on, what the method's allocator is told of the data), the latter a dict of options.

    ALoRA scores ranks on rows that it holds out; Child-Tuning looks at the gradients of all rows before it starts.
    """
    if method == "alora":
        rows, held_out = hold_out(rows, batch_size)
        return rows, {"score": lambda: -loss_of(model, held_out)}
    if method == "child-tuning":
        return rows, {"losses": lambda: losses_of(model, rows, batch_size)}
    return rows, {}


def run(settings, folder, model, train, dev, saved=None):
    """Train, score and write the run's files. Returns the summary, or None in all workers but the first.

    settings: what cli.settings.settle returns. saved: the checkpoint of an interrupted run, to go on from.
    """
    if saved:
        load_adapter_state(model, saved["adapter"])
    train, options = data_for(settings.method, model, train, settings.batch_size)
    total_steps = settings.steps or settings.epochs * ceil(len(train) / settings.batch_size)
    cuda = torch.device(settings.device).type == "cuda"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr, fused=cuda)
    allocator = allocator_for(settings.method, model, optimizer, total_steps, recipe=settings.decisions,
                              budget=settings.budget, warmup=settings.warmup, seed=seed_of(settings.seed, "gates"),
                              sparse_lambda=settings.sparse_lambda, reduce="sum", **options)  # fmt: skip
    journal = Journal(total_steps, folder, cache(lambda: fingerprint(settings, model, train)), bool(settings.trace))
    if saved:
        journal.restore(saved, optimizer, allocator)
    report.announce(settings, folder, model, train, dev, allocator)

    bf16 = torch.autocast(torch.device(settings.device).type, torch.bfloat16)
    fine_tune(model, train, optimizer, allocator, lr=settings.lr, batch_size=settings.batch_size, seed=settings.seed,
              accumulate=settings.accumulate, autocast=bf16 if settings.precision == "bf16" else nullcontext(),
              recorded=cuda and not (settings.eager or settings.recompute), journal=journal)  # fmt: skip
    if worker() > 0:
        return None
    return report.finish_run(settings, folder, model, allocator, journal, predict(model, dev, settings.device), dev)


def main(argv=None):
    """The program. Returns the summary of the run, or {"runs": [summaries]} of several."""
    parser = build_parser()
    with errors_as_lines(parser):
        args = parser.parse_args(argv)
        args.command = shlex.join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
        warnings.filterwarnings("ignore", module="peers")  # allocators made there warn of what reports say
        if args.export is not None:
            return export(*read_finished(args, parser))
        if args.evaluate is not None or args.predict is not None:
            return evaluate(*read_finished(args, parser), args.predict)
        start_workers(args.device)
        with redirect_stdout(None) if worker() > 0 else nullcontext():
            with one_at_a_time():  # the first may have an encoder to pre-train
                runs = runs_of(args, parser)
            summaries = []
            for settings, folder, saved in runs:
                with claimed(folder, new=saved is None):
                    summaries.append(run(settings, folder, *prepare(settings), saved))
        if len(runs) == 1:
            return summaries[0]
        if worker() == 0:
            print(report.score_table(summaries))
        return {"runs": summaries}


if __name__ == "__main__":
    main()
