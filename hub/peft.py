"""Adapters out to PEFT and back in: adapter_config.json and adapter_model.safetensors, or .bin.

PEFT's LoRA adds (alpha_m / r_m) B A to the matrix of module m, and knows neither gates nor rank 0: on the way out gates
are folded into B, and layers without an open triplet are left out. On the way in only that plain form is understood.
Left out: DoRA and other variants, adapters of embeddings, running statistics (BatchNorm's) beside the triplets.
"""

import json
import re
import reprlib
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hub.adapters import adapter_state, bare, load_adapter_state
from hub.checkpoints import check_weight, read_json, read_named_tensors, write_atomically, write_tensors
from salora import SaLoRALinear, finished_layers, is_linear, salora_layers, why_not

CONFIG, SAFETENSORS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor's name: what PEFT calls the model that it wraps
IN_ADAPTED = (  # PEFT's modules in an adapted layer
    "base_layer", "lora_dropout", "lora_dropout.default", "lora_A", "lora_A.default", "lora_B", "lora_B.default",
    "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
)  # fmt: skip
IN_SAVED = ("original_module", "modules_to_save", "modules_to_save.default")  # and around one that is saved


# Out


def export_peft(model, folder, rename=str, pad=False, base_model=None, task_type=None):
    """Write the adapter as PEFT's LoRA: adapter_config.json and adapter_model.safetensors, .bin without that package.

    rename:     our name of a module -> its name in the model that PEFT will wrap (`hub_name` of hub/roberta.py)
    pad:        False: rank_pattern and alpha_pattern tell each matrix's rank;
                True: every matrix has the largest rank, filled up with zeros, for engines that know no patterns
    base_model: folder or name of the model underneath, and
    task_type:  what PEFT calls its task, "SEQ_CLS" for one; AutoPeftModelFor... needs both
    Weights trained beside the triplets, a classifier head, go along as modules_to_save.
    Raises ValueError, before anything is written, where the adapter is empty, unfinished, or cannot be told in PEFT's
    terms: a layer or a trained weight under two names, a trained weight outside of all modules or inside an adapted
    layer, a head whose name PEFT would find in other modules too.
    """
    model = bare(model)
    layers = exportable_layers(model)
    names = {name: rename(name) for name in layers}
    if len(set(names.values())) < len(names):
        raise ValueError(f"rename gives two layers one name: {', '.join(names.values())}")
    heads, saved = trained_heads(model, rename, names.values())

    largest, alpha = max(layer.r0 for layer in layers.values()), next(iter(layers.values())).alpha
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        A, B = open_triplets(layer)  # (r, k), (d, r)
        if pad:
            B = B * (layer.scale * largest / alpha)  # one alpha for all: another scale goes into B
            A, B = F.pad(A, (0, 0, 0, largest - len(A))), F.pad(B, (0, largest - len(A)))
        else:
            ranks[names[name]], alphas[names[name]] = len(A), layer.scale * len(A)  # PEFT's scale is alpha_m / r_m
        tensors[f"{names[name]}.lora_A.weight"] = A
        tensors[f"{names[name]}.lora_B.weight"] = B
    tensors |= saved

    targets = list(names.values())
    if any(name.endswith("." + target) for name in module_names(model, rename) for target in targets):
        # PEFT takes a name for the end of others as well, so it gets patterns for whole names
        ranks, alphas = ({"^" + re.escape(name): value for name, value in table.items()} for table in (ranks, alphas))
        targets = "|".join(map(re.escape, targets))
    config = {
        "peft_type": "LORA", "task_type": task_type, "inference_mode": True,
        "base_model_name_or_path": None if base_model is None else str(base_model),
        "r": largest, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas,
        "modules_to_save": heads or None,
    }  # fmt: skip
    write_adapter(Path(folder), config, tensors)


def exportable_layers(model):
    """{name: SaLoRALinear} of the layers with an open triplet. Raises ValueError where the adapter is not ready."""
    layers = finished_layers(model)
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, SaLoRALinear)]
    if len(names) > len(layers):
        raise ValueError(f"PEFT's files hold one name per layer, but two of these are one layer: {', '.join(names)}")
    if any("_orig_mod" in name.split(".") for name, _ in model.named_modules()):
        raise ValueError("a part of the model is compiled, which changes names: export before torch.compile")
    if "" in layers:
        raise ValueError("the model is itself an adapted layer and has no name there: put it into a module")
    layers = {name: layer for name, layer in layers.items() if layer.gate.settled().any()}
    if not layers:
        raise ValueError("no triplet is open: the adapter is empty, and PEFT has no such thing")
    return layers


def open_triplets(layer):
    """(A (r, k), B (d, r)) of the r triplets whose gate is open, with the gates folded into B."""
    gates = layer.gate.settled()
    kept = gates.nonzero().flatten()
    B = layer.B.detach() * gates.to(layer.B.dtype)  # (d, r)
    return layer.A.detach()[kept], B[:, kept]


def trained_heads(model, rename, targets):
    """(modules_to_save, {parameter: tensor}) of what trains beside the triplets; names are those for PEFT.

    A module is saved whole, frozen parameters too, because PEFT looks for all of them.
    """
    layers = salora_layers(model)
    weights = list(adapter_state(model)["others"])
    trained = {name.rpartition(".")[0]: name for name in weights}  # {module: a parameter of it}
    for module, name in trained.items():
        if not module:
            raise ValueError(f"{name} trains, but PEFT saves modules and it has none: freeze it, or put it into one")
        if module in layers:
            raise ValueError(f"{name} trains beside an adapter, which plain LoRA has no place for: freeze it")
    names_of = defaultdict(list)  # {id of a parameter: its names}
    for name, p in model.named_parameters(remove_duplicate=False):
        names_of[id(p)].append(name)
    for name in weights:
        tied = names_of[id(model.get_parameter(name))]
        if len(tied) > 1:
            both = " and ".join(tied)
            raise ValueError(f"{both} are one weight, which trains, and PEFT would make two of it: freeze it")
    saved, others = {}, [f"{rename(name)}.weight" for name in layers]
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module in trained:
            saved[f"{rename(module)}.{kind}"] = parameter.detach().clone()
        elif module and not name.startswith(tuple(f"{layer}." for layer in layers)):
            others.append(f"{rename(module)}.{kind}")

    closed = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.ModuleDict)]
    closed = closed if rename is str else []  # else these are not the names of the model that PEFT will wrap
    heads = list(dict.fromkeys(outermost(name.rpartition(".")[0], others, closed) for name in saved))
    check_heads(heads, targets, module_names(model, rename))
    return heads, saved


def module_names(model, rename):
    """The names for PEFT of all modules; with a `rename`, of those with parameters and of what is around them."""
    inside = tuple(f"{name}." for name in salora_layers(model))
    names = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name.startswith(inside):
            continue
        if rename is str or list(module.parameters(recurse=False)):
            parts = rename(name).split(".")
            names |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return names


def check_heads(heads, targets, modules):
    """Raises ValueError where PEFT would take another module for one of the heads that it is to save.

    It takes the name of a head for the end of names, without a dot, and its own modules, inside of the adapted layers
    `targets`, have names as well. modules: what `module_names` returns
    """
    names = modules | {f"{target}.{part}" for target in targets for part in IN_ADAPTED}
    names |= {f"{head}.{part}" for head in heads for part in IN_SAVED}
    for head in heads:
        taken = [name for name in names if name.endswith(head) and name != head]
        anything = re.escape(head).replace(r"\.", ".")  # it runs the name as a regular expression, too, against targets
        taken += [target for target in targets if re.match(rf"(.*\.)?{anything}(\..*)?$", target)]
        taken += modules & {f"{head}.{part}" for part in IN_SAVED}  # which it would mistake for its own
        if taken:
            other = f"PEFT would take {min(taken)} for it or for a part of it, by its name"
            raise ValueError(f"{head} trains, and {other}: freeze {head}, or rename one of them")


def outermost(module, others, closed):
    """The largest module around this one that holds none of the other parameters, and is none of `closed`.

    PEFT itself saves a module called classifier, so that classifier.dense and classifier.out_proj must not be named.
    closed: the lists and dicts of modules, which PEFT cannot save whole
    """
    parent = module.rpartition(".")[0]
    while parent and parent not in closed and not any(name.startswith(parent + ".") for name in others):
        module, parent = parent, parent.rpartition(".")[0]
    return module


def write_adapter(folder, config, tensors):
    """The two files of a folder, the config last, so that a folder with a config is whole."""
    text = json.dumps(config, indent=1, allow_nan=False)
    tensors = {PREFIX + name: value.cpu().contiguous() for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder, SAFETENSORS, BIN)
    write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def linears(model):
    """{name: module} of all linear layers; of an adapted one, what is underneath."""
    inside = {id(layer.base) for layer in salora_layers(model).values()}
    outside = {name: m for name, m in model.named_modules() if id(m) not in inside}
    bare = {name: m.base if isinstance(m, SaLoRALinear) else m for name, m in outside.items()}
    return {name: m for name, m in bare.items() if is_linear(m)}


# In


def import_peft(model, folder, rename=str):
    """The way back: give a model the LoRA adapter of a folder that PEFT or `export_peft` wrote. Returns the model.

    Raises FileNotFoundError for a missing file and ValueError for a variant whose update is not (alpha / r) B A, for
    settings that are not understood, and for weights that do not fit the model, which then stays as it was.
    """
    folder = Path(folder)
    config = read_lora_config(folder / CONFIG)
    path = folder / (SAFETENSORS if (folder / SAFETENSORS).exists() else BIN)
    tensors = {name.removeprefix(PREFIX): value for name, value in read_named_tensors(path).items()}
    layers = {}
    for name, linear in linears(bare(model)).items():
        hub = rename(name)
        A, B = (tensors.pop(f"{hub}.lora_{side}.weight", None) for side in "AB")
        if A is None and B is None:
            continue
        check_triplets(A, B, linear, f"{hub} in {path}")
        r = len(A)
        expected = look_up(config["rank_pattern"], hub, config["r"] or r)
        if r != expected:
            raise ValueError(f"{hub} in {path} has rank {r}, but {CONFIG} says {expected}: take both from one adapter")
        alpha = look_up(config["alpha_pattern"], hub, config["lora_alpha"])
        gates = {"log_theta": torch.zeros(r), "fixed": torch.ones(r)}
        layers[name] = {"r0": r, "alpha": alpha, "A": A, "B": B, **gates}
    others = take_heads(bare(model), tensors, rename, path)
    if tensors:
        raise ValueError(f"the model has no place for {', '.join(sorted(tensors)[:4])} of {folder}")
    if not layers:
        raise ValueError(f"{path} holds no lora_A and lora_B of this model's linear layers")
    return load_adapter_state(model, {"format": "salora-1", "layers": layers, "others": others})


def check_triplets(A, B, linear, where):
    """Raises ValueError unless A (r, k) and B (d, r) make an update of the linear's weight (d, k)."""
    if A is None or B is None:
        raise ValueError(f"{where} has only one of lora_A and lora_B: the file is not whole")
    for side, value in (("lora_A", A), ("lora_B", B)):
        check_weight(value, f"{side} of {where}")
    d, k = linear.out_features, linear.in_features
    r = A.shape[0] if A.dim() else 0
    if r < 1 or A.shape != (r, k) or B.shape != (d, r):
        shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
        raise ValueError(f"{where} has {shapes}, but its weight is {(d, k)}: expected (r, {k}) and ({d}, r)")
    if problem := why_not(linear):
        raise ValueError(f"{where} cannot be loaded: {problem}")


def take_heads(model, tensors, rename, path):
    """{our name: tensor} of the model's other parameters that the file holds; takes them out of `tensors`."""
    inside = tuple(f"{name}." for name in salora_layers(model))
    heads = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if not module or name.startswith(inside) or f"{rename(module)}.{kind}" not in tensors:
            continue
        heads[name] = value = tensors.pop(f"{rename(module)}.{kind}")
        check_weight(value, f"{name} in {path}")
        if value.shape != parameter.shape:
            found, expected = tuple(value.shape), tuple(parameter.shape)
            raise ValueError(f"{name} in {path} has shape {found}, but the model's is {expected}")
    return heads


# What adapter_config.json may say. These tell how the adapter was made or which modules have one, as the tensors do:
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config",
)  # fmt: skip
CHECKED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")  # by read_lora_config
PLAIN = {  # and these are plain LoRA with some values only. The other ways to begin change the weights underneath
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
}


def read_lora_config(path):
    """adapter_config.json, for plain LoRA: a dict with r (None if absent), lora_alpha and both patterns.

    The patterns become {(name, whole): value}, for `look_up`. Raises ValueError for what is set and not understood.
    """
    config = read_json(path)
    odd = [] if config.get("peft_type") else ["peft_type is None"]
    for key, value in config.items():
        unset = not value  # null, false, 0 or empty
        if not unset and key not in (*WITHOUT_EFFECT, *CHECKED) and value not in PLAIN.get(key, ()):
            odd.append(f"{key} is {reprlib.repr(value)}")
    if odd:
        raise ValueError(f"{path.parent} holds no plain LoRA adapter: {', '.join(odd)}")

    found = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    if found["r"] is not None:
        check_rank(found["r"], f"{path} has r")
    check_alpha(found["lora_alpha"], f"{path} has lora_alpha")
    for key, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
        table = config.get(key) or {}
        if not isinstance(table, dict):
            raise ValueError(f"{path} has {key} {reprlib.repr(table)}, expected a number for every name")
        for name, value in table.items():
            check(value, f"{path} has in {key} for {reprlib.repr(name)}")
        found[key] = {literal_name(name, f"{key} of {path}"): value for name, value in table.items()}
    return found


def check_rank(value, what):
    if type(value) is not int or value < 1:
        raise ValueError(f"{what} {reprlib.repr(value)}, expected a whole number above 0")


def check_alpha(value, what):
    if type(value) not in (int, float) or not 0 < value <= torch.finfo(torch.float32).max:
        raise ValueError(f"{what} {reprlib.repr(value)}, expected a number above 0")


def literal_name(pattern, where):
    """(the name that a pattern of PEFT stands for, whether it is a whole name rather than the end of one).

    PEFT runs patterns as regular expressions. One from a file may take forever, so none is run here: understood are a
    plain name, layer.0.query, and with "^" in front a whole one, also escaped as `export_peft` writes it.
    """
    text = pattern.removeprefix("^")
    name = re.sub(r"\\(\W)", r"\1", text)  # undoes re.escape
    if not name or (text != re.escape(name) and not re.fullmatch(r"[\w.-]+", text)):
        found = reprlib.repr(pattern)
        raise ValueError(f"the {where} has the regular expression {found}; only names of modules are understood")
    return name, pattern.startswith("^")


def look_up(table, module, default):
    """The value of the first entry that names a module, whole or by the end of its name."""
    for (name, whole), value in table.items():
        if module == name or (not whole and module.endswith("." + name)):
            return value
    return default
