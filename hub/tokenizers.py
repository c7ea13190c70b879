"""The tokenizers of real checkpoints.

A folder means what its settings say. Where transformers is installed, its AutoTokenizer reads the folder, and the
`tokenizers.Tokenizer` inside is used. Where it is not, hub/plain_tokenizers.py builds those of BERT and RoBERTa, with
the same ids. Left out: tokenizers that exist in Python only.
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

from hub import plain_tokenizers
from hub.checkpoints import check_regular, read_json, read_json_if_there

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "special_tokens_map.json",
         "added_tokens.json")  # fmt: skip
CLASSES = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer",
           "camembert": "CamembertTokenizer"}  # by model_type, where no tokenizer_class is named  # fmt: skip
VOCABULARY = {"BertTokenizer": ["vocab.txt"], "RobertaTokenizer": ["vocab.json", "merges.txt"]}  # or a tokenizer.json
MODELS = {"BertTokenizer": "WordPiece", "RobertaTokenizer": "BPE"}  # in a tokenizer.json


class RealTokenizer:
    """A `tokenizers.Tokenizer` with its checkpoint's special tokens already in its template.

    size: the number of rows that an embedding needs: the largest token id plus 1, since ids may have gaps
    side: where rows that are too long are cut, "left" or "right"
    """

    def __init__(self, tokenizer, side, path):
        self.tokenizer, self.side, self.path = tokenizer, side, path
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode(self, rows, max_length):
        """rows (sentence, sentence or None, label) -> (token ids, type ids, label) of at most max_length tokens.

        Raises ValueError where the tokenizer fails.
        """
        texts = [row[0] if row[1] is None else (row[0], row[1]) for row in rows]
        with errors_of(self.path, "fails to encode"):
            self.tokenizer.enable_truncation(max_length, strategy="longest_first", direction=self.side)
            encodings = self.tokenizer.encode_batch(texts)
        return [(e.ids, e.type_ids, row[2]) for e, row in zip(encodings, rows)]


@contextmanager
def errors_of(path, what):
    """Whatever the packages raise becomes a ValueError of one line that names the file."""
    try:
        yield
    except BaseException as error:  # a panic in its Rust code is not an Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path} {what}: {' '.join(str(error).split())}") from None
        raise


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder, as a RealTokenizer: its tokenizer.json, or vocab.json and merges.txt
    (byte-level BPE, RoBERTa), or vocab.txt (WordPiece, BERT), with the settings beside them. None if there is no such
    file.

    Raises FileNotFoundError without the package tokenizers, and ValueError for files that are damaged, that contradict
    each other, or that ask for what is not understood.
    """
    folder = Path(folder)
    found = [name for name in ("tokenizer.json", "vocab.json", "vocab.txt") if (folder / name).exists()]
    if not found:
        return None
    for name in FILES:
        if (folder / name).exists():
            check_regular(folder / name)
    path = folder / found[0]
    try:
        import tokenizers
    except ImportError:
        raise FileNotFoundError(f"{path} needs a package: pip install tokenizers") from None

    model_type, kind = class_of(folder, found)
    whole = {}  # what tokenizer.json holds
    if "tokenizer.json" in found:
        with errors_of(path, "cannot be read"):
            model = type(tokenizers.Tokenizer.from_file(str(path)).model).__name__
        if MODELS.get(kind, model) != model:
            raise ValueError(f"{path} holds a {model} model, but {kind} is made of {MODELS[kind]}")
        whole = read_json(path)
    else:
        absent = [name for name in VOCABULARY.get(kind, ["tokenizer.json"]) if not (folder / name).exists()]
        if absent:
            raise ValueError(f"{folder} has {', '.join(found)}, but no {', '.join(absent)}, which its {kind} needs")
    with errors_of(path, "cannot be read"):
        tokenizer = RealTokenizer(*read(folder, model_type, kind, whole), folder)
    check_tokens(tokenizer.tokenizer, folder, kind, whole)
    return tokenizer


def class_of(folder, found):
    """(model_type, the name of transformers' class for the tokenizer in a folder, without "Fast" at its end)."""
    config, settings = (read_json_if_there(folder / name) for name in ("config.json", "tokenizer_config.json"))
    model_type = config.get("model_type") or ("roberta" if "vocab.json" in found else "bert")
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class") or CLASSES.get(str(model_type))
    return str(model_type), str(kind).removesuffix("Fast")


def read(folder, model_type, kind, whole):
    """(a `tokenizers.Tokenizer`, the side where it cuts) of a folder."""
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError:
        return plain_tokenizers.build(folder, kind, whole)
    config = AutoConfig.for_model(model_type, tokenizer_class=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"its {type(tokenizer).__name__} exists in Python only")
    return tokenizer.backend_tokenizer, tokenizer.truncation_side


def check_tokens(tokenizer, folder, kind, whole):
    """Raises ValueError unless added tokens have the ids that the files give them, and every row begins with a token
    that the files know: the classifier reads the first."""
    settings = read_json_if_there(folder / "tokenizer_config.json")
    with errors_of(folder, "has added tokens of another form than a tokenizer's"):
        stated = [(token["content"], token["id"]) for token in whole.get("added_tokens") or []]
        stated += [(token["content"], int(i)) for i, token in (settings.get("added_tokens_decoder") or {}).items()]
        stated += list(read_json_if_there(folder / "added_tokens.json").items())
        ids = [tokenizer.token_to_id(content) for content, _ in stated]
    for (content, expected), i in zip(stated, ids):
        if i != expected:
            raise ValueError(f"{folder} gives {content!r} the id {expected}, but its {kind} gives it {i}")

    known = {*tokenizer.get_vocab(with_added_tokens=False).values(), *(i for _, i in stated)}
    for pair in (None, ""):
        with errors_of(folder, "has a tokenizer that fails to encode"):
            around = tokenizer.encode("", pair)
        unknown = [token for i, token in zip(around.ids, around.tokens) if i not in known]
        if unknown:
            raise ValueError(f"the vocabulary in {folder} has no {unknown[0]}, which its {kind} puts around a row")
        if not around.ids:
            raise ValueError(f"the {kind} in {folder} puts no token in front of a row: the classifier reads that one")


def copy_tokenizer(source, target):
    """Copy those of a tokenizer's files that are in the folder `source` to the folder `target`. Returns their names.

    A folder of weights without them is opened elsewhere without an error, and with a wrong vocabulary. If the other
    folder's config.json says less of the tokenizer's class than this one's, its tokenizer_config.json says it.
    """
    source, target = Path(source), Path(target)
    names = [name for name in FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    _, kind = class_of(source, names)
    if names and class_of(target, names)[1] != kind:
        path = target / "tokenizer_config.json"
        settings = {**read_json_if_there(path), "tokenizer_class": kind}
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return names
