"""RankAllocator under transformers' Trainer: its hooks as callbacks, and checkpoints without the frozen weights.

    adapt(model, ["query", "value"])
    model.classifier.requires_grad_(True)               # adapt freezes everything else
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = RankAllocator(model, optimizer, args.max_steps, budget=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, allocator.lr_factor)
    AdapterTrainer(model, args, optimizers=(optimizer, schedule), callbacks=[RankCallback(allocator)], ...).train()

The arguments need max_steps, since the allocator has to know how many steps there will be. Under torchrun Trainer wraps
the model in DistributedDataParallel, and the allocator needs reduce="mean". For Lightning see hub/lightning.py.
"""

from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from hub.adapters import trained_state
from hub.checkpoints import read_torch, write_atomically


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
            self.allocator.load_state_dict(read_torch(self.path(args, state)))

    def on_step_begin(self, args, state, control, **kwargs):
        self.allocator.before_step(state.global_step)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.allocator.after_backward()

    def on_optimizer_step(self, *args, **kwargs):
        self.allocator.after_step()

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:  # one of several processes
            write_atomically(self.path(args, state), lambda path: torch.save(self.allocator.state_dict(), path))

    def on_train_end(self, *args, **kwargs):
        self.allocator.finish()

    def path(self, args, state):
        """The file of the allocator's state in the checkpoint of this step."""
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "allocator.pt"


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold what training changes: megabytes instead of the whole base.

    What it saves is for resuming; the finished adapter is for `save_adapter` or `export_peft`.
    """

    def save_model(self, output_dir=None, _internal_call=False):
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "trained.pt", lambda path: torch.save(trained_state(self.model), path))

    def _load_from_checkpoint(self, folder, model=None):
        self.model.load_state_dict(read_torch(Path(folder) / "trained.pt"), strict=False)
