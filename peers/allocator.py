"""What the peers that allocate ranks share: the hooks of a training loop, and gates that are plain trained numbers.

Their layers are SaLoRALinear, h = W x + (alpha / r0) B diag(g) A x, and what their papers call a gate or a singular
value is g. `finish` folds g into B and removes the triplets with g = 0. What is left is plain LoRA with a rank for each
matrix: it merges, exports and is saved like any other. Left out: sharded models, gradient scalers.
"""

import torch

from budget import total_parameters
from hard_concrete import HardConcreteGate
from peers.fixed_ranks import FixedRanks
from salora import prune


class TrainedGate(HardConcreteGate):
    """r gates that are trained numbers, of either sign and without noise.

    `log_theta` holds g itself, so that files, several processes and resuming find it where a gate's parameter is.
    """

    def settled(self):
        return self.log_theta if self.state == "free" else super().settled()

    def forward(self):
        return self.settled()

    def open_probability(self):
        return (self.settled() != 0).float()


def train_gates(layers, optimizer, **options):
    """Give every layer a TrainedGate, and let the optimizer train g in a group of its own, with these options.

    A scheduler of torch's counts the groups when it is made: make it after the allocator.
    """
    for layer in layers:
        gate = TrainedGate(layer.r).to(layer.A.device)
        gate.log_theta, gate.held, gate.fixed = layer.gate.log_theta, layer.gate.held, layer.gate.fixed
        gate.log_theta.requires_grad_(True)
        layer.gate = gate
    optimizer.add_param_group({"params": [layer.gate.log_theta for layer in layers], **options})


class Allocator(FixedRanks):
    """Hooks, log and files of a peer that allocates ranks; on its own it is LoRA with every gate open.

    model: one with adapters (`adapt`). optimizer: holds every A and B. seed: of the peer's own use of chance.
    Raises ValueError for a model without adapters, RuntimeError for a step out of order.
    """

    phase = "before"  # of the log: "window" while ranks go from one matrix to another, "after" when they are decided
    lam = 0.0  # the strength of a penalty, where there is one

    def __init__(self, model, optimizer, total_steps, warmup=0.0, seed=0, reduce=None):
        super().__init__(model, optimizer, total_steps, warmup, seed, reduce)
        if not self.layers:
            raise ValueError("the model has no adapters: call adapt(model, targets) first")
        self.noise = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            layer.allocating = True

    def before_step(self, step):
        if step != self.step:
            raise RuntimeError(f"before_step({step}) where step {self.step} is due: each step comes once, in order")

    def masks(self):
        """Which triplets are in use: a bool mask (r,) per layer."""
        return [layer.gate.settled() != 0 for layer in self.layers.values()]

    @torch.no_grad()
    def finish(self):
        """After the last step: fold g into B, and leave plain LoRA layers without the triplets that are not in use."""
        if self.step != self.total_steps:
            raise RuntimeError(f"finish() after {self.step} of {self.total_steps} steps: run all of them first")
        self.C_end = self.status()["kept"]
        for layer, mask in zip(self.layers.values(), self.masks()):
            layer.B *= layer.gate.settled().to(layer.B.dtype)
            layer.gate = HardConcreteGate(layer.r).to(layer.A.device)
            layer.gate.fix(mask.float())
            prune(layer)
            layer.allocating = False

    def status(self):
        """The columns of a log that are about triplets. A count has no noise, so C is what is kept."""
        layers = self.layers.values()
        counts = [int(mask.sum()) for mask in self.masks()]
        kept = sum(count * layer.triplet_size for count, layer in zip(counts, layers)) / total_parameters(layers)
        triplets = f"{sum(counts)}/{sum(layer.r0 for layer in layers)}"
        return {"phase": self.phase, "C": kept, "kept": kept, "lam": self.lam, "triplets": triplets}

    def state_dict(self):
        return {"step": self.step, "noise": self.noise.get_state()}

    def load_state_dict(self, state):
        self.step = state["step"]
        self.noise.set_state(state["noise"])


def normal(shape, generator, like):
    """Standard normal numbers, drawn on the CPU: a seed gives the same ones on any device."""
    return torch.randn(shape, generator=generator).to(like)
