"""What a run keeps while it trains: a log, a status line now and then, a checkpoint per epoch."""

import math
import time

import torch

from cli import report
from cli.files import digest_of
from cli.runs import CHECKPOINT
from cli.workers import worker
from guard import parameters_of
from hub.adapters import adapter_state
from hub.checkpoints import write_atomically


@torch.no_grad()
def trace_of(step, layers):
    """A dict for every layer, with the keys report.TRACE: its gates, and both terms of Eq. (9)."""
    rows = []
    for name, layer in layers.items():
        I = torch.eye(layer.r, device=layer.A.device)
        orth_A = (layer.A @ layer.A.T - I).square().sum().item()
        orth_B = (layer.B.T @ layer.B - I).square().sum().item()
        gates = {"open": layer.gate.open_probability().sum().item(), "log_theta": layer.gate.log_theta.tolist()}
        rows.append({"step": step, "layer": name, "rank": layer.r, **gates, "orth_A": orth_A, "orth_B": orth_B})
    return rows


def check_finite(parameters, step):
    """Raises FloatingPointError where a weight is not finite."""
    if not all(p.isfinite().all() for p in parameters):
        raise FloatingPointError(f"weights are not finite at step {step}: try a smaller --lr")


class Journal:
    """A log row for every 1/200 of the steps, a status line for every tenth row, and a checkpoint at every epoch.

    folder: where the checkpoint goes; without one there is none. fingerprint() returns what a resumed run must have in
    common with the interrupted one, a dict. rows: the log, dicts with the keys report.COLUMNS. trace: what trace_of
    says at the same steps; it stays empty unless `tracing`.
    """

    def __init__(self, total_steps, folder=None, fingerprint=dict, tracing=False):
        self.total_steps, self.folder, self.fingerprint, self.rows = total_steps, folder, fingerprint, []
        self.tracing, self.trace = tracing, []
        self.every = max(1, total_steps // 200)
        self.seconds_before, self.started, self.first = 0.0, time.time(), 0

    @property
    def seconds(self):
        """Spent on training, those before an interruption included."""
        return self.seconds_before + time.time() - self.started

    def begin_epoch(self, step, model, optimizer, allocator):
        """Leave a checkpoint. The running loss starts over, so that a resumed run has the same log.

        Raises FloatingPointError, and leaves the last one, where a trained weight is not finite.
        """
        self.running, self.counted = 0.0, 0
        if self.folder is None or worker() > 0 or step == self.first:
            return
        check_finite([p for p in model.parameters() if p.requires_grad], step)
        state = {
            "format": CHECKPOINT,
            "fingerprint": self.fingerprint(),
            "adapter": adapter_state(model),
            "optimizer": optimizer.state_dict(),
            "allocator": allocator.state_dict(),
            "journal": {"step": step, "rows": self.rows, "trace": self.trace, "seconds": self.seconds},
        }
        state["digest"] = digest_of(state)
        write_atomically(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def restore(self, saved, optimizer, allocator):
        """Go on from a checkpoint, after the model has loaded its part of it.

        Raises ValueError, before anything changes, where the interrupted run had another fingerprint.
        """
        for name, value in self.fingerprint().items():
            if saved["fingerprint"].get(name) != value:
                before = f"the interrupted run had {name} {saved['fingerprint'].get(name)}, but now it is {value}"
                raise ValueError(f"{before}: put it back, or start a new run")
        optimizer.load_state_dict(saved["optimizer"])
        allocator.load_state_dict(saved["allocator"])
        state = saved["journal"]
        self.first, self.rows, self.seconds_before = state["step"], state["rows"], state["seconds"]
        self.trace = state["trace"]

    def add(self, step, loss, optimizer, allocator, batch_size):
        """Note the loss (a tensor) of a step that is done. Only every `every`-th call waits for the device.

        Raises FloatingPointError where the loss is not finite or, after the last step, a weight: no loss shows it.
        """
        done = step + 1
        self.running, self.counted = self.running + loss, self.counted + 1
        if done % self.every and done < self.total_steps:
            return
        mean = (self.running / self.counted).item()
        self.running, self.counted = 0.0, 0
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} at step {done}, not finite: try a smaller --lr")
        if done == self.total_steps:
            check_finite(parameters_of(optimizer), done)
        self.rows.append({"step": done, "loss": mean, "lr": optimizer.param_groups[0]["lr"], **allocator.status()})
        if self.tracing:
            self.trace += trace_of(done, allocator.layers)
        if len(self.rows) % 10 == 0 or done == self.total_steps:
            pace = (time.time() - self.started) / (done - self.first)  # seconds a step
            line = report.status_line(self.rows[-1], self.total_steps, allocator, batch_size / pace)
            print(f"{line} | eta {pace * (self.total_steps - done):.0f} s", flush=True)
