"""RankAllocator under transformers.Trainer: the README shows this class as it stands, and test_allocator.py runs it."""

import torch
from transformers import TrainerCallback


class RankCallback(TrainerCallback):
    def __init__(self, allocator):
        self.allocator = allocator

    def on_train_begin(self, args, state, control, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end could bring back weights from before T_end, with other ranks")
        if state.global_step > 0:  # resumed
            self.allocator.load_state_dict(torch.load(f"{args.output_dir}/checkpoint-{state.global_step}/allocator.pt"))

    def on_step_begin(self, args, state, control, **kwargs):
        self.allocator.before_step(state.global_step)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.allocator.after_backward()

    def on_optimizer_step(self, *args, **kwargs):
        self.allocator.after_step()

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.allocator.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/allocator.pt")

    def on_train_end(self, *args, **kwargs):
        self.allocator.finish()
