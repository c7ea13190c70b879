"""Adapters out to PEFT and back in: adapter_config.json and adapter_model.safetensors, or .bin."""

import json
import os
import re

import torch
import torch.nn.functional as F
from torch import nn

from salora import SaLoRALinear, adapter_state, load_adapter_state, salora_layers


def export_peft(model, folder, rename=str, pad=False):
    """Write the adapter as PEFT's LoRA: adapter_config.json and adapter_model.safetensors, .bin without that package.

    rename: our name of a module -> its name in the model that PEFT will wrap (tiny_transformer's `hub_name`)
    pad:    False: closed triplets are left out, and rank_pattern and alpha_pattern tell each matrix's rank;
            True: every matrix has the largest rank, filled up with zeros, for engines that know no patterns
    Gates are folded into B. Weights trained beside the triplets, a classifier head, go along as modules_to_save.
    Raises ValueError where there is nothing to export, and for a layer that the model uses under two names.
    """
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, SaLoRALinear)]
    if len(names) > len(salora_layers(model)):
        raise ValueError(f"PEFT's files hold one name a layer, but two of these are one layer: {', '.join(names)}")
    state, layers = adapter_state(model), {name: layer for name, layer in salora_layers(model).items() if layer.r}
    gates = {name: layer.gate.settled() for name, layer in layers.items()}
    layers = {name: layer for name, layer in layers.items() if pad or gates[name].any()}  # PEFT knows no rank 0
    if not layers:
        raise ValueError("no triplet is open: the adapter is empty, and PEFT has no such thing")
    r, alpha = max(layer.r0 for layer in layers.values()), next(iter(layers.values())).alpha
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        kept = gates[name].nonzero().flatten()
        A, B, n = layer.A.detach()[kept], (layer.B.detach() * gates[name].to(layer.B.dtype))[:, kept], rename(name)
        if pad:  # one rank and alpha for all, so a layer with another scale has it in B
            extra = r - len(kept)
            A, B = F.pad(A, (0, 0, 0, extra)), F.pad(B * layer.scale * r / alpha, (0, extra))
        else:  # PEFT's scale is alpha_m / r_m
            ranks[n], alphas[n] = len(kept), layer.scale * len(kept)
        tensors[f"base_model.model.{n}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{n}.lora_B.weight"] = B.cpu().contiguous()
    heads = {}
    for name, value in state["others"].items():
        module, kind = name.rsplit(".", 1)
        heads[rename(module)] = None  # a set in order
        tensors[f"base_model.model.{rename(module)}.{kind}"] = value.cpu().contiguous()
    targets = [rename(name) for name in layers]
    if any(rename(n).endswith("." + target) for n in _linears(model) for target in targets):  # PEFT matches suffixes
        ranks, alphas = ({"^" + re.escape(n): v for n, v in table.items()} for table in (ranks, alphas))
        targets = "|".join(map(re.escape, targets))  # as one text it is a pattern for the whole name
    config = {
        "peft_type": "LORA", "task_type": None, "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas,
        "modules_to_save": list(heads) or None, "inference_mode": True,
    }  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    try:
        import safetensors.torch

        safetensors.torch.save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    except ImportError:
        torch.save(tensors, os.path.join(folder, "adapter_model.bin"))
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)


def _linears(model):
    """Names of all linear layers, adapted or not."""
    inside = {id(layer.base) for layer in salora_layers(model).values()}
    modules = ((n, m) for n, m in model.named_modules() if id(m) not in inside)
    return [n for n, m in modules if isinstance(m, (nn.Linear, SaLoRALinear))]


def import_peft(model, folder, rename=str):
    """The way back: give a model the LoRA adapter of a folder that PEFT or `export_peft` wrote. Returns the model.

    Raises ValueError for a variant whose update is not (alpha / r) B A, and for weights without a place in the model.
    """
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        config = {"bias": "none", **json.load(file)}
    plain = dict(peft_type="LORA", bias="none", lora_bias=0, use_dora=0, use_rslora=0, fan_in_fan_out=0)
    odd = [f"{key} is {config.get(key)}" for key, value in plain.items() if (config.get(key) or 0) != value]
    if re.match("pissa|olora|loftq|corda|lora_ga", str(config.get("init_lora_weights"))):  # these change the base
        odd.append(f"init_lora_weights is {config['init_lora_weights']}")
    if odd:
        raise ValueError(f"{folder} holds no plain LoRA adapter: {', '.join(odd)}")
    path = os.path.join(folder, "adapter_model.safetensors")
    if os.path.isfile(path):
        import safetensors.torch

        tensors = safetensors.torch.load_file(path)
    else:
        tensors = torch.load(os.path.join(folder, "adapter_model.bin"), map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    layers, others = {}, {}
    for name in [n for n in _linears(model) if rename(n) + ".lora_A.weight" in tensors]:
        A, B = (tensors.pop(f"{rename(name)}.lora_{side}.weight") for side in "AB")
        hits = [v for key, v in config.get("alpha_pattern", {}).items() if re.match(rf"(.*\.)?({key})$", rename(name))]
        gates = {"log_theta": torch.zeros(len(A)), "fixed": torch.ones(len(A))}
        layers[name] = {"r0": len(A), "alpha": [*hits, config["lora_alpha"]][0], "A": A, "B": B, **gates}
    for name in [n for n, _ in model.named_parameters() if "." in n and ".base." not in n]:
        module, kind = name.rsplit(".", 1)
        if kind in ("weight", "bias") and f"{rename(module)}.{kind}" in tensors:
            others[name] = tensors.pop(f"{rename(module)}.{kind}")
    if tensors:
        raise ValueError(f"the model has no place for {', '.join(sorted(tensors)[:4])} of {folder}")
    return load_adapter_state(model, {"format": "salora-1", "layers": layers, "others": others})
