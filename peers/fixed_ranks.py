"""No allocation: the hooks of a method whose ranks stay as they are, LoRA's for one."""

from budget import expected_density
from guard import world_size
from rank_allocator import lr_factor, reduce_gradients, status_of
from salora import salora_layers


class FixedRanks:
    """The hooks of RankAllocator, for a method without a budget: the learning rate falls, and nothing else happens.

    warmup: the share of all steps in which the learning rate rises. reduce: as for RankAllocator. seed: for subclasses.
    """

    C_end = None

    def __init__(self, model, optimizer, total_steps, warmup=0.0, seed=0, reduce=None):
        self.layers, self.total_steps, self.warmup, self.step = salora_layers(model), total_steps, warmup, 0
        self.optimizer, self.reduce = optimizer, reduce

    def lr_factor(self, step):
        return lr_factor(step, self.total_steps, self.warmup)

    def before_step(self, step):
        pass

    def after_backward(self):
        if self.reduce and world_size() > 1:
            reduce_gradients(self.optimizer, self.reduce)

    def after_step(self):
        self.step += 1

    def finish(self):
        self.C_end = expected_density(self.layers).item() if self.layers else None

    def status(self):
        return status_of(self.layers, "before", 0.0)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]
