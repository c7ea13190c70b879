"""Forward pass, loss and backward pass as a CUDA graph: recorded once, then replayed.

In a small training step the GPU waits for Python, which launches the kernels one by one: some 1,500 for LoRA in
RoBERTa-base. A CUDA graph launches them all at once. They are the same kernels, so the numbers should be the same; this
is checked with a stand-in on a CPU, but has not been run on a GPU. They read and write fixed addresses, so

- inputs are copied into the buffers of the recording; another shape, dtype or constant gets a recording of its own
- no parameter or buffer may move. Where one has moved, as when gates change their state or triplets go, all recordings
  are dropped, and made again
- gradients are handed over as by a backward pass: added to those that are there, with post-accumulate hooks

    add_gradients = Recorded(model, loss_of)     # loss_of(*inputs) -> the loss, a scalar
    loss = add_gradients(*inputs)                # in the place of loss = loss_of(*inputs) and loss.backward()

The first call with inputs of a new shape runs eagerly, because libraries may initialize themselves then; the second
records. Recordings share their memory, but an eager call needs its own beside it. Left out: the optimizer; one model on
several GPUs; activation checkpointing, which saves the state of a random generator; whatever else reads values back.
"""

from itertools import chain

import torch


def forward_backward(loss_of, *inputs):
    """Add the gradients of a loss to those of the parameters. Returns the loss."""
    loss = loss_of(*inputs)
    loss.backward()
    return loss.detach()


def cuda_graph(work, pool):
    """Record the kernels of work() without running them. Returns a function that runs them.

    pool: where their memory comes from; recordings that share a pool must not keep results in it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


class Recorded:
    """`forward_backward` for one model and one loss, but recorded.

    loss_of(*inputs): a scalar; it must depend only on its inputs and on the model's parameters and buffers. An input
    that is not a tensor is a constant of the recording. record: `cuda_graph`, or what stands in for it.
    """

    def __init__(self, model, loss_of, record=cuda_graph):
        self.model, self.loss_of, self.record = model, loss_of, record
        self.addresses = None

    def __call__(self, *inputs):
        """Add the gradients to those of the parameters. Returns the loss."""
        addresses = [x.data_ptr() for x in chain(self.model.parameters(), self.model.buffers())]
        if addresses != self.addresses:
            self.addresses, self.replays, self.gradients = addresses, {}, {}
            self.pool = torch.cuda.graph_pool_handle() if self.record is cuda_graph else None
        key = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in inputs)
        if key not in self.replays:
            loss = forward_backward(self.loss_of, *inputs)
            self.replays[key] = None
            return loss
        if self.replays[key] is None:
            self.replays[key] = self.recording(inputs)
        return self.replays[key](inputs)

    def recording(self, inputs):
        """Record the work on inputs of these shapes. Returns a function of such inputs that replays it."""
        static_inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = self.gradients  # all recordings write to these, so they are outside of the pool
        gradients.update({p: torch.empty_like(p) for p in trained if p not in gradients})
        loss, reached = torch.empty((), device=trained[0].device), []

        def work():
            result = self.loss_of(*static_inputs)
            loss.copy_(result.detach())
            gradient_of = dict(zip(trained, torch.autograd.grad(result, trained, allow_unused=True)))
            reached[:] = [p for p in trained if gradient_of[p] is not None]
            for p in reached:
                gradients[p].copy_(gradient_of[p])

        with torch.cuda.device_of(loss):
            launch = self.record(work, self.pool)

        def replay(inputs):
            for x, new in zip(static_inputs, inputs):
                if isinstance(x, torch.Tensor):
                    x.copy_(new)
            launch()
            # A backward pass that begins at the parameters themselves adds to .grad, and calls hooks
            torch.autograd.backward(reached, [gradients[p] for p in reached])
            return loss.clone()

        return replay  # it must not hold self: a graph is freed with its Recorded, before another is recorded
