"""RankAllocator under Lightning: its hooks as a callback, for modules with automatic optimization.

    adapt(model, ["query", "value"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = RankAllocator(model, optimizer, total_steps=1000, budget=0.5)    # several devices: reduce="mean"
    Trainer(max_steps=1000, callbacks=[RankCallback(allocator)]).fit(module, ...)

`module.configure_optimizers` returns this optimizer, and with it the learning rate that the recipe prescribes:

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, allocator.lr_factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

Every Lightning checkpoint holds the allocator's state; with accumulated batches one must not fall between two of them.
To merge or export one from after T_end, load it into a new module, and finish the allocator of that:

    saved = torch.load(path, weights_only=False)
    module.load_state_dict(saved["state_dict"])
    allocator.load_state_dict(saved["callbacks"]["RankCallback"])
    allocator.finish()
"""

from lightning.pytorch import Callback


class RankCallback(Callback):
    """Calls the hooks of an allocator. A step may consist of several batches (accumulate_grad_batches).

    Raises ValueError for a schedule that steps once per epoch, which is Lightning's default.
    """

    def __init__(self, allocator):
        self.allocator = allocator
        self.begun = -1  # the step for which before_step was called last
        self.finished = False

    def on_train_start(self, trainer, *args):
        for schedule in trainer.lr_scheduler_configs:
            if schedule.interval != "step":
                raise ValueError('the learning-rate schedule steps once per epoch: give it "interval": "step"')

    def on_train_batch_start(self, trainer, *args):
        if self.begun != trainer.global_step:
            self.begun = trainer.global_step
            self.allocator.before_step(self.begun)

    def on_before_optimizer_step(self, *args):  # inside the closure, after all backward passes and before clipping
        self.allocator.after_backward()

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step > self.allocator.step:
            self.allocator.after_step()

    def on_train_end(self, *args):
        self.allocator.finish()
        self.finished = True

    def state_dict(self):
        return {} if self.finished else self.allocator.state_dict()

    def load_state_dict(self, state):
        if state:
            self.allocator.load_state_dict(state)
