"""Do we and the packages that others use read the same out of the same files? Random ones, until something differs.

    python tools/agree.py exports [--inputs 200] [--seed N]        export_peft and import_peft against PEFT: random
                                                                   names of modules, of those with adapters, of heads
An export opens in PEFT with the model's outputs, or is refused before anything is written. Input i depends on the seed
and i alone. Exit status 1 where something differs.
"""

import argparse
import copy
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from hub.peft import export_peft, import_peft  # noqa: E402
from salora import adapt, salora_layers  # noqa: E402

# Exports

NAMES = """fc c_fc proj q_proj out query head heads 2 12 0 A B layer layers default lora lora_A lora_B base_layer
dropout model module block classifier score original_module save modules_to_save norm bias x""".split()
CONTAINERS = [nn.Module, nn.Module, nn.ModuleDict]


class Chain(nn.Module):
    """Linear layers under random names, called one after the other."""

    def __init__(self, rng):
        super().__init__()
        self.paths = []
        for _ in range(rng.randint(2, 6)):
            path = ".".join(rng.choices(NAMES, k=rng.choice([1, 1, 2, 3])))
            inside = [other for other in self.paths if f"{path}.".startswith(f"{other}.")]
            around = [other for other in self.paths if f"{other}.".startswith(f"{path}.")]
            if not inside and not around:
                self.paths.append(path)
                self.add(path.split("."), rng)

    def add(self, path, rng):
        module = self
        for name in path[:-1]:
            if name not in module._modules:
                module.add_module(name, rng.choice(CONTAINERS)())
            module = module._modules[name]
        module.add_module(path[-1], nn.Linear(4, 4))

    def forward(self, x):
        for path in self.paths:
            x = torch.tanh(self.get_submodule(path)(x))
        return x


def random_adapter(rng):
    """(a model, the same with random adapters and heads that train), or None where the names leave no two layers."""
    torch.manual_seed(rng.getrandbits(32))
    base = Chain(rng).eval()
    if len(base.paths) < 2:
        return None
    paths = rng.sample(base.paths, len(base.paths))
    targets = paths[: rng.randint(1, len(paths) - 1)]
    model = adapt(copy.deepcopy(base), targets, r=3, alpha=5)
    adapted = salora_layers(model)
    for layer in adapted.values():
        layer.B.data.normal_()
        layer.gate.fix((torch.rand(3) < 0.7).float())
    for path in set(paths) - set(adapted):
        if rng.random() < 0.5:
            head = model.get_submodule(path).requires_grad_(True)
            head.weight.data.normal_()
    return base, model.eval()


def export_differs(rng):
    """None where an export opens in PEFT and here with the model's outputs, "refused", or what went wrong."""
    import peft

    made = random_adapter(rng)
    if made is None:
        return "skipped"
    base, model = made
    x = torch.randn(5, 4)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        try:
            export_peft(model, out, pad=rng.random() < 0.3)
        except ValueError as error:
            return f"half a folder: {error}" if out.exists() else "refused"
        names = f"adapters {list(salora_layers(model))}, of {base.paths}"
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), out)(x)
        except Exception as error:  # whatever it is, it is what the user would meet
            return f"PEFT: {type(error).__name__}: {' '.join(str(error).split())[:200]}; {names}"
        for other in (theirs, import_peft(copy.deepcopy(base), out)(x)):
            if not torch.allclose(other, model(x), atol=1e-5):
                return f"outputs differ by {(other - model(x)).abs().max():.1e}; {names}"
    return None


# Running


def exports(inputs, seed, say):
    """How many of so many exports PEFT reads otherwise than they were meant."""
    counts, wrong, i = Counter(), 0, 0
    while counts["equal"] + counts["refused"] + wrong < inputs:
        found = export_differs(random.Random(f"{seed}-{i}"))
        if found in (None, "refused", "skipped"):
            counts[found or "equal"] += 1
        else:
            wrong += 1
            say(f"exports, input {i}: {found}")
        i += 1
    equal, refused = counts["equal"], counts["refused"]
    say(f"exports, seed {seed}: {equal} open with the same outputs, {refused} refused, {wrong} wrong")
    return wrong


KINDS = {"exports": (exports, 200)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    compare, inputs = KINDS[args.kind]
    sys.exit(bool(compare(args.inputs or inputs, args.seed, print)))


if __name__ == "__main__":
    main()
