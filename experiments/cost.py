"""Table 4 in miniature: what one training step costs in memory and time. Use `python experiments/figures.py table4`.

Random weights, random tokens, sequences of 64. Every arm starts at rank 8 in all six matrices:

    frozen          the encoder and no adapter: only the head trains, so nothing goes back through the encoder
    lora            LoRA
    paper open, paper window, paper pruned      the phases of SaLoRA as published; pruned has rank 4 everywhere
    ours open, ours window, ours pruned         those of the default recipe
    paper, ours     whole runs: the phases weighted by their share of the steps; their memory is the largest
    peft-lora       if PEFT can be imported: its LoRA
    peft-adalora    the same: its AdaLoRA, with its scores of importance in every step, without its penalty

Peak memory comes from a process of its own for each arm: on CUDA what torch allocated at most; on a CPU, for which it
needs Linux, the peak resident size, Python and torch included. Times are medians over rounds that take one step of
each arm in turn, so that a busy machine disturbs all of them alike.
"""

import os
import time
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from budget import FixedRanks, RankAllocator, Recipe
from cli.files import append, has_row, read_table
from cli.flags import positive
from cli.setup import TARGETS
from experiments import plots
from salora import adapt
from tiny_transformer import SequenceClassifier, TinyTransformer, TransformerConfig

SHAPES = {  # hidden size, layers, heads
    "tiny": (64, 3, 4),
    "minilm": (384, 6, 12),
    "roberta-base": (768, 12, 12),
}
LENGTH, WORDS, R = 64, 1000, 8
FOREVER = 100_000  # steps: no phase ends while it is measured
RECIPES = {"paper": Recipe.paper, "ours": Recipe.ours}
PHASES = {"open": (0.9, 1.0), "window": (0.0, 1.0), "pruned": (0.0, 0.0)}  # a window that keeps a run in this phase
# Or glibc keeps freed memory for later, how much depends on luck, and the same run peaks 20 MiB higher or lower.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def add_flags(parser):
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="S", help=f"of table4: {', '.join(SHAPES)} "
                        "(default tiny minilm)")  # fmt: skip
    parser.add_argument("--batches", type=positive, nargs="+", default=[8, 32], metavar="N", help="batch sizes of "
                        "table4 (default 8 32)")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="of table4 (default 10)")
    parser.add_argument("--device", default="cpu", help="of table4: cpu (default) or cuda")


def arms():
    """The names of what can be measured here: all arms but whole runs."""
    names = ["frozen", "lora", *(f"{recipe} {phase}" for recipe in RECIPES for phase in PHASES)]
    return names + (["peft-lora", "peft-adalora"] if find_spec("peft") else [])


class Stepper:
    """One arm with its batch: each call is one training step."""

    def __init__(self, arm, shape, batch_size, device):
        torch.manual_seed(0)
        d, layers, heads = SHAPES[shape]
        config = TransformerConfig(vocab_size=WORDS, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
                                   intermediate_size=4 * d)  # fmt: skip
        model = SequenceClassifier(TinyTransformer(config), 2)
        model, self.after = self.with_adapters(arm, model)
        self.model = model.to(device).train()
        for name, p in self.model.named_parameters():
            if "classifier" in name:
                p.requires_grad_(True)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.optimizer, self.step = optimizer, 0
        recipe, _, phase = arm.partition(" ")
        if recipe in RECIPES:
            decisions = RECIPES[recipe](window=PHASES[phase], spread=0.0)  # B is 0: no size could inform the gates
            self.allocator = RankAllocator(self.model, optimizer, FOREVER, 0.5, decisions)
            if phase == "pruned":
                for layer in self.allocator.layers.values():
                    layer.gate.log_theta.data[R // 2 :] = -5.0  # these are closed: rank 4 everywhere
        else:
            self.allocator = FixedRanks(self.model, FOREVER)
        self.ids = torch.randint(5, WORDS, (batch_size, LENGTH), device=device)
        self.labels = torch.randint(0, 2, (batch_size,), device=device)

    @staticmethod
    def with_adapters(arm, model):
        """(the model with the adapters of this arm, what is called with the index of a step after it)."""
        if arm == "lora" or arm.split()[0] in RECIPES:
            return adapt(model, TARGETS, R, 2 * R), None
        model.requires_grad_(False)
        if arm == "frozen":
            return model, None
        from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, inject_adapter_in_model

        if arm == "peft-lora":
            return inject_adapter_in_model(LoraConfig(r=R, lora_alpha=2 * R, target_modules=TARGETS), model), None
        config = AdaLoraConfig(init_r=R, target_r=R // 2, lora_alpha=2 * R, target_modules=TARGETS, tinit=0,
                               tfinal=FOREVER // 2, deltaT=1, total_step=FOREVER)  # fmt: skip
        adalora = AdaLoraModel(model, {"default": config}, "default")
        return adalora, adalora.update_and_allocate

    def __call__(self):
        self.allocator.before_step(self.step)
        F.cross_entropy(self.model(self.ids), self.labels).backward()
        self.allocator.after_backward()
        self.optimizer.step()
        self.allocator.after_step()
        if self.after:
            self.after(self.step)
        self.optimizer.zero_grad()
        self.step += 1


def seconds_of(step, device):
    """The time of one call."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peak_of_process(device):
    """The peak of this process in MiB: on CUDA of what torch allocated, else of all of its memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024  # kB; unlike getrusage's, not inherited from the parent


def peak_memory(arm, shape, batch_size, device):
    """The peak of this process in MiB, after three steps."""
    step = Stepper(arm, shape, batch_size, device)
    for _ in range(3):
        step()
    return peak_of_process(device)


@contextmanager
def environment(values):
    """These variables for processes that start meanwhile."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_processes(function, calls):
    """[function(*arguments) for arguments in calls], each in a new process, which gives memory back once it is free."""
    processes = min(len(calls), os.cpu_count())
    with environment(GIVE_BACK), get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        return pool.starmap(function, calls, chunksize=1)


def memory_of(names, *arguments):
    """{arm: `peak_memory`}."""
    return dict(zip(names, in_processes(peak_memory, [(name, *arguments) for name in names]), strict=True))


def times_of(names, shape, batch_size, rounds, device):
    """{arm: median seconds per step}, from interleaved rounds after two that do not count."""
    steppers = {name: Stepper(name, shape, batch_size, device) for name in names}
    times = {name: [] for name in names}
    for index in range(rounds + 2):
        for name, step in steppers.items():
            seconds = seconds_of(step, device)
            if index >= 2:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def with_whole_runs(values, combine):
    """The arms `paper` and `ours` are added to {arm: value}."""
    runs = {}
    for recipe, make in RECIPES.items():
        start, end = make().window
        runs[recipe] = combine([values[f"{recipe} {phase}"] for phase in PHASES], (start, end - start, 1 - end))
    return values | runs


def weighted(values, shares):
    return sum(value * share for value, share in zip(values, shares, strict=True))


def largest(values, shares):
    return max(values)


def compare(args, path):
    """Adds the rows that are missing, and prints all."""
    shapes = args.shapes or (list(SHAPES) if args.full else ["tiny", "minilm"])
    for shape in shapes:
        for batch_size in args.batches:
            group = {"shape": shape, "batch_size": batch_size, "device": args.device}
            if all(has_row(path, **group, arm=arm) for arm in [*arms(), *RECIPES]):
                continue
            times = with_whole_runs(times_of(arms(), shape, batch_size, args.rounds, args.device), weighted)
            memory = with_whole_runs(memory_of(arms(), shape, batch_size, args.device), largest)
            for name in times:
                row = {**group, "arm": name, "rounds": args.rounds}
                row |= {"ms": round(1000 * times[name], 3), "MiB": round(memory[name], 1)}
                ratios = {"time_ratio": times[name] / times["lora"], "memory_ratio": memory[name] / memory["lora"]}
                append(path, row | {name: round(ratio, 3) for name, ratio in ratios.items()})
    print(f"{'shape':<14}{'batch':>6}  {'arm':<14}{'ms/step':>9}{'/ lora':>8}{'MiB':>9}{'/ lora':>8}")
    latest = {(row["shape"], row["batch_size"], row["device"], row["arm"]): row for row in read_table(path)}
    for row in latest.values():
        start = f"{row['shape']:<14}{row['batch_size']:>6}  {row['arm']:<14}"
        print(f"{start}{row['ms']:>9}{row['time_ratio']:>8}{row['MiB']:>9}{row['memory_ratio']:>8}")
    plots.costs(list(latest.values()), path.with_suffix(".png"))
