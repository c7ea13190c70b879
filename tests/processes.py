"""Loops that train one small Llama, alone or with other processes: `python -m torch.distributed.run processes.py FILE
KIND...` writes what each of these kinds finds, and test_elsewhere.py compares it with what one process finds."""

import copy
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from rank_allocator import RankAllocator, Recipe
from salora import adapt, merge, salora_layers

STEPS, BATCH, LR, CLIP, BUDGET = 20, 4, 0.01, 0.5, 0.3
RECIPE = Recipe.ours(window=(0.2, 0.5), beta=0.1)  # long enough, of so few steps, and with every penalty


def llama(**changes):
    """Two blocks with random weights, adapted: the same in all processes."""
    import transformers

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    config = transformers.LlamaConfig(**{**shape, **changes}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return adapt(transformers.LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"], r=4)


def batches():
    """(STEPS, BATCH, 7) token ids: the same in all processes, which take every world_size-th row."""
    return torch.randint(3, 32, (STEPS, BATCH, 7), generator=torch.Generator().manual_seed(1))


def world():
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


def adapters(model):
    """What a run has found: {layer: [rank, B diag(g) A]}, as plain numbers."""
    return {name: [layer.r, layer.delta().tolist()] for name, layer in salora_layers(model).items()}


def loop(kind):
    """A loop of one's own: "plain", in "ddp", prepared by "accelerate", or over a base that "fsdp2" shards. Resumed
    twice: "ddp-loaded", with states that a wrapped model loads, and "loaded-ddp", with those that one loads before."""
    rank, size = world()
    net, model, optimizer, allocator, backward = made(kind)
    clips_first = "ddp" in kind or kind == "accelerate"  # where gradients are reduced during the backward pass
    for step, batch in enumerate(batches()):
        if "loaded" in kind and step in (7, 14):
            states = [copy.deepcopy(part.state_dict()) for part in (net, optimizer, allocator)]
            net, model, optimizer, allocator, backward = made(kind, states)
        rows = batch[rank::size]
        allocator.before_step(step)
        backward(model(input_ids=rows, labels=rows).loss)
        if clips_first:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        allocator.after_backward()
        if not clips_first:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
    allocator.finish()
    found = adapters(net)
    if kind == "fsdp2" and size > 1:
        whole = llama()
        shard(whole, adapters_too=True)
        calls = [lambda: merge(net), lambda: RankAllocator(whole, adamw(whole), STEPS, reduce="mean")]
        found["refused"] = [refusal(call) for call in calls]
    return found


def made(kind, states=()):
    """(Llama, the same as it is called, optimizer, allocator, backward), with the states of an earlier one."""
    size = world()[1]
    net = model = llama()
    if kind == "fsdp2" and size > 1:
        shard(net)
    optimizer, backward = adamw(net), torch.Tensor.backward
    if kind in ("ddp", "ddp-loaded") and size > 1:
        model = DistributedDataParallel(net)
    if kind == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(net, optimizer)
        backward = accelerator.backward
    allocator = RankAllocator(model, optimizer, STEPS, BUDGET, RECIPE, reduce="mean")
    for part, state in zip((net, optimizer, allocator), states):
        part.load_state_dict(state)
    if kind == "loaded-ddp" and size > 1:
        model = DistributedDataParallel(net)
    return net, model, optimizer, allocator, backward


def shard(model, adapters_too=False):
    """FSDP2 of the frozen weights; the adapters stay whole in every process, if they can be trained."""
    from torch.distributed.fsdp import fully_shard

    layers = salora_layers(model).values()
    whole = {p for layer in layers for p in (layer.A, layer.B, layer.gate.log_theta)}
    for part in (*model.model.layers, model):
        fully_shard(part, ignored_params=set() if adapters_too else whole)


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def trainer(folder, budget=BUDGET, dropout=0.0, **arguments):
    """transformers' Trainer, which wraps the model in DistributedDataParallel where there are several processes: two
    micro-batches a step, 13 steps an epoch."""
    import transformers

    from hub.trainer import AdapterTrainer, RankCallback

    model, rows = llama(attention_dropout=dropout), batches().flatten(0, 1)[: 13 * BATCH]
    defaults = dict(max_steps=STEPS, per_device_train_batch_size=BATCH // 2 // world()[1], max_grad_norm=CLIP,
                    gradient_accumulation_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, log_level="error",
                    save_steps=7)  # fmt: skip
    args = transformers.TrainingArguments(folder, **{**defaults, **arguments})
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, args.max_steps, budget, RECIPE, reduce="mean")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, allocator.lr_factor)
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    return AdapterTrainer(model, args, train_dataset=data, eval_dataset=data[:4], optimizers=(optimizer, schedule),
                          callbacks=[RankCallback(allocator)])  # fmt: skip


def lightning(folder, accumulate=2, steps_per_epoch=STEPS):
    """(Lightning's Trainer, module, data): automatic optimization, which steps through a closure."""
    import lightning.pytorch as pl

    from hub.lightning import RankCallback

    model = llama()
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer, STEPS, BUDGET, RECIPE, reduce="mean")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, rows):
            return self.model(input_ids=rows, labels=rows).loss

        def configure_optimizers(self):
            return {"optimizer": optimizer, "lr_scheduler": {"interval": "step", "scheduler":
                    torch.optim.lr_scheduler.LambdaLR(optimizer, allocator.lr_factor)}}  # fmt: skip

    rank, size = world_of_torchrun()
    defaults = dict(max_steps=STEPS, accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto",
                    gradient_clip_val=CLIP, accumulate_grad_batches=accumulate, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=steps_per_epoch < STEPS,
                    use_distributed_sampler=False)  # fmt: skip
    trainer = pl.Trainer(default_root_dir=folder, callbacks=[RankCallback(allocator)], **defaults)
    rows = batches()[:steps_per_epoch].flatten(0, 1)[rank::size]  # Lightning's own sampler would shuffle them
    return trainer, Module(), DataLoader(rows, batch_size=BATCH // accumulate // size)


def world_of_torchrun():
    """(rank, world size), also before Lightning joins the processes."""
    import os

    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run(kind, folder):
    """Train one kind; what it has found."""
    if kind == "trainer":
        made = trainer(folder)
        made.train()
        return adapters(made.model)
    if kind == "lightning":
        made, module, data = lightning(folder)
        made.fit(module, data)
        return adapters(module.model)
    return loop(kind)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    out, *kinds = sys.argv[1:]
    found = {kind: run(kind, f"{out}.{kind}") for kind in kinds}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
