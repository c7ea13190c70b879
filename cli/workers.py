"""Several processes that train one model, as torchrun starts them."""

import torch
import torch.distributed as dist


def workers():
    """(the number of this process, how many train together): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_workers(loss, parameters):
    """Each worker saw its share of the batch: add up their gradients, in place, and their losses."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])  # adapters are small: one message a step
    dist.all_reduce(flat)
    loss, *grads = flat.split([1, *(p.numel() for p in parameters)])
    for p, grad in zip(parameters, grads):
        p.grad = grad.view_as(p)
    return loss[0]
