"""Several processes that train one model, as torchrun starts them: each takes its share of every batch."""

import atexit
import os
from contextlib import contextmanager

import torch.distributed as dist

from guard import world_size as workers


def start_workers(device):
    """Join the other processes, if torchrun started this one."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        import torch._dynamo  # an optimizer would import it later, and it keeps a group that it finds alive for ever

        dist.init_process_group("nccl" if torch.cuda.is_available() and device != "cpu" else "gloo")
        atexit.register(dist.destroy_process_group)  # a thread of it that outlives Python aborts the process


def worker():
    """The rank of this process: 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


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


def add_up(loss):
    """The loss of a whole batch, from that of each process's share."""
    if workers() > 1:
        dist.all_reduce(loss)
    return loss
