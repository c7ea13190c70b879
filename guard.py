"""Every refusal of misuse: what would otherwise go wrong silently in a training loop with a RankAllocator.

`Guard` knows which hook of the allocator is due, and checks that the model, the optimizer and the processes are those
that Algorithm 1 can work with. No part of the method is here: without this file the numbers would be the same.
"""

import re
from traceback import walk_stack

import torch
import torch.distributed as dist
from torch import nn

from budget import check_budget, kept_density
from salora import salora_layers

NO_SCALER = "a GradScaler scales the loss but not the penalty: use bf16, which needs none"
ORDER = ("each step is before_step, loss.backward, after_backward, optimizer.step, after_step, zero_grad; "
         "finish comes once, at the end")  # fmt: skip


class Guard:
    """The checks of one RankAllocator, one method per hook. Raises RuntimeError for misuse of a hook, and ValueError
    for a model or an optimizer that the allocator cannot work with."""

    def __init__(self, allocator, optimizer, gradients_are_summed):
        self.allocator, self.gradients_are_summed = allocator, gradients_are_summed
        check_budget(allocator.budget)
        if not isinstance(allocator.total_steps, int) or allocator.total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, got {allocator.total_steps!r}")
        if getattr(optimizer, "scaler", None) is not None:
            raise ValueError(NO_SCALER)
        self.check_parts()
        self.due = "before_step"  # the hook that must come next
        self.stepped = False  # whether the optimizer has stepped since after_backward
        self.looked_for_scaler = False
        self.handle = allocator.optimizer.register_step_pre_hook(self.see_step)

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
        if step in (0, schedule.T_start, schedule.T_end):  # much may have changed since the last look
            self.check_parts()
            self.check_processes()
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
        if not self.looked_for_scaler:  # once: whoever uses a scaler uses it from the first step on
            self.check_scaler()
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
        if self.check_gates(step) != "free":
            self.check_kept(self.allocator.kept_end)
        self.check_parts()
        self.check_processes()
        self.due = "nothing more"
        self.handle.remove()

    def load_state_dict(self, state):
        """Returns the state of the gates, "held", "free" or "fixed", at the step of a saved run."""
        if self.due == "nothing more":
            raise RuntimeError("load_state_dict was called after finish(): make a new RankAllocator")
        saved, now = state["decisions"], self.allocator.decisions()
        if saved != now:
            raise ValueError(f"the saved run had {saved}, but this one has {now}")
        self.check_parts()
        gates = self.check_gates(state["step"])
        if gates != "free":
            self.check_kept(state["kept_end"])
        self.due = "before_step"  # whatever a step that was interrupted left behind
        return gates

    # What the allocator works with

    def check_parts(self):
        """The model, its adapters and the optimizer."""
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

    def check_scaler(self):
        """A GradScaler cannot be found through what it scales, but it is on the stack when it calls optimizer.step."""
        for frame, _ in walk_stack(None):
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
                raise RuntimeError(NO_SCALER)
        self.looked_for_scaler = True

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
        """Returns the state that the gates must have before a step. Raises ValueError where they are in another."""
        schedule = self.allocator.schedule
        right = "held" if step <= schedule.T_start else "free" if step <= schedule.T_end else "fixed"
        for name, layer in self.allocator.layers.items():
            if layer.gate.state != right:
                raise ValueError(f"before step {step} gates are {right}, but those of {name} are {layer.gate.state}: "
                                 "load the model's state of that step")  # fmt: skip
        return right

    def check_kept(self, kept_end):
        """The model's constant gates keep what they kept then; before T_end, everything."""
        kept, expected = kept_density(self.allocator.layers), 1.0 if kept_end is None else kept_end
        if kept != expected:
            raise ValueError(f"the model keeps {kept:.4f} of its adapter parameters where {expected:.4f} is right: its "
                             "weights come from another phase of training")  # fmt: skip

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
