"""RankAllocator under transformers' Trainer: its hooks as callbacks, and checkpoints without the frozen weights.

    adapt(model, ["query", "value"])
    model.classifier.requires_grad_(True)               # adapt freezes everything else
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = RankAllocator(model, optimizer, args.max_steps, budget=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, allocator.lr_factor)
    AdapterTrainer(model, args, optimizers=(optimizer, schedule), callbacks=[RankCallback(allocator)], ...).train()

Set max_steps: the allocator must know the number of steps in advance. Under torchrun Trainer wraps the model in
DistributedDataParallel, and the allocator needs reduce="mean". For Lightning see hub/lightning.py.
"""

from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from hub.adapters import trained_state
from hub.checkpoints import read_torch, write_atomically


class RankCallback(TrainerCallback):
    """Calls the hooks of an allocator, and keeps its state in every checkpoint folder, so that a run can be resumed.

    resume_from: the folder given to train(resume_from_checkpoint=...), if it does not lie in output_dir; AdapterTrainer
    passes it on by itself. Raises ValueError for load_best_model_at_end, and for a checkpoint of the last step.
    """

    def __init__(self, allocator, resume_from=None):
        self.allocator, self.resume_from = allocator, resume_from

    def on_train_begin(self, args, state, control, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end could bring back weights from before T_end, with other ranks")
        if state.global_step > 0:  # resumed
            folder = Path(self.resume_from or self.folder(args, state))
            if state.global_step >= self.allocator.total_steps:  # Trainer would take another step
                raise ValueError(f"{folder} has all {self.allocator.total_steps} steps: nothing is left to train")
            self.allocator.load_state_dict(read_torch(folder / "allocator.pt"))

    def on_step_begin(self, args, state, control, **kwargs):
        self.allocator.before_step(state.global_step)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.allocator.after_backward()

    def on_optimizer_step(self, *args, **kwargs):
        self.allocator.after_step()

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:  # one of several processes
            path = self.folder(args, state) / "allocator.pt"
            write_atomically(path, lambda part: torch.save(self.allocator.state_dict(), part))

    def on_train_end(self, *args, **kwargs):
        self.allocator.finish()

    def folder(self, args, state):
        """The checkpoint of this step."""
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold what training changes, megabytes instead of the whole base. It may be in 4 bits.

    Its checkpoints are for resuming; write the finished adapter with `save_adapter` or `export_peft`.
    """

    def __init__(self, model, *args, **kwargs):
        model._hf_peft_config_loaded = True  # Trainer then believes that a quantized model has adapters, as it has
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            del model._hf_peft_config_loaded

    def save_model(self, output_dir=None, _internal_call=False):
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "trained.pt", lambda path: torch.save(trained_state(self.model), path))

    def _load_from_checkpoint(self, folder, model=None):
        self.model.load_state_dict(read_torch(Path(folder) / "trained.pt"), strict=False)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RankCallback):
                callback.resume_from = folder
