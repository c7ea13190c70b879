"""Checks for misuse that would otherwise go wrong silently in a training loop with a RankAllocator.

`Guard` knows which hook of the allocator is due, and checks that the model, the optimizer and the processes are those
that Algorithm 1 can work with. No part of the method is here: without this file the numbers would be the same.
"""

import re
import warnings
from traceback import walk_stack

import torch
import torch.distributed as dist
from torch import nn

from budget import TRAVEL, affordable, check_budget, kept_density, total_parameters
from salora import is_sharded, salora_layers

FEW_STEPS = 50  # of a window: in fewer, log theta moves by more than TRAVEL / FEW_STEPS per step, and ranks are chance

NO_SCALER = "a GradScaler scales the loss but not the penalty: use bf16, which needs none"
ORDER = ("each step is before_step, loss.backward, after_backward, optimizer.step, after_step, zero_grad; "
         "finish comes once, at the end")  # fmt: skip


class Guard:
    """The checks of one RankAllocator, one method per hook. Raises RuntimeError for misuse of a hook, and ValueError
    for a model or an optimizer that the allocator cannot work with."""

    def __init__(self, allocator, optimizer):
        self.allocator = allocator
        self.check_arguments()
        if getattr(optimizer, "scaler", None) is not None:
            raise ValueError(NO_SCALER)
        for name, layer in allocator.layers.items():
            if layer.allocating:
                raise ValueError(f"another RankAllocator is at work on {name}: adapt a fresh model")
        self.check_parts()
        self.check_budget()
        self.due = "before_step"  # the hook that must come next
        self.stepped = False  # whether the optimizer has stepped since after_backward
        self.looked_for_scaler = False
        self.unreached = list(allocator.layers)  # names of the layers whose B has had no gradient
        optimizer = allocator.optimizer
        self.handles = [
            optimizer.register_step_pre_hook(self.before_optimizer_step),
            optimizer.register_step_post_hook(self.after_optimizer_step),
        ]

    # The hooks, in their order

    def expect(self, due, called=None):
        """Raises RuntimeError unless this hook is due. called: the name to blame, if it is not that of the hook."""
        if self.due == "nothing more":
            raise RuntimeError(f"{called or due} was called after finish(): this allocator is done")
        if self.due != due:
            step = self.allocator.step
            raise RuntimeError(f"{called or due} was called where {self.due} is due, at step {step}: {ORDER}")

    def before_step(self, step):
        due, layers = self.allocator.step, self.allocator.layers.values()
        self.expect("before_step")
        if step != due:
            hint = "steps are counted through all epochs, each once and in order"
            if due == 0:
                hint = "call load_state_dict to go on with a run"
            raise RuntimeError(f"before_step({step}) where step {due} is due: {hint}")
        if step >= self.allocator.total_steps:
            raise RuntimeError(f"before_step({step}), but there are {self.allocator.total_steps} steps: call finish()")
        if step > 0:
            self.check_gates(step)
        elif any(layer.r < layer.r0 for layer in layers):
            raise ValueError("triplets have been pruned already: call load_state_dict to go on with a run, or adapt a "
                             "fresh model")  # fmt: skip
        schedule = self.allocator.schedule
        if step in (0, schedule.T_start, schedule.T_end, schedule.T_end + 1):  # much may have changed since
            self.check_parts()
            self.check_processes()
        if step == schedule.T_start and 0 < len(self.unreached) < len(layers):
            warnings.warn(f"no gradient has reached {', '.join(self.unreached)} so far: does the model use these "
                          "weights without calling their layers?", stacklevel=3)  # fmt: skip
        self.due, self.stepped = "after_backward", False

    def after_backward(self):
        """What a step needs, after the gradients of all processes have been reduced."""
        if self.without_gradients():
            raise RuntimeError("no gradient has reached an adapter: call after_backward after loss.backward(), and see "
                               "that the model calls the adapted layers")  # fmt: skip
        self.unreached = [name for name in self.unreached if self.allocator.layers[name].B.grad is None]
        if self.allocator.phase == "window":
            if not all(layer.training for layer in self.allocator.layers.values()):
                raise RuntimeError("the model is in eval mode, in which gates have no noise: call model.train() first")
            if not self.allocator.gate_gradients:
                raise RuntimeError("no gradient has reached log_theta: leave its requires_grad to the allocator")
        self.due = "after_step"

    def without_gradients(self):
        """Whether no layer that has triplets has a gradient."""
        layers = [layer for layer in self.allocator.layers.values() if layer.r > 0]
        return bool(layers) and all(layer.B.grad is None for layer in layers)

    def before_optimizer_step(self, optimizer, args, kwargs):
        """Called by the optimizer before each of its steps. What it is called with decides which hook sees the step."""
        if not self.looked_for_scaler:  # once: whoever uses a scaler uses it from the first step on
            self.check_scaler()
        self.closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self.closure is None:
            self.see_step()
        elif self.due != "after_backward":  # what it adds, the closure's zero_grad would remove
            raise RuntimeError("optimizer.step(closure) does the backward pass: call after_backward in the closure")

    def after_optimizer_step(self, optimizer, args, kwargs):
        """Called by the optimizer after each of its steps."""
        if self.closure is not None:
            self.see_step()

    def see_step(self):
        """A step is about to happen or, with a closure that has called after_backward, has just happened."""
        self.expect("after_step", "optimizer.step()")
        if self.stepped:
            raise RuntimeError(f"optimizer.step() was called twice at step {self.allocator.step}")
        if self.without_gradients():
            raise RuntimeError("the gradients are gone: call zero_grad after after_step")
        self.stepped = True

    def after_step(self):
        self.expect("after_step")
        if not self.stepped:
            raise RuntimeError(f"after_step was called where optimizer.step() is due at step {self.allocator.step}: is "
                               "another optimizer stepped than the allocator was given?")  # fmt: skip
        if self.allocator.step == 0:
            self.check_moments()
        self.due = "before_step"

    def finish(self):
        self.expect("before_step", "finish")
        step, T_end = self.allocator.step, self.allocator.schedule.T_end
        if step < T_end:
            raise RuntimeError(f"finish() after {step} steps, but ranks are decided after {T_end}: run these first")
        if self.check_gates(step) != "free":
            self.check_kept(self.allocator.kept_end)
        self.check_parts()
        self.check_processes()
        self.due = "nothing more"
        for handle in self.handles:
            handle.remove()

    def load_state_dict(self, state):
        """The state of a saved run, before anything of it is taken over."""
        if self.due == "nothing more":
            raise RuntimeError("load_state_dict was called after finish(): make a new RankAllocator")
        saved, now = state["decisions"], self.allocator.decisions()
        differ = [f"{name} {saved.get(name)} (now {now[name]})" for name in now if saved.get(name) != now[name]]
        if differ:
            raise ValueError(f"the saved run had {', '.join(differ)}: a run goes on with what it began with")
        self.check_parts()
        gates = self.check_gates(state["step"])
        if gates != "free":
            self.check_kept(state["kept_end"])
        self.due = "before_step"  # whatever a step that was interrupted left behind

    # What the allocator works with

    def check_arguments(self):
        total_steps, reduce = self.allocator.total_steps, self.allocator.reduce
        if type(total_steps) is not int or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {total_steps!r}; for Trainer, set "
                             "max_steps")  # fmt: skip
        if reduce not in (None, "mean", "sum"):
            raise ValueError(f'reduce must be "mean", "sum" or None, got {reduce!r}')

    def check_budget(self):
        """A budget in which no triplet fits would leave nothing to train."""
        budget, layers = self.allocator.budget, self.allocator.layers
        check_budget(budget)
        room, least = affordable(budget, total_parameters(layers)), min(x.triplet_size for x in layers.values())
        if self.allocator.recipe.rule == "budget" and room < least:
            raise ValueError(f"a budget of {budget} has room for {room} parameters, but the smallest triplet has "
                             f"{least}: raise the budget or r")  # fmt: skip

    def warnings(self):
        """What works, but is probably not meant: a list of texts."""
        model, recipe = self.allocator.model, self.allocator.recipe
        steps = self.allocator.schedule.window_steps
        found = []
        rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)} - {recipe.dropout}
        if rates and recipe.dropout is not None:
            found.append(f"the recipe has dropout {recipe.dropout:g} while adapters train, but the model has "
                         f"nn.Dropout with p = {max(rates):g}: set p, or dropout=None in the recipe")  # fmt: skip
        start, end = recipe.window
        if steps < FEW_STEPS and start < end:
            found.append(f"gates train for {steps} of {self.allocator.total_steps} steps; in fewer than {FEW_STEPS} "
                         "ranks mean little: take more steps or a wider window")  # fmt: skip
        reach = self.allocator.gate_lr * steps
        if 0 < reach < 0.99 * TRAVEL and recipe.controller != "projection":
            found.append(f"in {steps} steps of {self.allocator.gate_lr:g} log_theta moves by at most {reach:.3g}, and "
                         f"needs about {TRAVEL} to close a gate: the budget may be missed; raise gate_lr or take more "
                         "steps")  # fmt: skip
        held = {id(p) for p in (*parameters_of(self.allocator.optimizer), *self.allocator.log_thetas)}
        missed = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if missed:
            found.append(f"{missed[0]} requires a gradient, but the optimizer does not hold it: make the optimizer "
                         "after unfreezing what is to train")  # fmt: skip
        return found

    def check_parts(self):
        """The model, its adapters and the optimizer."""
        model, layers, optimizer = self.allocator.model, self.allocator.layers, self.allocator.optimizer
        if not layers:
            raise ValueError("the model has no adapters: call adapt(model, targets) first")
        if list(salora_layers(model).values()) != list(layers.values()):
            raise ValueError("the model's adapters have been replaced: do so before making a RankAllocator")
        for kind in [type(optimizer), *(type(m) for m in model.modules())]:
            if re.search("FullyShardedDataParallel|deepspeed", f"{kind.__module__}.{kind.__name__}"):
                raise ValueError(f"{kind.__name__} shards adapters, which then cannot be pruned: use fully_shard with "
                                 "them in ignored_params, or DistributedDataParallel")  # fmt: skip
            if issubclass(kind, nn.parallel.DistributedDataParallel) and self.allocator.reduce == "sum":
                raise ValueError('DistributedDataParallel has averaged the gradients already: pass reduce="mean"')
        if world_size() > 1 and self.allocator.reduce is None:
            raise ValueError('several processes: pass reduce="mean", so that after_backward averages their gradients, '
                             'or "sum"')  # fmt: skip
        held = {id(p) for p in parameters_of(optimizer)}
        for name, layer in layers.items():
            if any(is_sharded(p) for p in (layer.A, layer.B, layer.gate.log_theta)):
                raise ValueError(f"the adapter of {name} is sharded: give fully_shard its A, B and gate.log_theta as "
                                 "ignored_params")  # fmt: skip
            if layer.r == 0 and not {id(layer.A), id(layer.B)} <= held:
                raise ValueError(f"the optimizer does not hold A and B of {name}, which has lost all triplets: make "
                                 "it before the model's state is loaded; a new run needs a fresh model")  # fmt: skip
            if id(layer.A) not in held or id(layer.B) not in held:
                raise ValueError(f"the optimizer does not hold A and B of {name}: make it after adapt()")
            if layer.r > 0 and not (layer.A.requires_grad and layer.B.requires_grad):
                raise ValueError(f"A and B of {name} are frozen: call requires_grad_(True) on them")
            if id(layer.gate.log_theta) in held:
                raise ValueError(f"the optimizer holds log_theta of {name}, which the allocator trains: leave it out")
            if layer.gate.log_theta.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"log_theta of {name} is {layer.gate.log_theta.dtype}, too coarse for its steps: "
                                 "convert the model before adapt(), which makes gates in float32 (Lightning: "
                                 "bf16-mixed)")  # fmt: skip

    def check_scaler(self):
        """A GradScaler cannot be found through what it scales, but it is on the stack when it calls optimizer.step."""
        for frame, _ in walk_stack(None):
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
                raise RuntimeError(NO_SCALER)
        self.looked_for_scaler = True

    def check_processes(self):
        """Weights that differ between processes would get ranks that differ."""
        if world_size() == 1:
            return
        trained = [p for p in parameters_of(self.allocator.optimizer) if not is_sharded(p)]
        sums = [p.detach().double().sum() for p in (*trained, *self.allocator.log_thetas)]
        ends = torch.stack(sums + [-value for value in sums])
        dist.all_reduce(ends, dist.ReduceOp.MAX)  # the greatest of each, and the smallest with its sign changed
        greatest, smallest = ends.chunk(2)
        if (greatest > -smallest).any():
            raise RuntimeError("the processes' adapters or heads differ: give all the same seed before these are made, "
                               "and let after_backward combine all gradients (reduce=...)")  # fmt: skip

    def check_gates(self, step):
        """Returns the state that the gates must have before a step. Raises ValueError where they are in another."""
        schedule = self.allocator.schedule
        right = "held" if step <= schedule.T_start else "free" if step <= schedule.T_end else "fixed"
        for name, layer in self.allocator.layers.items():
            if layer.gate.state != right:
                raise ValueError(f"at step {step} gates must be {right}, but those of {name} are {layer.gate.state}: "
                                 "load the model's state of that step before the allocator's")  # fmt: skip
        return right

    def check_kept(self, kept_end):
        """The model's constant gates keep what they kept then; before T_end, everything."""
        kept, expected = kept_density(self.allocator.layers), 1.0 if kept_end is None else kept_end
        if kept != expected:
            raise ValueError(f"the model keeps {kept:.4f} of its adapter parameters where {expected:.4f} is right: "
                             "the model's and the allocator's state are of different steps")  # fmt: skip

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


def parameters_of(optimizer):
    """All parameters that an optimizer holds, a list."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def unwrapped(optimizer):
    """The torch optimizer inside an accelerate one."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
