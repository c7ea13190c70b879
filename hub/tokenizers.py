"""The tokenizers of real checkpoints."""

from pathlib import Path

from hub.checkpoints import read_json


class RealTokenizer:
    """A `tokenizers.Tokenizer` with its checkpoint's special tokens already in its template."""

    def __init__(self, tokenizer):
        self.tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()
        tokenizer.no_padding()

    def encode(self, rows, max_length):
        self.tokenizer.enable_truncation(max_length, strategy="longest_first")
        texts = [row[0] if row[1] is None else (row[0], row[1]) for row in rows]
        encodings = self.tokenizer.encode_batch(texts)
        return [(e.ids, e.type_ids, row[2]) for e, row in zip(encodings, rows)]


def load_tokenizer(folder):
    """The tokeniser of a checkpoint folder: tokenizer.json, or vocab.json + merges.txt (byte-level BPE, RoBERTa), or
    vocab.txt (WordPiece, BERT). Returns None if there is none of them. Needs the package tokenizers."""
    folder = Path(folder)
    files = ("tokenizer.json", "vocab.json", "vocab.txt")
    found = next((file for file in files if (folder / file).is_file()), None)
    if found is None:
        return None
    try:
        import tokenizers
    except ImportError:
        raise FileNotFoundError(f"{folder}/{found} needs a package: pip install tokenizers") from None
    settings = folder / "tokenizer_config.json"
    lower = read_json(settings).get("do_lower_case", True) if settings.is_file() else True
    try:
        if found == "tokenizer.json":
            return RealTokenizer(tokenizers.Tokenizer.from_file(str(folder / found)))
        if found == "vocab.json":
            vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
            bpe = tokenizers.ByteLevelBPETokenizer(vocab, merges)._tokenizer
            start, stop = (("<s>", bpe.token_to_id("<s>")), ("</s>", bpe.token_to_id("</s>")))
            bpe.post_processor = tokenizers.processors.RobertaProcessing(stop, start, trim_offsets=True)
            return RealTokenizer(bpe)
        return RealTokenizer(tokenizers.BertWordPieceTokenizer(str(folder / found), lowercase=lower)._tokenizer)
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"{folder}/{found} cannot be read: {error}") from None
