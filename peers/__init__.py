"""The systems that SaLoRA is compared with, a file for each method, in this project's notation and for its loop."""

from collections.abc import Callable
from dataclasses import dataclass

from peers.adalora import AdaLoRA
from peers.adapters import houlsby, pfeiffer
from peers.alora import ALoRA
from peers.bias import bitfit, ia3
from peers.prefix import prefix_tuning, prompt_tuning
from peers.rm_lora import RMLoRA
from peers.sora import SoRA


@dataclass(frozen=True)
class Peer:
    """What makes a method: how it changes the model, and who decides about ranks while it trains."""

    install: Callable | None = None  # install(model, size) puts in what trains; None: triplets in every matrix, as LoRA
    allocator: type | None = None  # None: nothing is to be decided (budget.FixedRanks)
    sized: bool = True  # whether --rank applies
    budgeted: bool = False  # whether --density applies
    adds_modules: bool = False  # to the encoder, for good: nothing of it can be merged or exported


PEERS = {
    "adalora": Peer(allocator=AdaLoRA, budgeted=True),
    "sora": Peer(allocator=SoRA),
    "alora": Peer(allocator=ALoRA, budgeted=True),
    "rm-lora": Peer(allocator=RMLoRA),
    "adapter-h": Peer(houlsby, adds_modules=True),
    "adapter-p": Peer(pfeiffer, adds_modules=True),
    "prefix": Peer(prefix_tuning, adds_modules=True),
    "prompt": Peer(prompt_tuning, adds_modules=True),
    "bitfit": Peer(bitfit, sized=False),
    "ia3": Peer(ia3, sized=False, adds_modules=True),
}
