"""The parameter budget: how many triplets are expected, how many stay, and what drives the one to the other.

    C = sum_i E||G_i||_0 (d_i + k_i) / sum_i r_i (d_i + k_i)        Eq. (11), over matrices i of rank r_i at creation
    min over A, B, Theta, max over lambda >= 0 of   loss + beta R_orth + lambda (C - b)^2        Eq. (12)

with b the target density. C = b holds in expectation; what is kept is decided once, at T_end, by `freeze_gates`
(section 3.5). First come functions over layers, then the schedule and the Lagrangian, then `RankAllocator`: Algorithm 1
for any training loop, with its decisions in a `Recipe`. Left out: the loop itself (train_glue_mini.py has one).
"""

import re
from dataclasses import asdict, dataclass
from math import floor
from traceback import walk_stack

import torch
import torch.distributed as dist
from torch import nn

from hard_concrete import median_gate, prob_open
from salora import canonicalize, layer_list, orthogonality, prune, salora_layers

C_START = 11 / 12  # C of fresh gates: Eq. (8) at log_theta = 0
EPS = 1e-6  # noise stays in [EPS, 1 - EPS]: float32 could draw an exact 0, whose logit is -inf
GRID = 64  # points at which `project` tries C: 63^5 intervals are more than float32 can tell apart
TRAVEL = 14  # how far log_theta must be able to go: see Recipe.gate_lr


def expected_density(layers):
    """Eq. (11): C, a scalar in [0, 1] with a gradient for log_theta. A fixed gate counts as the 0 or 1 it is."""
    layers = _some(layers)
    spent = sum(layer.gate.open_probability().sum() * layer.triplet_size for layer in layers)
    return spent / total_parameters(layers)


def _some(layers):
    layers = layer_list(layers)
    if not layers:
        raise ValueError("no SaLoRA layers, so there is no density: call adapt(model, targets) first")
    return layers


def total_parameters(layers):
    """How many adapter parameters there were at creation, the 1 of every density: an int."""
    return sum(layer.r0 * layer.triplet_size for layer in layer_list(layers))


def kept_density(layers):
    """What `expected_density` promises, counted: the share of parameters in triplets whose settled gate is open."""
    layers = _some(layers)
    kept = sum(int((layer.gate.settled() > 0).sum()) * layer.triplet_size for layer in layers)
    return kept / total_parameters(layers)


def resample(layers, generator=None):
    """Draw the gates' noise anew: once an optimizer step, so that all passes of that step see the same gates.

    One draw serves all layers, on the generator's device (the CPU without one): a seed gives the same gates on any
    hardware and on every data-parallel rank.
    """
    layers = layer_list(layers)
    device = generator.device if generator is not None else "cpu"
    u = torch.rand(sum(layer.r for layer in layers), generator=generator, device=device).clamp(EPS, 1 - EPS)
    for layer, part in zip(layers, u.split([layer.r for layer in layers])):
        layer.gate.u.copy_(part)


@torch.no_grad()
def start_gates(layers, spread):
    """Give gates better odds where triplets are worth more (not in the paper): log_theta = spread log(s) + constant.

    s = |B[:, i]| |A[i, :]| / sqrt(d + k), at least 1e-6: in canonical layers, s squared is the energy per parameter.
    The constant makes C = 11/12, its value in the paper, where all gates start at log_theta = 0.
    """
    layers = layer_list(layers)
    for layer in layers:
        s = layer.B.norm(dim=0) * layer.A.norm(dim=1) / layer.triplet_size**0.5
        layer.gate.log_theta.copy_(spread * torch.log(s.clamp_min(1e-6)))
    project(layers, C_START)


@torch.no_grad()
def project(layers, density):
    """Add one number to every log_theta, the one with which C = density in (0, 1) (not in the paper).

    C grows with that number, so it lies between two neighbors of a grid that spans all closed to all open. Five grids,
    each between the neighbors found in the last, reach float32's precision, and no step waits for the device.
    """
    layers = layer_list(layers)
    log_theta = torch.cat([layer.gate.log_theta for layer in layers])  # (n,)
    cost = torch.cat([torch.full_like(layer.gate.log_theta, layer.triplet_size) for layer in layers])  # (n,)
    low, high = -log_theta.max() - 30, -log_theta.min() + 30  # all gates closed, all gates open
    grid = torch.linspace(0, 1, GRID, device=log_theta.device)
    for _ in range(5):
        shifts = low + (high - low) * grid  # (GRID,)
        C = prob_open(log_theta + shifts[:, None]) @ (cost / cost.sum())  # (GRID,)  Eq. (11)
        right = (C < density).sum().clamp(1, GRID - 1)
        low, high = shifts.take(right - 1), shifts.take(right)
    for layer in layers:
        layer.gate.log_theta += (low + high) / 2


@torch.no_grad()
def freeze_gates(layers, density, rule="budget", survivors="one"):
    """Section 3.5: decide which triplets stay, and fix all gates for good. `prune` then removes the closed ones.

    rule "budget": from the largest log_theta down, keep each triplet that still fits density x total parameters;
                   ties go to the earlier layer, then to the earlier triplet
    rule "median": keep the gates whose median is positive, however many they are; density has no say
    survivors "one": a kept gate becomes 1, a plain LoRA triplet; "median": it keeps its median
    Raises ValueError for a density outside (0, 1] and for other rules and survivors, FloatingPointError for a
    log_theta that is not finite.
    """
    layers = layer_list(layers)
    check_density(density)
    if rule not in RULES or survivors not in SURVIVORS:
        raise ValueError(f"rule is budget or median and survivors one or median, got {rule!r} and {survivors!r}")
    if not all(layer.gate.log_theta.isfinite().all() for layer in layers):
        raise FloatingPointError("log_theta is not finite, so nothing can be decided: try a smaller learning rate")
    medians = [median_gate(layer.gate.log_theta) for layer in layers]
    if rule == "median":
        masks = [median > 0 for median in medians]
    else:
        masks = best_within_budget(layers, density)
    for layer, mask, median in zip(layers, masks, medians):
        worth = torch.ones_like(median) if survivors == "one" else median
        layer.gate.fix(worth * mask.to(worth.device))


RULES, SURVIVORS = ("budget", "median"), ("one", "median")


def best_within_budget(layers, density):
    """A mask (r,) a layer: the triplets of largest log_theta, each that still fits what the budget has left."""
    masks = [torch.zeros(layer.r, dtype=torch.bool) for layer in layers]
    left = floor(density * total_parameters(layers) + 1e-6)  # 0.29 x 12,800 is 3,711.9999... in floats
    triplets = [
        (log_theta, i, j)
        for i, layer in enumerate(layers)
        for j, log_theta in enumerate(layer.gate.log_theta.tolist())
    ]
    for _, i, j in sorted(triplets, key=lambda t: -t[0]):  # a stable sort keeps ties in order
        if layers[i].triplet_size <= left:
            left -= layers[i].triplet_size
            masks[i][j] = True
    return masks


def check_density(density):
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")


def check_window(start, end):
    if not 0 <= start <= end <= 1:
        raise ValueError(f"the gates' window needs 0 <= start <= end <= 1, got start={start}, end={end}")


class GateSchedule:
    """Algorithm 1's three phases over `total_steps`: the gates train while T_start <= step < T_end.

    start and end are fractions of total_steps (App. B: 0.2 and 0.5). Before, the gates are open; after, fixed.
    Raises ValueError unless 0 <= start <= end <= 1.
    """

    def __init__(self, total_steps, start=0.2, end=0.5):
        check_window(start, end)
        self.T_start, self.T_end = round(start * total_steps), round(end * total_steps)

    def phase(self, step):
        """'open', 'window' or 'frozen'."""
        return "open" if step < self.T_start else "window" if step < self.T_end else "frozen"

    @property
    def window(self):
        """How many steps the gates train."""
        return self.T_end - self.T_start

    def target_at(self, step, density):
        """A target that falls from C's start to `density` while the window's first half passes (not in the paper)."""
        progress = (step + 1 - self.T_start) / self.window
        return density + max(0.0, 1 - 2 * progress) * max(0.0, C_START - density)


class Lagrangian(nn.Module):
    """The last term of Eq. (12) with its multiplier: call it on C, backpropagate, then `ascend`.

    target: b in (0, 1]. lr: eta_c, the length of an ascent step.
    lam (1,) starts at 0 and is never negative. Raises ValueError for another target.
    """

    def __init__(self, target, lr=0.01, Optimizer=torch.optim.Adam, device="cpu"):
        super().__init__()
        check_density(target)
        self.target = target
        self.lam = nn.Parameter(torch.zeros(1, device=device))
        self.optimizer = Optimizer([self.lam], lr=lr, maximize=True)

    def forward(self, C):
        """lambda (C - b)^2, a scalar."""
        return self.lam[0] * (C - self.target) ** 2

    def ascend(self):
        """One step up along the gradient for the multiplier, projected onto lam >= 0."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.lam.clamp_(min=0)


CONTROLLERS = ("quadratic", "sgd", "projection")


@dataclass(frozen=True)
class Recipe:
    """Every decision that Algorithm 1 leaves open, or that measured better otherwise; the defaults are `ours`."""

    # The gates train between these fractions of all steps. App. B has (0.2, 0.5).
    window: tuple = (0.4, 0.5)
    # What drives C to b. "projection": after each step one shift of all log_theta puts C on a target that falls to b.
    # "quadratic": Eq. (12), lambda and log_theta by Adam; "sgd": by plain gradient steps, as in Algorithm 1, which
    # hardly move.
    controller: str = "projection"
    # eta_c, the step length of log_theta and lambda; None: max(0.01, 14 / steps of the window). Adam moves log_theta by
    # about eta_c a step, and 14 takes a gate from P(g > 0) = 11/12 to 1e-5, however short the window is.
    gate_lr: float | None = None
    # Weight of Eq. (9). App. B has 0.1, which holds the norm of every column of B and every row of A at 1.
    beta: float = 0.0
    # At T_start, rotate the triplets into their singular basis: independent by construction.
    canonical: bool = True
    # log_theta starts at spread log(size) + constant. With 8, sizes a factor 1.5 apart differ by 3 in log_theta, so
    # that few gates are undecided, whose noise would halve and shake the update. 0: all start alike.
    spread: float = 8.0
    # Which triplets stay. "budget": the best that fit b; "median": all whose median gate is positive.
    rule: str = "budget"
    # What the gate of a kept triplet becomes. "one": 1, a plain LoRA triplet; "median": its median.
    survivors: str = "one"
    # The learning rate rises over this share of all steps: at the start, at T_start and at T_end.
    warmup: float = 0.05
    # At T_end the learning rate starts from its top again, and from there falls to 0.
    restart: bool = True
    # Of the encoder while adapters train; None: what the checkpoint says. Adapters underfit, so 0 does better.
    dropout: float | None = 0.0

    @classmethod
    def ours(cls, **changes):
        """What measured best. It is not the published algorithm."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes):
        """The published algorithm, with Adam for lambda and log_theta, since plain gradient steps hardly move them."""
        published = dict(window=(0.2, 0.5), controller="quadratic", beta=0.1, canonical=False, spread=0.0)
        published |= dict(rule="median", survivors="median", warmup=0.0, restart=False, dropout=None)
        return cls(**{**published, **changes})

    def __post_init__(self):
        check_window(*self.window)
        allowed = {"controller": CONTROLLERS, "rule": RULES, "survivors": SURVIVORS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")


def lr_factor(step, total_steps, warmup=0.0, rises=(0,), falls_from=0):
    """The learning rate of a step as a share of its top.

    A line from 1 at step `falls_from` to 0 at total_steps, times a rise over warmup x total_steps from each of `rises`.
    """
    since = step - max(start for start in rises if start <= step)
    fall = (total_steps - step) / max(1, total_steps - falls_from)
    return fall * min(1, (since + 1) / (warmup * total_steps + 1))


def status_of(layers, phase, lam):
    """The columns of a log that are about gates: a dict, its values None for a model without adapters."""
    if not layers:
        return {"phase": phase, "C": None, "kept": None, "lam": None, "triplets": ""}
    layers = layer_list(layers)
    kept = sum(int((layer.gate.settled() > 0).sum()) for layer in layers)
    return {
        "phase": phase,
        "C": expected_density(layers).item(),  # Eq. (11)
        "kept": kept_density(layers),
        "lam": lam,
        "triplets": f"{kept}/{sum(layer.r0 for layer in layers)}",
    }


class RankAllocator:
    """Algorithm 1 for any training loop: its gates, its budget and its pruning, at four moments of a step.

        allocator = RankAllocator(model, optimizer, total_steps, density=0.5)
        for step, batch in enumerate(batches):
            allocator.before_step(step)             # releases the gates, draws noise, or decides and prunes
            task_loss(model, batch).backward()      # one or several micro-batches
            allocator.after_backward()              # adds the gradient of beta R_orth + lambda (C - b)^2
            optimizer.step()
            allocator.after_step()                  # log_theta down; lambda up, or C put on its target
            optimizer.zero_grad()
        allocator.finish()

    model: one with adapters (`adapt`). optimizer: holds every A and B, and no log_theta: the allocator has an optimizer
    of its own for log_theta and lambda. Parameters keep their identity when triplets go: A, B, their gradients and the
    optimizer's state are sliced, so learning-rate schedulers and clip lists go on. It never writes a learning rate;
    `lr_factor(step)` is what the recipe wants of it, for LambdaLR or a loop of one's own.

    density: b in (0, 1]. seed: of the gates' noise. gradients_are_summed: with several processes, the caller's word
    that all of them see the same gradients at `after_backward`, those of log_theta included.
    Raises ValueError for a model or an optimizer that it cannot work with, RuntimeError for a moment out of order: see
    `Guard`.
    """

    def __init__(self, model, optimizer, total_steps, density=0.5, recipe=None, seed=0, gradients_are_summed=False):
        self.model, self.layers, self.optimizer = model, salora_layers(model), unwrapped(optimizer)
        self.total_steps, self.density, self.recipe = total_steps, density, recipe or Recipe.ours()
        self.guard = Guard(self, optimizer, gradients_are_summed)
        self.schedule = GateSchedule(total_steps, *self.recipe.window)
        self.step = 0  # of the moment in progress, or of the next one
        self.C_end = self.kept_end = None  # C just before the decision at T_end, and the density that it kept

        controller = self.recipe.controller
        self.gate_lr = self.recipe.gate_lr or max(0.01, TRAVEL / max(1, self.schedule.window))  # eta_c
        Optimizer = torch.optim.SGD if controller == "sgd" else torch.optim.Adam
        gates = [layer.gate for layer in self.layers.values()]
        self.gate_optimizer = Optimizer([gate.log_theta for gate in gates], lr=self.gate_lr)
        self.lagrangian = Lagrangian(density, self.gate_lr, Optimizer, gates[0].log_theta.device)
        self.noise = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            layer.allocating = True

    @property
    def phase(self):
        """Of this step: 'open', 'window' or 'frozen'."""
        return self.schedule.phase(self.step)

    def lr_factor(self, step):
        """The learning rate of a step as a share of its top, by the recipe's warm-ups and restart."""
        T_start, T_end = self.schedule.T_start, self.schedule.T_end
        falls_from = T_end if self.recipe.restart and step >= T_end else 0
        return lr_factor(step, self.total_steps, self.recipe.warmup, (0, T_start, T_end), falls_from)

    def before_step(self, step):
        """At T_start the gates are released, in the window noise is drawn, at T_end the gates are fixed and pruned."""
        self.guard.before_step(step)
        self._enter_phase()
        if self.phase == "window":
            resample(self.layers, self.noise)  # one draw an optimizer step

    def penalty(self):
        """beta R_orth + lambda (C - b)^2: Eq. (12) without the loss of the task, a scalar with gradient."""
        penalty = torch.zeros((), device=self.lagrangian.lam.device)
        if self.recipe.beta:
            penalty = penalty + self.recipe.beta * orthogonality(self.layers)  # Eq. (9)
        if self.phase == "window" and self.recipe.controller != "projection":
            penalty = penalty + self.lagrangian(expected_density(self.layers))  # Eq. (12)
        return penalty

    def after_backward(self):
        """Add the penalty's gradient, once a step: after all micro-batches, and after gradients are clipped."""
        self.guard.after_backward()
        penalty = self.penalty()
        if penalty.requires_grad:
            penalty.backward()

    def after_step(self):
        """In the window: log_theta goes down its gradient, then lambda up, or C onto its target."""
        self.guard.after_step()
        if self.phase == "window":
            self.gate_optimizer.step()  # down: log_theta
            self.gate_optimizer.zero_grad()
            if self.recipe.controller == "projection":
                project(self.layers, self.schedule.target_at(self.step, self.density))
            else:
                self.lagrangian.ascend()  # up: lambda
        self.step += 1

    def finish(self):
        """After the last step. Without it the adapter refuses to be saved or exported as finished."""
        self.guard.finish()
        self._enter_phase()
        self.guard.check_kept(self.kept_end)
        for layer in self.layers.values():
            layer.allocating = False

    def _enter_phase(self):
        if self.step == 0:
            for layer in self.layers.values():
                layer.gate.hold_open()
        if self.step == self.schedule.T_start:
            self._release()
        if self.step == self.schedule.T_end:
            self._decide()

    def _release(self):
        for layer in self.layers.values():
            layer.gate.release()
            if self.recipe.canonical:
                canonicalize(layer)
                for p in (layer.A, layer.B):
                    self.optimizer.state.pop(p, None)  # these moments were those of other triplets
        if self.recipe.spread:
            start_gates(self.layers, self.recipe.spread)

    def _decide(self):
        self.C_end = expected_density(self.layers).item()
        freeze_gates(self.layers, self.density, self.recipe.rule, self.recipe.survivors)
        self.kept_end = kept_density(self.layers)
        for layer in self.layers.values():
            before = (layer.A.shape, layer.B.shape)
            kept = prune(layer)
            for p, shape, axis in zip((layer.A, layer.B), before, (0, 1)):
                for key, value in self.optimizer.state.get(p, {}).items():
                    if isinstance(value, torch.Tensor) and value.shape == shape:  # a moment, not a count of steps
                        self.optimizer.state[p][key] = value.index_select(axis, kept)

    def status(self):
        """What a log shows of the step that is done; reading it waits for the device."""
        return status_of(self.layers, self.schedule.phase(self.step - 1), self.lagrangian.lam.item())

    def state_dict(self):
        """All but the model and the optimizer, as plain values and tensors.

        Raises RuntimeError in the middle of a step and after finish().
        """
        self.guard.expect("before_step", "state_dict")
        return {
            "plan": self.plan(),
            "step": self.step,
            "C_end": self.C_end,
            "kept_end": self.kept_end,
            "gate_optimizer": self.gate_optimizer.state_dict(),
            "lam": self.lagrangian.lam.detach().clone(),
            "ascent": self.lagrangian.optimizer.state_dict(),
            "noise": self.noise.get_state(),
        }

    def load_state_dict(self, state):
        """Go on from a `state_dict`, after the model and the optimizer have got theirs.

        Raises ValueError where steps, density or recipe differ, or where the model is not in the phase of that step,
        RuntimeError after finish().
        """
        free = self.guard.load_state_dict(state)
        for layer in self.layers.values():
            layer.gate.log_theta.requires_grad_(free)
        self.step, self.C_end, self.kept_end = state["step"], state["C_end"], state["kept_end"]
        self.gate_optimizer.load_state_dict(state["gate_optimizer"])
        self.lagrangian.lam.data.copy_(state["lam"])
        self.lagrangian.optimizer.load_state_dict(state["ascent"])
        self.noise.set_state(state["noise"])

    def plan(self):
        """What decides the schedule, and so must be the same when a run is resumed."""
        used = {**asdict(self.recipe), "gate_lr": self.gate_lr}
        return {"total_steps": self.total_steps, "density": self.density, **used}


class FixedRanks:
    """What a method without a budget does at the moments of Algorithm 1: nothing, while its learning rate falls."""

    C_end = None

    def __init__(self, model, total_steps, warmup=0.0):
        self.layers, self.total_steps, self.warmup, self.step = salora_layers(model), total_steps, warmup, 0

    def lr_factor(self, step):
        return lr_factor(step, self.total_steps, self.warmup)

    def before_step(self, step):
        pass

    def after_backward(self):
        pass

    def after_step(self):
        self.step += 1

    def finish(self):
        self.C_end = expected_density(self.layers).item() if self.layers else None

    def status(self):
        return status_of(self.layers, "open", 0.0)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


# What follows is no part of the method: it turns into errors what would go wrong without a word.


class Guard:
    """Knows which moment of a RankAllocator is due, and refuses, with a reason, what the allocator cannot work with."""

    NO_SCALER = "a GradScaler scales the loss but not the penalty: use bf16, which needs none"

    def __init__(self, allocator, optimizer, gradients_are_summed):
        self.allocator, self.gradients_are_summed = allocator, gradients_are_summed
        check_density(allocator.density)
        if not isinstance(allocator.total_steps, int) or allocator.total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {allocator.total_steps!r}")
        if getattr(optimizer, "scaler", None) is not None:
            raise ValueError(self.NO_SCALER)
        self.check_parts()
        self.due, self.stepped = "before_step", False
        self.hook = allocator.optimizer.register_step_pre_hook(self.see_step)

    # The moments, in their order

    def expect(self, due, called=None):
        if self.due != due:
            order = "before_step, after_backward, optimizer.step, after_step, and finish at the end"
            called, step = called or due, self.allocator.step
            raise RuntimeError(f"{called} was called where {self.due} is due at step {step}: {order}")

    def before_step(self, step):
        due, layers = self.allocator.step, self.allocator.layers.values()
        self.expect("before_step")
        if step != due:
            hint = "call load_state_dict to go on with a run" if due == 0 else "each step comes once, in order"
            raise RuntimeError(f"before_step({step}) where step {due} is due: {hint}")
        if step >= self.allocator.total_steps:
            raise RuntimeError(f"before_step({step}), but there are {self.allocator.total_steps} steps: call finish()")
        if step > 0:
            self.check_gates(step)
        elif any(layer.r < layer.r0 for layer in layers):
            raise ValueError("triplets have been pruned already: call load_state_dict to go on with a run, or adapt a "
                             "fresh model")  # fmt: skip
        self.check_at_turns(step)
        self.due, self.stepped = "after_backward", False

    def after_backward(self):
        self.expect("after_backward")
        layers = [layer for layer in self.allocator.layers.values() if layer.r > 0]
        if layers and all(layer.B.grad is None for layer in layers):
            raise RuntimeError("no gradient has reached an adapter: call after_backward after loss.backward()")
        if self.allocator.phase == "window" and not all(layer.training for layer in layers):
            raise RuntimeError("the model is in eval mode, in which gates have no noise: call model.train() first")
        self.due = "after_step"

    def see_step(self, *_):
        """Called by the optimizer before each of its steps."""
        self.expect("after_step", "optimizer.step()")
        if self.stepped:
            raise RuntimeError(f"optimizer.step() was called twice at step {self.allocator.step}")
        for frame, _ in walk_stack(None):
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
                raise RuntimeError(self.NO_SCALER)
        self.stepped = True

    def after_step(self):
        self.expect("after_step")
        if not self.stepped:
            raise RuntimeError(f"after_step was called where optimizer.step() is due at step {self.allocator.step}")
        if self.allocator.step == 0:
            self.check_moments()
        self.due = "before_step"

    def finish(self):
        self.expect("before_step", "finish")
        step, total_steps = self.allocator.step, self.allocator.total_steps
        if step != total_steps:
            raise RuntimeError(f"finish() after {step} of {total_steps} steps: run all of them first")
        self.check_gates(step)
        self.check_at_turns(step)
        self.due = "nothing more"
        self.hook.remove()

    def load_state_dict(self, state):
        """Returns whether the gates are free at the step of that state."""
        if self.due == "nothing more":
            raise RuntimeError("load_state_dict was called after finish(): make a new RankAllocator")
        if state["plan"] != self.allocator.plan():
            raise ValueError(f"the saved run had {state['plan']}, but this one has {self.allocator.plan()}")
        self.check_parts()
        free = self.check_gates(state["step"])
        if not free:
            self.check_kept(state["kept_end"])
        self.due = "before_step"  # whatever a step that was interrupted left behind
        return free

    # What the allocator works with

    def check_at_turns(self, step):
        """Much may have changed since the last look."""
        schedule = self.allocator.schedule
        if step in (0, schedule.T_start, schedule.T_end, self.allocator.total_steps):
            self.check_parts()
            self.check_processes()

    def check_parts(self):
        model, layers, optimizer = self.allocator.model, self.allocator.layers, self.allocator.optimizer
        if not layers:
            raise ValueError("the model has no adapters: call adapt(model, targets) first")
        if list(salora_layers(model).values()) != list(layers.values()):
            raise ValueError("the model's adapters have been replaced: do so before making a RankAllocator")
        for kind in [type(optimizer), *(type(m) for m in model.modules())]:
            if re.search("FSDP|FullyShardedDataParallel|deepspeed", f"{kind.__module__}.{kind.__name__}"):
                raise ValueError(f"{kind.__name__} shards parameters, which then cannot be pruned: train without it")
            if issubclass(kind, nn.parallel.DistributedDataParallel):
                raise ValueError("DistributedDataParallel loses sight of a parameter that is pruned, and of log_theta: "
                                 "sum gradients with dist.all_reduce instead")  # fmt: skip
        if dist.is_initialized() and dist.get_world_size() > 1 and not self.gradients_are_summed:
            raise ValueError("several processes: sum all gradients before after_backward, those of log_theta too, "
                             "and say so with gradients_are_summed=True")  # fmt: skip
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in layers.items():
            if id(layer.A) not in held or id(layer.B) not in held:
                raise ValueError(f"the optimizer does not hold A and B of {name}: make it after adapt()")
            if id(layer.gate.log_theta) in held:
                raise ValueError(f"the optimizer holds log_theta of {name}, which the allocator trains: leave it out")
            if layer.gate.log_theta.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"log_theta of {name} is {layer.gate.log_theta.dtype}, too coarse for its steps: "
                                 "convert the model before adapt(), which makes gates in float32")  # fmt: skip

    def check_processes(self):
        """Adapters that differ between processes would get ranks that differ."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        layers = self.allocator.layers.values()
        sums = [p.detach().double().sum() for layer in layers for p in (layer.A, layer.B, layer.gate.log_theta)]
        ends = torch.stack(sums + [-value for value in sums])
        dist.all_reduce(ends, dist.ReduceOp.MAX)  # the greatest of each, and the smallest with its sign changed
        greatest, smallest = ends.chunk(2)
        if (greatest > -smallest).any():
            raise RuntimeError("the processes' adapters differ: start them alike, and sum all gradients, those "
                               "of log_theta too")  # fmt: skip

    def check_gates(self, step):
        """Whether the gates are free before a step; the model's must be so."""
        free = self.allocator.schedule.T_start < step <= self.allocator.schedule.T_end
        if any((layer.gate.fixed is None) != free for layer in self.allocator.layers.values()):
            wanted = "free" if free else "fixed"
            raise ValueError(f"at step {step} gates are {wanted}, but the model's are not: load its state of that step")
        return free

    def check_kept(self, kept_end):
        """The model's fixed gates keep what they kept then; before T_end, everything."""
        kept, expected = kept_density(self.allocator.layers), 1.0 if kept_end is None else kept_end
        if kept != expected:
            raise ValueError(f"the model keeps {kept:.4f} of its adapter parameters where {expected:.4f} is right: its "
                             "weights are those of another phase")  # fmt: skip

    def check_moments(self):
        """Adam's moments have the shape of their parameter and can be cut with it; what Adafactor keeps cannot."""
        optimizer = self.allocator.optimizer
        for layer in self.allocator.layers.values():
            for p in (layer.A, layer.B):
                for key, value in optimizer.state.get(p, {}).items():
                    if isinstance(value, torch.Tensor) and value.numel() > 1 and value.shape != p.shape:
                        kept = f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)}"
                        raise RuntimeError(f"{kept} for a matrix of shape {tuple(p.shape)}: use AdamW or SGD, whose "
                                           "moments have the shape of their parameter")  # fmt: skip


def unwrapped(optimizer):
    """The torch optimizer inside an accelerate one."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
