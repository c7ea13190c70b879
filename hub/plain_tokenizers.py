"""The tokenizers of BERT and RoBERTa, built from their files without transformers, and equal to what it builds.

A setting that is not understood is refused by key and value. Left out: all other classes, and special tokens under
other names.
"""

import reprlib

from hub.checkpoints import read_json_if_there

SPECIAL = {  # in the order in which they are added to a vocabulary that lacks them
    "BertTokenizer": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
                      "mask_token": "[MASK]"},
    "RobertaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
                         "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
}  # fmt: skip
DEFAULTS = {  # the settings that change ids, and what their absence means
    "BertTokenizer": {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True},
    "RobertaTokenizer": {"add_prefix_space": False},
}
WITHOUT_EFFECT = (  # on ids: names, lengths, padding, offsets, decoding
    "tokenizer_class", "name_or_path", "special_tokens_map_file", "tokenizer_file", "processor_class", "backend",
    "is_local", "local_files_only", "model_input_names", "model_max_length", "max_len", "max_length", "stride",
    "truncation_strategy", "padding_side", "pad_to_multiple_of", "pad_token_type_id", "trim_offsets", "errors",
    "clean_up_tokenization_spaces", "chat_template",
)  # fmt: skip
ELSEWHERE = ("added_tokens_decoder", "truncation_side")  # understood where they are used


def build(folder, kind, whole):
    """(a `tokenizers.Tokenizer`, the side where it cuts) of a folder.

    kind: a key of SPECIAL. whole: what is in tokenizer.json; empty where the vocabulary has files of its own.
    Raises ValueError for another kind and for settings that are not understood.
    """
    from tokenizers import AddedToken

    if kind not in SPECIAL:
        raise ValueError(f"its class {kind} is only read by a package: pip install transformers")
    settings = understood_settings(folder, kind)
    values = {key: settings.get(key, default) for key, default in DEFAULTS[kind].items()}
    tokenizer = BUILDERS[kind](folder, whole.get("model"), **values)
    tokenizer.add_tokens([AddedToken(**fields) for fields in tokens_to_add(folder, kind, settings, whole)])
    tokenizer.post_processor = template(kind, tokenizer)
    cut = whole.get("truncation") or {}
    return tokenizer, (settings.get("truncation_side") or cut.get("direction") or "right").lower()


def bert(folder, model, do_lower_case, strip_accents, tokenize_chinese_chars):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocab = model["vocab"] if model else models.WordPiece.read_file(str(folder / "vocab.txt"))
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=SPECIAL["BertTokenizer"]["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=tokenize_chinese_chars,
        strip_accents=strip_accents,
        lowercase=do_lower_case,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def roberta(folder, model, add_prefix_space):
    from tokenizers import Tokenizer, models, pre_tokenizers

    if model:
        vocab, merges = model["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    else:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return tokenizer


BUILDERS = {"BertTokenizer": bert, "RobertaTokenizer": roberta}


def template(kind, tokenizer):
    """[CLS] first [SEP] second [SEP] with the types 0 and 1, or <s> first </s> </s> second </s> with type 0."""
    from tokenizers import processors

    cls, sep = ((token, tokenizer.token_to_id(token)) for token in map(SPECIAL[kind].get, ("cls_token", "sep_token")))
    if kind == "RobertaTokenizer":
        return processors.RobertaProcessing(sep, cls)
    single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=[cls, sep])


def understood_settings(folder, kind):
    """tokenizer_config.json, over it special_tokens_map.json where the former does not list tokens itself.

    Raises ValueError for what is set and not understood.
    """
    file = "tokenizer_config.json"
    settings = read_json_if_there(folder / file)
    if "added_tokens_decoder" not in settings:
        settings |= read_json_if_there(folder / "special_tokens_map.json")
    for key, value in settings.items():
        if key in SPECIAL[kind]:
            understood = (value.get("content") if isinstance(value, dict) else value) == SPECIAL[kind][key]
        elif key in DEFAULTS[kind]:
            understood = type(value) is bool or value is DEFAULTS[kind][key]
        elif key == "do_basic_tokenize":
            understood = value is True
        else:
            understood = not value or key in (*WITHOUT_EFFECT, *ELSEWHERE)  # unset: null, false, 0 or empty
        if not understood:
            said = f"{file} has {key} {reprlib.repr(value)}"
            raise ValueError(f"{said}, which is only read by a package: pip install transformers")
    return settings


def tokens_to_add(folder, kind, settings, whole):
    """Words that the files add to the vocabulary, by id, then special tokens that are not among them: dicts with the
    arguments of `tokenizers.AddedToken`."""
    named = [content for key, content in SPECIAL[kind].items() if settings.get(key)]
    if "added_tokens_decoder" in settings:
        by_id = {int(i): fields for i, fields in settings["added_tokens_decoder"].items()}
    else:
        legacy = read_json_if_there(folder / "added_tokens.json")
        by_id = {i: {"content": content, "normalized": content not in named} for content, i in legacy.items()}
        by_id |= {token["id"]: token for token in whole.get("added_tokens") or []}
    tokens = [by_id[i] for i in sorted(by_id)]
    for key, content in SPECIAL[kind].items():
        if content not in [fields["content"] for fields in tokens]:
            fields = settings.get(key)
            tokens.append({**(fields if isinstance(fields, dict) else {}), "content": content, "special": True})
    return [{key: value for key, value in fields.items() if key not in ("id", "__type")} for fields in tokens]
