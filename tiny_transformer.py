"""A RoBERTa encoder in one file, small enough to train on a laptop and exact enough to hold real checkpoints.

Post-LN Transformer encoder: x = norm(x + f(x)) after attention and after the feed-forward net, exact GELU, learned
positions that start at pad + 1. BERT is the same network: its position table gets pad + 1 unused rows in front. With
`is_decoder` a token sees itself and earlier ones only. Two heads: `MaskedLM` for pre-training, of a decoder too, and
`SequenceClassifier` for tasks. Left out: caches, cross-attention, relative positions.
Names of parameters are ours; `hub_name` translates them to those of published checkpoints.
"""

import json
import re
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hub.checkpoints import check_tensors, check_weight, read_json, read_tensors


@dataclass
class TransformerConfig:
    """Sizes of an encoder, under the keys of a published config.json; the defaults are RoBERTa-base's."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514  # rows of the table; the first pad + 1 are never used
    type_vocab_size: int = 1
    pad_token_id: int = 1
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    is_decoder: bool = False  # a causal mask: no token sees a later one
    model_type: str = "roberta"  # or "bert": whose names and whose count of positions a checkpoint has

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.pad_token_id >= self.vocab_size or self.max_length < 1:
            raise ValueError(f"pad_token_id {self.pad_token_id} leaves no word or no position for a token")

    @property
    def max_length(self):
        """The longest input, in tokens."""
        return self.max_position_embeddings - self.pad_token_id - 1


class Block(nn.Module):
    """Self-attention and a feed-forward net, each with a residual and a LayerNorm after it."""

    def __init__(self, config):
        super().__init__()
        d, m, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, m), nn.Linear(m, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.heads, self.attention_dropout = config.num_attention_heads, config.attention_probs_dropout_prob

    def attention(self, x, mask):
        batch, seq, d = x.shape
        q, k, v = (f(x).view(batch, seq, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        p = self.attention_dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)  # (batch, heads, seq, d / heads)
        return self.out(h.transpose(1, 2).reshape(batch, seq, d))

    def forward(self, x, mask):
        """x (batch, seq, d), mask (batch, 1, 1 or seq, seq) True where a token may be looked at -> (batch, seq, d)."""
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class TinyTransformer(nn.Module):
    """Token ids (batch, seq) -> hidden states (batch, seq, d)."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.word = nn.Embedding(config.vocab_size, d, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, d, padding_idx=config.pad_token_id)
        self.token_type = nn.Embedding(config.type_vocab_size, d)
        self.norm = nn.LayerNorm(d, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.recompute = False  # activation checkpointing: time for memory
        init_weights(self, config)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """input_ids (batch, seq); attention_mask (batch, seq), 1 = look at it, by default all that is not padding;
        token_type_ids (batch, seq), by default 0. Returns (batch, seq, d)."""
        real = input_ids != self.config.pad_token_id
        if attention_mask is None:
            attention_mask = real
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = real.cumsum(1) * real + self.config.pad_token_id  # the first token stands at pad + 1
        x = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)  # (batch, seq, d)
        x = self.dropout(self.norm(x))
        mask = attention_mask.bool()[:, None, None, :]  # (batch, 1, 1, seq)
        if self.config.is_decoder:
            seq = input_ids.shape[1]
            mask = mask & mask.new_ones(seq, seq).tril()  # (batch, 1, seq, seq)
        for block in self.layers:
            again = self.recompute and self.training
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
        return x


class SequenceClassifier(nn.Module):
    """RoBERTa's head on the first token: dense, tanh, out_proj. One label means regression."""

    def __init__(self, encoder, num_labels):
        super().__init__()
        if encoder.config.is_decoder:
            raise ValueError("a classifier reads the first token, which sees no other in a decoder: take an encoder")
        d = encoder.config.hidden_size
        self.encoder, self.num_labels = encoder, num_labels
        self.classifier = nn.ModuleDict({"dense": nn.Linear(d, d), "out_proj": nn.Linear(d, num_labels)})
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob)
        init_weights(self.classifier, encoder.config)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """Token ids (batch, seq) -> logits, or for one label scores, (batch, num_labels)."""
        x = self.encoder(input_ids, attention_mask, token_type_ids)[:, 0]  # (batch, d)
        x = torch.tanh(self.classifier["dense"](self.dropout(x)))
        return self.classifier["out_proj"](self.dropout(x))


class MaskedLM(nn.Module):
    """Scores of every word at every place: dense, GELU, norm, then the transposed word embedding plus a bias."""

    def __init__(self, encoder):
        super().__init__()
        config = encoder.config
        self.encoder, self.lm_head = encoder, nn.Module()
        self.lm_head.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.lm_head.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self.lm_head, config)

    def forward(self, x):
        """Hidden states (..., d), all or only those of masked places -> logits (..., vocab)."""
        x = self.lm_head.norm(F.gelu(self.lm_head.dense(x)))
        return F.linear(x, self.encoder.word.weight, self.lm_head.bias)


def init_weights(model, config):
    """RoBERTa's start: weights normal with deviation `initializer_range`, biases and padding rows 0."""
    if next(model.parameters()).is_meta:
        return  # a model of shapes only; to draw nothing there takes torch most of a second
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight.data[module.padding_idx])


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
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
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
        if type(value) not in (int, field.type) or not least <= value <= most:
            expected = f"{field.type.__name__} of at least {least} and at most {most}"
            raise ValueError(f"{path} has {field.name} {reprlib.repr(value)}, expected {expected}")
        values[field.name] = value
    if bert:  # BERT counts positions from 0: pad + 1 unused rows come in front
        values["max_position_embeddings"] += values["pad_token_id"] + 1
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


POSITIONS = "embeddings.position_embeddings.weight"
SECOND_NAMES = {  # a published MaskedLM may hold its word scores once more, as a decoder
    "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
EXPECTED_LEFTOVERS = ("lm_head.", "cls.", "pooler.", "embeddings.position_ids")  # of pre-training: not worth a word


def load_pretrained(folder, head=None, **changes):
    """Read config.json and the weights of a RoBERTa- or BERT-family model.

    head: None, or what to build around the encoder and fill as well: MaskedLM, partial(SequenceClassifier, ...).
    changes: fields of TransformerConfig that shall differ from the file, such as hidden_dropout_prob=0.0.
    Returns (encoder or head(encoder), config), in float32 and eval mode. Prints which tensors it had no use for, except
    for the heads of pre-training, which most tasks leave behind.
    Raises FileNotFoundError for a missing file and ValueError for a foreign architecture or a tensor that is missing,
    has another shape than config.json says, or does not hold finite floating-point numbers.
    """
    folder = Path(folder)
    config = replace(read_config(folder), **changes)
    stored = {plain_name(name): found for name, found in read_tensors(folder).items()}  # {name: (tensor, file)}
    check_depth(stored, config, folder)
    with torch.device("meta"):  # shapes without memory, so that a wrong config.json is refused before it costs any
        model = TinyTransformer(config)
        model = head(model) if head else model
    if isinstance(model, MaskedLM):
        drop_second_names(stored)
    shapes = stored_shapes(model, config)
    check_tensors(stored, shapes, folder)

    model.to_empty(device="cpu").eval()
    for name, parameter in hub_parameters(model, config).items():
        tensor, _ = stored[plain_name(name)]
        if plain_name(name) == POSITIONS and config.model_type == "bert":
            tensor = F.pad(tensor, (0, 0, config.pad_token_id + 1, 0))
        parameter.data.copy_(tensor)
    unused = [name for name in sorted(stored) if name not in shapes and not name.startswith(EXPECTED_LEFTOVERS)]
    if unused:
        print(f"{folder}: {len(unused)} tensors not used: {', '.join(unused)}")
    return model, config


def plain_name(name):
    """A published name without the model's, and with today's words for the gamma and beta of 2018."""
    name = re.sub(r"^(roberta|bert)\.", "", name)
    return re.sub(r"beta$", "bias", re.sub(r"gamma$", "weight", name))


def check_depth(stored, config, folder):
    """Count the layers in the file before any is built: there is no shape that tells their number."""
    depth = len({name.split(".")[2] for name in stored if name.startswith("encoder.layer.")})
    if depth != config.num_hidden_layers:
        said = f"{folder}/config.json has num_hidden_layers {config.num_hidden_layers}"
        raise ValueError(f"{said}, but the weights have {depth} layers: take both from one checkpoint")


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


def stored_shapes(model, config):
    """{plain name: shape in a file} of all parameters. A file of BERT has no rows for the positions of padding."""
    shapes = {plain_name(name): tuple(p.shape) for name, p in hub_parameters(model, config).items()}
    if config.model_type == "bert":
        shapes[POSITIONS] = (config.max_length, config.hidden_size)
    return shapes


ARCHITECTURES = {TinyTransformer: "Model", SequenceClassifier: "ForSequenceClassification", MaskedLM: "ForMaskedLM"}
DECODERS = {"RobertaForMaskedLM": "RobertaForCausalLM", "BertForMaskedLM": "BertLMHeadModel"}


def save_pretrained(model, folder):
    """Write an encoder, a SequenceClassifier or a MaskedLM as a checkpoint folder, for `load_pretrained` and others.

    Raises ValueError for another kind of model, and for adapters that are not merged.
    """
    kind = next((kind for kind in ARCHITECTURES if isinstance(model, kind)), None)
    if kind is None:
        raise ValueError(f"expected an encoder, a SequenceClassifier or a MaskedLM, got {type(model).__name__}")
    config = (model if kind is TinyTransformer else model.encoder).config
    tensors = {name: p.detach().cpu() for name, p in hub_parameters(model, config).items()}
    family = {"bert": "Bert", "roberta": "Roberta"}[config.model_type]
    name = family + ARCHITECTURES[kind]
    name = DECODERS.get(name, name) if config.is_decoder else name
    raw = {"architectures": [name], "hidden_act": "gelu", **asdict(config)}
    if config.model_type == "bert":
        raw["max_position_embeddings"] = config.max_length
        tensors["bert." + POSITIONS] = tensors["bert." + POSITIONS][config.pad_token_id + 1 :].clone()
    if kind is SequenceClassifier:
        raw["id2label"] = {i: f"LABEL_{i}" for i in range(model.num_labels)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
