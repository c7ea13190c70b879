"""Several processes that train one model, as torchrun starts them: each takes its share of every batch."""

import atexit
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist


def start_workers(device):
    """Join the other processes, if torchrun started this one."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        import torch._dynamo  # an optimizer would import it later, and it keeps a group that it finds alive for ever

        dist.init_process_group("nccl" if torch.cuda.is_available() and device != "cpu" else "gloo")
        atexit.register(dist.destroy_process_group)  # a thread of it that outlives Python aborts the process


def worker():
    """The rank of this process: 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def workers():
    """The world size: how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def one_at_a_time():
    """The processes run this block one after the other: the first may have an encoder to pre-train."""
    if workers() == 1:
        yield
        return
    for _ in range(worker()):
        dist.barrier()
    yield
    for _ in range(workers() - worker()):
        dist.barrier()


def share_of(batch, accumulate):
    """This process's share of a batch of rows, in at most `accumulate` parts, none of them empty."""
    parts = min(accumulate, len(batch))
    stride = workers() * parts
    shares = [batch[worker() + workers() * i :: stride] for i in range(parts)]
    return [share for share in shares if share]


def add_up(loss, model):
    """Sum the gradients of all processes, in place, and their losses. Returns the loss of the whole batch."""
    if workers() == 1:
        return loss
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])  # adapters are small: one message a step
    dist.all_reduce(flat)
    loss, *grads = flat.split([1, *(p.numel() for p in trained)])
    for p, grad in zip(trained, grads):
        p.grad = grad.view_as(p)
    return loss[0]
