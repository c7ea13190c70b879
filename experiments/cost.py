"""Table 4 in miniature: how long one training step takes.

    python experiments/cost.py                                       two shapes, on a CPU
    python experiments/cost.py --device cuda --precision bf16 --batches 32 256 --shapes tiny minilm roberta-base

Random weights, random tokens, sequences of 64, no dropout. Every arm starts at rank 8 in all six matrices:

    frozen                 only the head trains, so nothing goes back through the encoder
    full                   all weights train
    lora-8                 LoRA
    salora-8-to-4          SaLoRA's phases (before, window, and after, where all ranks are 4), and a whole run: the
                           phases weighted by their share of the steps
    salora-8-to-4-paper    the same for the published recipe
    peft-lora-8            PEFT's LoRA, if it can be imported

On CUDA the steps of all but PEFT's are recorded, as in the main job; `lora-8 eager` shows what that is worth.
Times are medians over rounds that take one step of each arm in turn, so that a busy machine disturbs all of them alike.
Left out: memory, in which these arms are within 2 % of each other.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import time
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
import torch.nn.functional as F

import peers
from cli.files import made
from cli.flags import device_of, folder, positive
from cli.program import Parser, errors_as_lines
from cli.table import append, has_row, read_table
from experiments.study import AGAIN
from experiments.tables import in_columns
from hub.recorded import Recorded, cuda_graph, forward_backward
from rank_allocator import Recipe
from tiny_transformer import SequenceClassifier, TinyTransformer, TransformerConfig

SHAPES = {"tiny": (64, 3, 4), "minilm": (384, 6, 12), "roberta-base": (768, 12, 12)}  # hidden size, layers, heads
LENGTH, WORDS, R = 64, 1000, 8
FOREVER = 100_000  # steps: no phase ends while it is measured
RECIPES = {"salora-8-to-4": Recipe.ours, "salora-8-to-4-paper": Recipe.paper}
PHASES = {"before": (0.9, 1.0), "window": (0.0, 1.0), "after": (0.0, 0.0)}  # a window that keeps a run in this phase
ARMS = ["frozen", "full", "lora-8", *(f"{recipe} {phase}" for recipe in RECIPES for phase in PHASES)]
PEFT = ["peft-lora-8"] if find_spec("peft") else []
METHODS = {"frozen": "head", "full": "full"}  # LoRA for the other arms
COLUMNS = ["shape", "batch_size", "device", "precision", "arm", "rounds", "ms", "ratio"]  # of cost.csv


class Stepper:
    """One arm with its batch: each call is one training step."""

    def __init__(self, arm, shape, batch_size, device, precision="fp32", record=cuda_graph):
        torch.manual_seed(0)
        d, layers, heads = SHAPES[shape]
        config = TransformerConfig(vocab_size=WORDS, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
                                   intermediate_size=4 * d, hidden_dropout_prob=0,
                                   attention_probs_dropout_prob=0)  # fmt: skip
        self.model, self.step = SequenceClassifier(TinyTransformer(config), 2), 0
        recipe, _, phase = arm.partition(" ")
        cuda = torch.device(device).type == "cuda"
        if arm in PEFT:
            from peft import LoraConfig, inject_adapter_in_model

            inject_adapter_in_model(LoraConfig(r=R, lora_alpha=2 * R, target_modules=peers.TARGETS), self.model.encoder)
        else:
            peers.install(self.model, METHODS.get(arm, "lora"), R, 2 * R)
        self.model.to(device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=cuda)
        options = {}
        if recipe in RECIPES:  # B is 0, so no size could inform the gates
            options = {"budget": 0.5, "recipe": RECIPES[recipe](window=PHASES[phase], spread=0.0)}
        method = "salora" if options else "lora"
        self.allocator = peers.allocator_for(method, self.model, self.optimizer, FOREVER, **options)
        if phase == "after":
            for layer in self.allocator.layers.values():
                layer.gate.log_theta.data[R // 2 :] = -5.0  # these are closed: rank 4 everywhere
        self.ids = torch.randint(5, WORDS, (batch_size, LENGTH), device=device)
        self.labels = torch.randint(0, 2, (batch_size,), device=device)

        model = self.model

        def loss_of(ids, labels):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
                outputs = model(ids)
            return F.cross_entropy(outputs.float(), labels)

        recorded = cuda and arm not in PEFT and phase != "eager"
        self.add_gradients = Recorded(model, loss_of, record) if recorded else partial(forward_backward, loss_of)

    def __call__(self):
        self.allocator.before_step(self.step)
        self.add_gradients(self.ids, self.labels)
        self.allocator.after_backward()
        self.optimizer.step()
        self.allocator.after_step()
        self.optimizer.zero_grad()
        self.step += 1


def times_of(names, shape, batch_size, rounds, device, precision):
    """[median seconds per step] of the arms, from rounds in turn after three that do not count."""
    cuda = device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    pool = torch.cuda.graph_pool_handle() if cuda else None  # one for all arms, which never run at the same time
    steppers = [Stepper(name, shape, batch_size, device, precision, lambda work, _: cuda_graph(work, pool))
                for name in names]  # fmt: skip
    times = [[] for _ in names]
    for _ in range(rounds + 3):
        for step, found in zip(steppers, times):
            wait()
            started = time.perf_counter()
            step()
            wait()
            found.append(time.perf_counter() - started)
    return [median(found[3:]) for found in times]


def whole_run(phases, window):
    """Seconds per step of a run, from those of its three phases."""
    start, end = window
    before, inside, after = phases
    return start * before + (end - start) * inside + (1 - end) * after


def measure(args, shape, batch_size):
    """The rows of all arms at one shape and batch size."""
    names = ARMS + PEFT + (["lora-8 eager"] if args.device.startswith("cuda") else [])
    times = times_of(names, shape, batch_size, args.rounds, args.device, args.precision)
    found = dict(zip(names, times, strict=True))
    for name, recipe in RECIPES.items():
        found[name] = whole_run([found[f"{name} {phase}"] for phase in PHASES], recipe().window)
    rows = []
    for name, seconds in found.items():
        values = shape, batch_size, args.device, args.precision, name, args.rounds
        times = round(1000 * seconds, 3), round(seconds / found["lora-8"], 3)
        rows.append(dict(zip(COLUMNS, values + times, strict=True)))
    return rows


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "minilm"], metavar="SHAPE",
                        help=f"of {', '.join(SHAPES)} (default tiny minilm)")  # fmt: skip
    parser.add_argument("--batches", type=positive, nargs="+", default=[8, 32], metavar="N",
                        help="batch sizes (default 8 32)")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="default 10")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="fp32 (default) or bf16")
    parser.add_argument("--out", type=folder, default=Path("runs/cost"), metavar="DIR", help="default runs/cost")
    with errors_as_lines(parser, hint=AGAIN):
        args = parser.parse_args(argv)
        path, args.device = args.out / "cost.csv", device_of(args.device)
        with made(args.out):
            for shape in args.shapes:
                for batch_size in args.batches:
                    key = {"shape": shape, "batch_size": batch_size, "device": args.device, "precision": args.precision}
                    if not has_row(path, **key):
                        append(path, *measure(args, shape, batch_size))
        rows = read_table(path, COLUMNS)
        print(in_columns([list(rows[0]), *(list(row.values()) for row in rows)]))
    return rows


if __name__ == "__main__":
    main()
