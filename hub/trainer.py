"""RankAllocator under transformers' Trainer: its hooks as callbacks.

    adapt(model, ["query", "value"])
    model.classifier.requires_grad_(True)               # adapt freezes everything else
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = RankAllocator(model, optimizer, total_steps=args.max_steps, budget=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, allocator.lr_factor)
    Trainer(model, args, optimizers=(optimizer, schedule), callbacks=[RankCallback(allocator)], ...).train()
"""

import torch
from transformers import TrainerCallback


class RankCallback(TrainerCallback):
    """Calls the hooks of an allocator, and keeps its state beside every checkpoint, so that a run can be resumed.

    Raises ValueError for load_best_model_at_end.
    """

    def __init__(self, allocator):
        self.allocator = allocator

    def on_train_begin(self, args, state, control, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end could bring back weights from before T_end, with other ranks")
        if state.global_step > 0:  # resumed
            self.allocator.load_state_dict(torch.load(self.path(args, state)))

    def on_step_begin(self, args, state, control, **kwargs):
        self.allocator.before_step(state.global_step)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.allocator.after_backward()

    def on_optimizer_step(self, *args, **kwargs):
        self.allocator.after_step()

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.allocator.state_dict(), self.path(args, state))

    def on_train_end(self, *args, **kwargs):
        self.allocator.finish()

    def path(self, args, state):
        """The file of the allocator's state in the checkpoint of this step."""
        return f"{args.output_dir}/checkpoint-{state.global_step}/allocator.pt"
