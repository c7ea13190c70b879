"""Checkpoint folders of the RoBERTa and BERT family: config.json, and the names that published tensors have.

`load_pretrained` reads a folder into an encoder, with a head around it if one is asked for; `save_pretrained` writes
one that transformers opens. How files are read safely stands in hub/checkpoints.py. Left out: other architectures.
"""

import json
import re
import reprlib
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from hub.adapters import bare, plain_name
from hub.checkpoints import check_tensors, check_weight, read_json, read_tensors, write_tensors
from tiny_transformer import MaskedLM, SequenceClassifier, TinyTransformer, TransformerConfig

ENCODER_NAMES = {  # ours -> the published ones
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
HEAD_NAMES = {
    "roberta": {
        "classifier.dense": "classifier.dense",
        "classifier.out_proj": "classifier.out_proj",
        "lm_head.dense": "lm_head.dense",
        "lm_head.norm": "lm_head.layer_norm",
        "lm_head": "lm_head",
    },
    "bert": {
        "classifier.dense": "bert.pooler.dense",
        "classifier.out_proj": "classifier",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
        "lm_head": "cls.predictions",
    },
}


def hub_name(name, model_type="roberta"):
    """The published name of one of our modules: encoder.layers.3.up -> roberta.encoder.layer.3.intermediate.dense.

    Raises ValueError for a module that published checkpoints do not have.
    """
    if name in HEAD_NAMES[model_type]:
        return HEAD_NAMES[model_type][name]
    *front, module = name.removeprefix("encoder.").split(".")
    if module not in ENCODER_NAMES:
        raise ValueError(f"module {name} has no published name; if it is part of an adapter, merge it first")
    return ".".join([model_type, *(["encoder", "layer", front[1]] if front else []), ENCODER_NAMES[module]])


def hub_parameters(model, config):
    """{published name: parameter} of an encoder, or of one with a head."""
    split = ((*name.rsplit(".", 1), parameter) for name, parameter in model.named_parameters())
    return {f"{hub_name(module, config.model_type)}.{kind}": parameter for module, kind, parameter in split}


# What config.json may hold. Sizes have no default; a rate is a probability; anything else is a number.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "max_position_embeddings", "type_vocab_size")  # fmt: skip
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
LARGEST = 10**9  # with two sides of this length the bytes of a matrix still fit int64, so shapes can be compared
SUPPORTED = {
    "model_type": ("bert", "roberta", "xlm-roberta", "camembert"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
}


def read_config(folder):
    """The TransformerConfig in a folder's config.json, every number checked.

    Raises FileNotFoundError without such a file and ValueError for a foreign architecture or an impossible number.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no config.json in {folder}; expected the folder of a RoBERTa or BERT checkpoint")
    raw = read_json(path)
    for key, allowed in SUPPORTED.items():
        if raw.get(key, allowed[0]) not in allowed:
            found, expected = reprlib.repr(raw[key]), ", ".join(map(str, allowed))
            raise ValueError(f"{path} has {key} {found}, expected one of {expected}")

    bert = raw.get("model_type", "bert") == "bert"
    absent = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0 if bert else 1}  # what absence means
    raw = {**absent, **raw}
    values = {"model_type": "bert" if bert else "roberta"}
    for field in fields(TransformerConfig):
        if field.name in values:
            continue
        default = None if field.name in SIZES else field.default
        least, most = int(field.name in SIZES), 1 if field.name in RATES else LARGEST
        value = raw.get(field.name, default)
        if value is None and field.default is None:
            continue
        kind = float if field.name in RATES else field.type
        if type(value) not in (int, kind) or not least <= value <= most:
            expected = f"{kind.__name__} of at least {least} and at most {most}"
            raise ValueError(f"{path} has {field.name} {reprlib.repr(value)}, expected {expected}")
        values[field.name] = value
    if bert:  # BERT counts positions from 0: pad + 1 unused rows come in front
        values["max_position_embeddings"] += values["pad_token_id"] + 1
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


POSITIONS = "embeddings.position_embeddings.weight"
SECOND_NAMES = {  # a published MaskedLM may hold its word scores a second time, as a decoder
    "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
EXPECTED_LEFTOVERS = ("lm_head.", "cls.", "pooler.", "embeddings.position_ids")  # of pre-training: not worth a word


def load_pretrained(folder, head=None, **changes):
    """Read config.json and the weights of a RoBERTa- or BERT-family model.

    head: None, or what to build around the encoder and fill as well: MaskedLM, partial(SequenceClassifier, ...).
    changes: fields of TransformerConfig that should differ from the file, such as hidden_dropout_prob=0.0. Where that
    one differs, it counts for a classifier's head as well.
    Returns (encoder or head(encoder), config), in float32 and eval mode. Prints the names of tensors that were not
    used, except for the heads of pre-training, which most tasks leave behind.
    Raises FileNotFoundError for a missing file and ValueError for a foreign architecture or a tensor that is missing,
    has another shape than config.json says, or does not hold finite floating-point numbers.
    """
    folder = Path(folder)
    config = read_config(folder)
    if changes.get("hidden_dropout_prob", config.hidden_dropout_prob) != config.hidden_dropout_prob:
        changes = {"classifier_dropout": None, **changes}
    config = replace(config, **changes)
    stored = {}  # {name: (tensor, file)}
    for name, found in read_tensors(folder).items():
        if short_name(name) in stored:
            raise ValueError(f"{name} in {found[1]} is there a second time, with something else in front of its name")
        stored[short_name(name)] = found
    depth = len({name.split(".")[2] for name in stored if name.startswith("encoder.layer.")})
    if depth != config.num_hidden_layers:  # counted before any layer is built: no shape tells how many there are
        said = f"{folder}/config.json has num_hidden_layers {config.num_hidden_layers}"
        raise ValueError(f"{said}, but the weights have {depth} layers: take both from one checkpoint")
    with torch.device("meta"):  # shapes without memory, so that a wrong config.json is refused before it costs any
        model = TinyTransformer(config)
        model = head(model) if head else model
    if isinstance(model, MaskedLM):
        drop_second_names(stored)
    shapes = {short_name(name): tuple(p.shape) for name, p in hub_parameters(model, config).items()}
    if config.model_type == "bert":  # whose files have no rows for the positions of padding
        shapes[POSITIONS] = (config.max_length, config.hidden_size)
    check_tensors(stored, shapes, folder)

    model.to_empty(device="cpu").eval()
    for name, parameter in hub_parameters(model, config).items():
        tensor, _ = stored[short_name(name)]
        if short_name(name) == POSITIONS and config.model_type == "bert":
            tensor = F.pad(tensor, (0, 0, config.pad_token_id + 1, 0))
        parameter.data.copy_(tensor)
    unused = [name for name in sorted(stored) if name not in shapes and not name.startswith(EXPECTED_LEFTOVERS)]
    if unused:
        print(f"{folder}: {len(unused)} tensors not used: {', '.join(unused)}")
    return model, config


def short_name(name):
    """A published name without the model's, and with today's words for the gamma and beta of 2018.

    In front may stand, too, what torch.compile and DistributedDataParallel add to the names of a state dict.
    """
    name = re.sub(r"^(module\.)*((roberta|bert)\.)?", "", plain_name(name))
    return re.sub(r"beta$", "bias", re.sub(r"gamma$", "weight", name))


def drop_second_names(stored):
    """A MaskedLM's scores under one name. Raises ValueError for a decoder of its own, which ours does not have."""
    for second, first in SECOND_NAMES.items():
        if second not in stored:
            continue
        decoder, path = stored.pop(second)
        tied, _ = stored.setdefault(first, (decoder, path))
        for value in (decoder, tied):
            check_weight(value, f"{second} or {first} in {path}")
        if decoder.shape != tied.shape or not torch.equal(decoder.float(), tied.float()):
            raise ValueError(f"{second} in {path} differs from {first}, but MaskedLM has one tensor for both")


ARCHITECTURES = {TinyTransformer: "Model", SequenceClassifier: "ForSequenceClassification", MaskedLM: "ForMaskedLM"}
DECODERS = {"RobertaForMaskedLM": "RobertaForCausalLM", "BertForMaskedLM": "BertLMHeadModel"}


def save_pretrained(model, folder, labels=(), safetensors=False):
    """Write an encoder, a SequenceClassifier or a MaskedLM as a checkpoint folder, for `load_pretrained` and others.

    labels: what a classifier's classes are called, in the order of their indices; by default LABEL_0, LABEL_1 ...
    safetensors: whether to write model.safetensors, where that package is installed, rather than pytorch_model.bin
    Raises ValueError for another kind of model, and for adapters that are not merged.
    """
    model = bare(model)
    kind = next((kind for kind in ARCHITECTURES if isinstance(model, kind)), None)
    if kind is None:
        raise ValueError(f"expected an encoder, a SequenceClassifier or a MaskedLM, got {type(model).__name__}")
    config = (model if kind is TinyTransformer else model.encoder).config
    tensors = {name: p.detach().cpu().contiguous() for name, p in hub_parameters(model, config).items()}
    family = {"bert": "Bert", "roberta": "Roberta"}[config.model_type]
    name = family + ARCHITECTURES[kind]
    name = DECODERS.get(name, name) if config.is_decoder else name
    raw = {"architectures": [name], "hidden_act": "gelu", **asdict(config)}
    if config.model_type == "bert":
        raw["max_position_embeddings"] = config.max_length
        tensors["bert." + POSITIONS] = tensors["bert." + POSITIONS][config.pad_token_id + 1 :].clone()
    if kind is SequenceClassifier:
        raw |= label_names(labels or [f"LABEL_{i}" for i in range(model.num_labels)])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder, "model.safetensors", "pytorch_model.bin", prefer=safetensors)
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def label_names(labels):
    """What a config.json says of the names of classes: {"id2label": {index: name}, "label2id": {name: index}}."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
