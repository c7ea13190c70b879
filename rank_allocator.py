"""Algorithm 1 for any training loop (Hu et al. 2023, section 3): `RankAllocator`, and its decisions in a `Recipe`.

Over the T steps of training the allocator holds all gates open until T_start, trains them toward the budget b in the
window up to T_end, and there decides which triplets stay and removes the others; what is left trains on as plain LoRA.
A loop calls three hooks in every step, and a fourth at the end. What they compute is in budget.py, and what they refuse
to work with in guard.py. Left out: the loop itself (train_glue_mini.py has one).
"""

import warnings
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from budget import (
    RULES,
    SURVIVORS,
    TRAVEL,
    GateSchedule,
    Lagrangian,
    expected_density,
    freeze_gates,
    kept_density,
    project,
    resample,
    start_gates,
)
from guard import Guard, parameters_of, unwrapped, world_size
from salora import canonicalize, is_sharded, layer_list, orthogonality, prune, salora_layers

CONTROLLERS = ("quadratic", "sgd", "projection")
RANGES = {"gate_lr": (1e-9, 1e9), "beta": (0, 1e9), "spread": (0, 1e3), "warmup": (0, 1), "dropout": (0, 0.99)}


@dataclass(frozen=True)
class Recipe:
    """Every decision that Algorithm 1 leaves open, or where another choice measured better; the defaults are `ours`."""

    # The gates train between these fractions of all steps. App. B has (0.2, 0.5).
    window: tuple = (0.4, 0.5)
    # What drives C to b. "projection": after each step one shift of all log_theta puts C on a target that falls to b.
    # "quadratic": Eq. (12), lambda and log_theta by Adam; "sgd": by plain gradient steps, as in Algorithm 1;
    # they hardly move log_theta.
    controller: str = "projection"
    # eta_c, the step size of log_theta and lambda; None: max(0.01, TRAVEL / steps of the window). Adam moves log_theta
    # by about eta_c per step, so that a gate that starts at 0, as in the paper, can close in a window of any length.
    gate_lr: float | None = None
    # Weight of Eq. (9). App. B has 0.1, which holds the norm of every column of B and every row of A at 1.
    beta: float = 0.0
    # At T_start, rotate the triplets into their singular basis: orthogonal by construction.
    canonical: bool = True
    # log_theta starts at spread log(size) + constant; 0: all start alike. With 8, triplets whose sizes differ by a
    # factor of 1.5 start 3 apart in log_theta, so that few gates are undecided. An undecided gate is noisy and 1/2 on
    # average, which disturbs and weakens the update.
    spread: float = 8.0
    # Which triplets stay. "budget": the best that fit b; "median": all whose median gate is positive.
    rule: str = "budget"
    # What the gate of a kept triplet becomes. "one": 1, a plain LoRA triplet; "median": its median.
    survivors: str = "one"
    # The learning rate is multiplied by a ramp from 0 to 1 over this share of all steps. The loop applies it, as
    # `lr_factor`.
    warmup: float = 0.05
    # At T_end the learning rate begins anew, with its warm-up. This, too, is `lr_factor`'s.
    restart: bool = True
    # The encoder's dropout while adapters train; None: what the checkpoint says. Adapters underfit, so 0 does better.
    # Whoever loads the encoder applies it; an allocator warns of other rates.
    dropout: float | None = 0.0

    @classmethod
    def ours(cls, **changes):
        """What measured best. It is not the published algorithm."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes):
        """The published algorithm, with all of App. B's values. Where the paper leaves a choice, this is what we chose:

        - Theta is stepped as log_theta, by Adam, since plain gradient steps hardly move it; lambda likewise
        - the loss is Eq. (12): the task's, beta R_orth and lambda (C - b)^2. Eq. (10), in which lambda weighs the
          number of open gates itself, is left out
        - beta R_orth is in the loss in all phases; eta_c is constant; triplets are pruned at T_end
        - a survivor keeps its median gate for the rest of training; weight decay is the optimizer's own
        """
        published = dict(window=(0.2, 0.5), controller="quadratic", gate_lr=0.01, beta=0.1, canonical=False, spread=0.0)
        published |= dict(rule="median", survivors="median", warmup=0.0, restart=False, dropout=None)
        return cls(**{**published, **changes})

    @classmethod
    def paper_scaled(cls, **changes):
        """The published algorithm, but for eta_c, which is scaled to the length of the window so that C can reach b."""
        return cls.paper(**{"gate_lr": None, **changes})

    @classmethod
    def svd(cls, **changes):
        """No gates train: at T_end the largest singular values that fit the budget stay. What `ours` is measured by."""
        return cls(**{"window": (0.5, 0.5), **changes})

    def __post_init__(self):
        GateSchedule(1, *self.window)  # raises ValueError for an impossible window
        for name, values in {"controller": CONTROLLERS, "rule": RULES, "survivors": SURVIVORS}.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            optional = name in ("gate_lr", "dropout") and value is None
            if not optional and (type(value) not in (int, float) or not least <= value <= most):
                raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
        for name in ("canonical", "restart"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")


class RankAllocator:
    """Algorithm 1: gates, budget and pruning, in four hooks that a training loop calls.

        allocator = RankAllocator(model, optimizer, total_steps, budget=0.5)
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
    multiply the learning rate by `lr_factor(step)`, with LambdaLR (stepped once per step) or yourself.

    budget: b in (0, 1]. seed: of the gates' noise. reduce: with several processes, "mean" or "sum", how after_backward
    combines their gradients, of all that the optimizer holds and of log_theta. Use "mean" if each loss is a mean over
    the process's rows, and with DistributedDataParallel, whose averages it does not change. Closed triplets are then
    removed only at finish, because DistributedDataParallel relies on fixed shapes.
    The gradients of log_theta are in `gate_gradients` until after_step, out of reach of clipping and zero_grad.
    An average of the weights (EMA) starts after T_end, when all shapes are final.
    Raises ValueError for a model or an optimizer that it cannot work with, RuntimeError for a hook out of order.
    """

    def __init__(self, model, optimizer, total_steps, budget=0.5, recipe=None, seed=0, reduce=None):
        self.model, self.layers = model, salora_layers(model)
        self.optimizer = unwrapped(optimizer)
        self.total_steps, self.budget = total_steps, budget
        self.recipe, self.reduce = recipe or Recipe.ours(), reduce
        self.guard = Guard(self, optimizer)
        self.schedule = GateSchedule(total_steps, *self.recipe.window)
        self.step = 0  # the step in progress, or the next one
        self.C_end = self.kept_end = None  # C just before the decision at T_end, and the density that it kept

        self.gate_lr = self.recipe.gate_lr or max(0.01, TRAVEL / max(1, self.schedule.window_steps))  # eta_c
        Optimizer = torch.optim.SGD if self.recipe.controller == "sgd" else torch.optim.Adam
        self.log_thetas = [layer.gate.log_theta for layer in self.layers.values()]
        self.gate_optimizer = Optimizer(self.log_thetas, lr=self.gate_lr)
        # Until after_step the gradients of log_theta are here, {log_theta: its gradient}, and not in .grad, so that a
        # loop that clips or clears the gradients of model.parameters() does not touch them.
        self.gate_gradients = {}
        self.gradient_hooks = []  # autograd calls them with each log_theta that has got a gradient
        self.lagrangian = Lagrangian(budget, self.gate_lr, Optimizer, self.log_thetas[0].device)
        self.noise = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            layer.allocating = True
        for warning in self.guard.warnings():
            warnings.warn(warning, stacklevel=2)

    @property
    def phase(self):
        """The phase of this step: 'before', 'window' or 'after'."""
        return self.schedule.phase(self.step)

    def lr_factor(self, step):
        """What to multiply the learning rate by at a step, by the recipe's warm-up and restart.

        Raises RuntimeError beyond total_steps, where it would be negative.
        """
        if step > self.total_steps:
            raise RuntimeError(f"lr_factor({step}), but there are {self.total_steps} steps: a schedule steps once per "
                               "step of the optimizer, but accelerate's once per process")  # fmt: skip
        T_end = self.schedule.T_end
        start = T_end if self.recipe.restart and step >= T_end else 0
        return lr_factor(step, self.total_steps, self.recipe.warmup, start)

    def before_step(self, step):
        """At T_start the gates are released, in the window noise is drawn, at T_end the gates are fixed and pruned."""
        self.guard.before_step(step)
        self.gate_gradients = {}
        self._enter_phase()
        if self.phase == "window":
            if not self.gradient_hooks:  # at T_start, or later where a run was resumed
                self._divert_gradients()
            resample(self.layers, self.noise)  # one draw per optimizer step

    def penalty(self):
        """beta R_orth + lambda (C - b)^2: Eq. (12) without the loss of the task, a scalar with gradient."""
        penalty = torch.zeros((), device=self.lagrangian.lam.device)
        if self.recipe.beta:
            penalty = penalty + self.recipe.beta * orthogonality(self.layers)  # Eq. (9)
        if self.phase == "window" and self.recipe.controller != "projection":
            penalty = penalty + self.lagrangian(expected_density(self.layers))  # Eq. (12)
        return penalty

    def after_backward(self):
        """Add the penalty's gradient, once per step: after all micro-batches, and after gradients are clipped.

        Only where nothing else averages gradients of several processes (all_reduce, FSDP2) clip after it, since they
        are averaged here.
        """
        self.guard.expect("after_backward")
        if self.reduce and world_size() > 1:
            self._reduce_gradients()
        self.guard.after_backward()
        with torch.enable_grad():
            penalty = self.penalty()
        if penalty.requires_grad:
            penalty.backward()

    def after_step(self):
        """In the window: log_theta goes down its gradient, then lambda up, or C onto its target."""
        self.guard.after_step()
        if self.phase == "window":
            self._restore_gradients()
            self.gate_optimizer.step()  # down: log_theta
            self.gate_optimizer.zero_grad()
            if self.recipe.controller == "projection":
                project(self.layers, self.schedule.target_at(self.step, self.budget))
            else:
                self.lagrangian.ascend()  # up: lambda
        self.step += 1

    def finish(self):
        """Call it after the last step; a loop that stops early may call it after any step from T_end on. Until then the
        adapter cannot be merged, saved or exported."""
        self.guard.finish()
        self._enter_phase()
        self._prune()
        self._stop_diverting()
        for layer in self.layers.values():
            layer.allocating = False

    def _enter_phase(self):
        if self.step == 0:
            for layer in self.layers.values():
                layer.gate.hold_open()  # they were fixed, if these are the adapters of a finished run that kept all
        if self.step == self.schedule.T_start:
            self._release()
        if self.step == self.schedule.T_end:
            self._decide()

    def _release(self):
        """T_start: the gates become random."""
        for name, layer in self.layers.items():
            if self.recipe.canonical:
                try:
                    canonicalize(layer)
                except torch.linalg.LinAlgError as error:
                    raise FloatingPointError(f"{error}; at T_start, for {name}: has training diverged?") from None
                for p in (layer.A, layer.B):
                    self.optimizer.state.pop(p, None)  # these moments were those of other triplets
            layer.gate.release()
        if self.recipe.spread:
            start_gates(self.layers, self.recipe.spread)

    def _divert_gradients(self):
        """From here on autograd adds the gradients of log_theta to gate_gradients, and leaves log_theta.grad empty."""
        for p in self.log_thetas:
            p.requires_grad_(True)
        self.gradient_hooks = [p.register_post_accumulate_grad_hook(self._divert) for p in self.log_thetas]

    def _stop_diverting(self):
        for hook in self.gradient_hooks:
            hook.remove()
        self.gradient_hooks = []

    def _divert(self, log_theta):
        self.gate_gradients[log_theta] = self.gate_gradients.get(log_theta, 0) + log_theta.grad
        log_theta.grad = None

    def _restore_gradients(self):
        for log_theta, gradient in self.gate_gradients.items():
            log_theta.grad = gradient

    def _reduce_gradients(self):
        gates = [p for p in self.log_thetas if p.requires_grad]
        self._restore_gradients()
        reduce_gradients(self.optimizer, self.reduce, gates)
        for p in gates:
            self.gate_gradients[p], p.grad = p.grad, None

    def _decide(self):
        """T_end: the gates become constants, and closed triplets go, unless other processes train with them."""
        self.C_end = expected_density(self.layers).item()
        freeze_gates(self.layers, self.budget, self.recipe.rule, self.recipe.survivors)
        self.kept_end = kept_density(self.layers)
        if world_size() == 1:
            self._prune()
        else:
            self._empty()

    def _prune(self):
        """Remove the closed triplets, also from the optimizer's state."""
        for layer in self.layers.values():
            moments = [moments_of(self.optimizer, p) for p in (layer.A, layer.B)]
            kept = prune(layer)
            for p, values, axis in zip((layer.A, layer.B), moments, (0, 1)):
                for key, value in values.items():
                    self.optimizer.state[p][key] = value.index_select(axis, kept)

    def _empty(self):
        """Make the closed triplets 0, also in the optimizer's state: no gradient moves them, and they add to none."""
        for layer in self.layers.values():
            closed = (layer.gate.settled() == 0).nonzero().flatten()
            for p, axis in ((layer.A, 0), (layer.B, 1)):
                for value in (p.data, *moments_of(self.optimizer, p).values()):
                    value.index_fill_(axis, closed, 0)

    def status(self):
        """What a log shows of the step that is done. It synchronizes the GPU."""
        return status_of(self.layers, self.schedule.phase(self.step - 1), self.lagrangian.lam.item())

    def decisions(self):
        """What must be the same when a run is resumed: steps, budget and recipe, as a dict."""
        used = {**asdict(self.recipe), "gate_lr": self.gate_lr}
        return {"total_steps": self.total_steps, "budget": self.budget, **used}

    def state_dict(self):
        """All but the model and the optimizer, as plain values and tensors.

        Raises RuntimeError in the middle of a step and after finish().
        """
        self.guard.expect("before_step", "state_dict")
        return {
            "decisions": self.decisions(),
            "step": self.step,
            "C_end": self.C_end,
            "kept_end": self.kept_end,
            "gate_optimizer": self.gate_optimizer.state_dict(),
            "lam": self.lagrangian.lam.detach().clone(),
            "ascent": self.lagrangian.optimizer.state_dict(),
            "noise": self.noise.get_state(),
        }

    def __getstate__(self):
        raise TypeError("a RankAllocator cannot be copied or pickled, since it is tied to its model and optimizer: "
                        "use state_dict and load_state_dict")  # fmt: skip

    def load_state_dict(self, state):
        """Go on from a `state_dict`, after the load_state_dict of the model and of the optimizer, both made before.

        Raises ValueError where steps, budget or recipe differ, or where the model is not in the phase of that step,
        RuntimeError after finish().
        """
        self.guard.load_state_dict(state)
        for layer in self.layers.values():
            layer.gate.log_theta.requires_grad_(False)  # until before_step: DistributedDataParallel must not see it
        self._stop_diverting()
        self.step, self.C_end, self.kept_end = state["step"], state["C_end"], state["kept_end"]
        self.gate_optimizer.load_state_dict(state["gate_optimizer"])
        self.lagrangian.lam.data.copy_(state["lam"])
        self.lagrangian.optimizer.load_state_dict(state["ascent"])
        self.noise.set_state(state["noise"])


def reduce_gradients(optimizer, how, more=()):
    """Replace every gradient by its "sum" or "mean" over all processes, in place, with one all_reduce.

    Of all that the optimizer trains, and of `more`; a missing gradient counts as 0. What is sharded is left out, since
    FSDP reduces its gradients.
    """
    held = [p for p in parameters_of(optimizer) if p.requires_grad]
    parameters = [p for p in (*held, *more) if not is_sharded(p)]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    if how == "mean":
        flat /= world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p).to(p.dtype)


def moments_of(optimizer, p):
    """What an optimizer keeps for every entry of a parameter, which is not its count of steps: {key: tensor}."""
    state = optimizer.state.get(p, {})
    return {key: x for key, x in state.items() if isinstance(x, torch.Tensor) and x.shape == p.shape}


def lr_factor(step, total_steps, warmup=0.0, start=0):
    """What to multiply the learning rate by at a step.

    Linear decay from 1 at step `start` to 0 at total_steps, times a linear warm-up over warmup x total_steps.
    """
    fall = (total_steps - step) / max(1, total_steps - start)
    return fall * min(1, (step - start + 1) / (warmup * total_steps + 1))


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
