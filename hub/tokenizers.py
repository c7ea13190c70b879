"""The tokenizers of real checkpoints."""

import shutil
from contextlib import contextmanager
from pathlib import Path

from hub.checkpoints import check_regular, read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "special_tokens_map.json",
         "added_tokens.json")  # fmt: skip


class RealTokenizer:
    """A `tokenizers.Tokenizer` with its checkpoint's special tokens already in its template.

    size: the number of rows that an embedding needs: the largest token id plus 1, since ids may have gaps
    """

    def __init__(self, tokenizer, path):
        self.tokenizer, self.path = tokenizer, path
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1
        tokenizer.no_padding()

    def encode(self, rows, max_length):
        """rows (sentence, sentence or None, label) -> (token ids, type ids, label) of at most max_length tokens.

        Raises ValueError where the tokenizer fails, and for a row without any token.
        """
        texts = [row[0] if row[1] is None else (row[0], row[1]) for row in rows]
        with errors_of(self.path, "fails to encode"):
            self.tokenizer.enable_truncation(max_length, strategy="longest_first")
            encodings = self.tokenizer.encode_batch(texts)
        for text, encoding in zip(texts, encodings):
            largest = max(encoding.ids, default=None)
            if largest is None:
                raise ValueError(f"{self.path} turns {text!r} into no token at all: every row needs at least one")
            if largest >= self.size:
                raise ValueError(f"{self.path} gives the token id {largest}, but its vocabulary has {self.size}")
        return [(e.ids, e.type_ids, row[2]) for e, row in zip(encodings, rows)]


@contextmanager
def errors_of(path, what):
    """Whatever the package raises becomes a ValueError that names the file."""
    try:
        yield
    except BaseException as error:  # a panic in its Rust code is not an Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path} {what}: {error}") from None
        raise


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder: tokenizer.json, or vocab.json + merges.txt (byte-level BPE, RoBERTa), or
    vocab.txt (WordPiece, BERT). Returns None if there is none of them.

    Raises FileNotFoundError without the package tokenizers or without merges.txt, and ValueError for a damaged file.
    """
    folder = Path(folder)
    paths = [folder / name for name in ("tokenizer.json", "vocab.json", "vocab.txt")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    check_regular(path)
    try:
        import tokenizers
    except ImportError:
        raise FileNotFoundError(f"{path} needs a package: pip install tokenizers") from None
    if path.name == "vocab.json":
        return byte_level_bpe(path, folder / "merges.txt")
    if path.name == "vocab.txt":
        return word_pieces(path, folder / "tokenizer_config.json")
    with errors_of(path, "cannot be read"):
        return RealTokenizer(tokenizers.Tokenizer.from_file(str(path)), path)


def byte_level_bpe(vocab, merges):
    """RoBERTa's tokenizer: <s> first </s> </s> second </s>."""
    import tokenizers

    check_regular(merges)
    with errors_of(vocab, "cannot be read"):
        tokenizer = tokenizers.ByteLevelBPETokenizer(str(vocab), str(merges))._tokenizer
        start, stop = (("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>")))
        tokenizer.post_processor = tokenizers.processors.RobertaProcessing(stop, start, trim_offsets=True)
        return RealTokenizer(tokenizer, vocab)


def word_pieces(vocab, settings):
    """BERT's tokenizer: [CLS] first [SEP] second [SEP], in lower case unless the settings say do_lower_case false."""
    import tokenizers

    lower = read_json(settings).get("do_lower_case", True) if settings.exists() else True
    with errors_of(vocab, "cannot be read"):
        return RealTokenizer(tokenizers.BertWordPieceTokenizer(str(vocab), lowercase=lower)._tokenizer, vocab)


def copy_tokenizer(source, target):
    """Copy those of a tokenizer's files that are in the folder `source` to the folder `target`. Returns their names.

    A folder of weights without them is opened elsewhere without an error, and with a wrong vocabulary.
    """
    names = [name for name in FILES if (Path(source) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names
