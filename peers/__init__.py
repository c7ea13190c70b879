"""Every method that the main job can train, SaLoRA first; the systems it is compared with have a file each here, in
this project's notation and for its loop."""

from collections.abc import Callable
from dataclasses import dataclass

from peers.adalora import AdaLoRA
from peers.adapters import houlsby, pfeiffer
from peers.alora import ALoRA
from peers.bias import bitfit, ia3
from peers.child_tuning import ChildTuning
from peers.fixed_ranks import FixedRanks
from peers.mam import mam
from peers.nf4 import quantize_linears
from peers.prefix import prefix_tuning, prompt_tuning
from peers.propelt import propelt_adapter, propelt_lora, propelt_prefix
from peers.rm_lora import RMLoRA
from peers.sora import SoRA
from rank_allocator import RankAllocator
from salora import adapt, replace_modules

TARGETS = ["query", "key", "value", "out", "up", "down"]  # all six matrices of a layer, as in the paper


def triplets(model, rank, alpha=16):
    """Freeze the encoder, and put `rank` triplets into each of its matrices."""
    adapt(model.encoder, TARGETS, rank, alpha)


def everything(model):
    """Nothing is frozen."""


def head(model):
    """Freeze the encoder."""
    model.encoder.requires_grad_(False)


@dataclass(frozen=True)
class Method:
    """What makes a method: what it does to the model, and who decides about ranks while it trains."""

    lr: tuple  # the learning rates that do well on generated and on official tasks
    install: Callable = triplets  # install(model) or, if `sized`, install(model, size): what trains
    allocator: type = FixedRanks
    sized: bool = True  # whether --rank applies
    budgeted: bool = False  # whether --budget applies
    adds_modules: bool = False  # to the encoder, for good: nothing of it can be merged or exported
    quantize: str | None = None  # what the frozen matrices are kept in, whether or not --quantize asks for it
    precision: str = "fp32"  # of the model's matrix products, unless --precision asks for another

    @property
    def low_rank(self):
        """Whether it trains triplets."""
        return self.install is triplets


METHODS = {
    "salora": Method((2e-3, 1e-3), allocator=RankAllocator, budgeted=True),
    "lora": Method((2e-3, 1e-3)),
    "full": Method((5e-4, 5e-5), everything, sized=False),
    "head": Method((3e-3, 1e-3), head, sized=False),
    "adalora": Method((1e-2, 5e-3), allocator=AdaLoRA, budgeted=True),
    "sora": Method((2e-3, 1e-3), allocator=SoRA),
    "alora": Method((2e-3, 1e-3), allocator=ALoRA, budgeted=True),
    "rm-lora": Method((2e-3, 1e-3), allocator=RMLoRA),
    "adapter-h": Method((4e-3, 1e-3), houlsby, adds_modules=True),
    "adapter-p": Method((4e-3, 1e-3), pfeiffer, adds_modules=True),
    "prefix": Method((3e-2, 1e-2), prefix_tuning, adds_modules=True),
    "prompt": Method((2e-2, 1e-2), prompt_tuning, adds_modules=True),
    "bitfit": Method((5e-3, 1e-3), bitfit, sized=False),
    "ia3": Method((2e-2, 5e-3), ia3, sized=False, adds_modules=True),
    "child-tuning": Method((5e-4, 5e-5), everything, allocator=ChildTuning, sized=False),
    "mam": Method((4e-3, 1e-3), mam, adds_modules=True),
    "propelt-adapter": Method((4e-3, 1e-3), propelt_adapter, adds_modules=True),
    "propelt-prefix": Method((3e-2, 1e-2), propelt_prefix, adds_modules=True),
    "propelt-lora": Method((4e-3, 1e-3), propelt_lora),
    "qlora": Method((2e-3, 1e-3), quantize="nf4", precision="bf16"),
}


def install(model, name, rank=8, alpha=16, quantize=None):
    """Make the encoder of a model ready for the method of this name; its head stays as it is. rank: the method's size
    (triplets per matrix, units of an adapter, vectors of a prefix or prompt), where it has one. quantize: "nf4" keeps
    the frozen matrices under the triplets in 4 bits."""
    method = METHODS[name]
    if quantize or method.quantize:
        quantize_linears(model.encoder, TARGETS)
    if method.low_rank:
        method.install(model, rank, alpha)
    elif method.sized:
        method.install(model, rank)
    else:
        method.install(model)


def made_plain(model):
    """Put plain layers in the place of all that can say what it is in their terms: nn.Linear for weights in 4 bits,
    SaLoRALinear for masked LoRA. Then the model can be merged and exported. Returns it."""
    return replace_modules(model, {id(m): m.plain() for m in model.modules() if hasattr(m, "plain")})


def allocator_for(name, model, optimizer, total_steps, *, warmup=0.0, recipe=None, **options):
    """The allocator of a method, an object with the hooks of RankAllocator.

    recipe: SaLoRA's; the others take `warmup` instead. options: what the method's allocator has beside it, such as
    seed, reduce or budget; an option that is None keeps its default.
    """
    options = {option: value for option, value in options.items() if value is not None}
    if name == "salora":
        return RankAllocator(model, optimizer, total_steps, recipe=recipe, **options)
    return METHODS[name].allocator(model, optimizer, total_steps, warmup=warmup, **options)
