"""The data of the main job: generated tasks, official files, tokens, metrics, pre-training."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, seeds

from glue import metrics, mini, pretrain
from glue.tasks import DEV_ROWS, TASKS, TRAIN_ROWS, has_labels, load_task, read_rows, task_of
from glue.tokens import MiniTokenizer, batch_of, batches_of, collate, tokenizer_for
from hub.roberta import load_pretrained
from hub.tokenizers import load_tokenizer
from tiny_transformer import MaskedLM, SequenceClassifier, TinyTransformer, TransformerConfig

# mini-GLUE

CONCEPT = {word: concept for concepts in mini.SLOTS.values() for concept in concepts for word in concept.split()}
CONCEPT.update({mini.past(word): concept for concept in mini.VERBS for word in concept.split()})
OPPOSITE = dict(zip(mini.QUALITIES[::2], mini.QUALITIES[1::2], strict=True))
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
GENERAL = {"animal": mini.ANIMALS, "person": mini.PEOPLE, "area": mini.PLACES}


def compare(first, second):
    """How the words of two sentences, position by position, relate: a Counter of same, general, opposite, other."""
    relations = Counter()
    for a, b in zip(first.split(), second.split(), strict=True):
        if a == b or (a in CONCEPT and CONCEPT[a] == CONCEPT.get(b)):
            relations["same"] += 1
        elif CONCEPT.get(a) in GENERAL.get(b, []):
            relations["general"] += 1
        elif CONCEPT.get(b) == OPPOSITE.get(CONCEPT.get(a), "-"):
            relations["opposite"] += 1
        else:
            relations["other"] += 1
    return relations


def answers(question, sentence):
    """Whether a sentence says all that the question says, and names something of the kind that is asked for."""
    words = zip(question.rstrip("?").split(), sentence.rstrip(".").split(), strict=True)
    return all(a == "which" or a == b or CONCEPT.get(b) in [CONCEPT.get(a, "-"), *GENERAL.get(a, [])] for a, b in words)


@pytest.mark.parametrize("task", mini.TASKS)
def test_generated_rows_are_reproducible_distinct_balanced_and_split_without_overlap(task):
    train, dev = load_task(task)
    assert (len(train), len(dev)) == (TRAIN_ROWS, DEV_ROWS) and DEV_ROWS >= 1000
    assert (train[:50], dev[-50:]) == (load_task(task)[0][:50], load_task(task)[1][-50:])
    assert not {row[:2] for row in train} & {row[:2] for row in dev}
    labels = task_of(task).num_labels if task_of(task).labels else 6
    shares = np.bincount([int(row[2]) for row in dev], minlength=labels) / len(dev)
    assert len(shares) == labels and abs(shares - 1 / labels).max() < 0.06
    known = set(mini.VOCABULARY)
    assert all(word in known for row in train + dev for text in row[:2] if text for word in text.split())


@pytest.mark.parametrize("task", ["mini-mrpc", "mini-qqp", "mini-stsb", "mini-mnli", "mini-qnli", "mini-rte"])
def test_labels_of_pairs_follow_from_the_words_alone(task):
    """An oracle that knows the lexicon but not how rows are made must agree with every label."""
    for first, second, label in mini.examples(task, 1500):
        if task == "mini-qnli":
            assert label == int(not answers(first, second)), (first, second)
            continue
        relations = compare(first, second)
        differs = relations["other"] + relations["opposite"] > 0
        expected = {
            "mini-mrpc": int(not differs and not relations["general"]),
            "mini-qqp": int(not differs and not relations["general"]),
            "mini-stsb": 5.0 - relations["other"] - relations["opposite"],
            "mini-mnli": 2 if relations["opposite"] else int(differs),
            "mini-rte": int(differs),
        }[task]
        assert label == expected, (first, second)


def test_sentiment_follows_from_the_clause_that_decides():
    for text, _, label in mini.examples("mini-sst2", 1000):
        clauses = re.split(r" but ", text)
        decisive = clauses[-1]
        if decisive.startswith("although "):
            decisive = decisive.split(" the ")[-1]  # although the A was x the B was y
        decisive = decisive.split(" although ")[0].split(" and ")[-1]
        word = [w for w in decisive.split() if w in mini.GOOD + mini.BAD]
        assert len(word) == 1 and label == int((word[0] in mini.GOOD) != ("not" in decisive.split())), text


def test_grammar_faults_are_really_faults():
    """A checker of agreement and order, written for the finished sentence."""
    nouns = " ".join(mini.NOUNS).split()
    number = {n: "one" for n in nouns} | {n + "s": "many" for n in nouns}
    verbs = {v: "many" for v in " ".join(mini.VERBS).split()}
    verbs |= {v + "s": "one" for v in list(verbs)}
    phrase = r"(the|this|these) (?:\w+ )?(\w+)"
    pattern = re.compile(rf"{phrase}(?: (?:near|by) {phrase})? (\w+) {phrase}(?: in the \w+)? \.")
    qualities = " ".join(mini.QUALITIES).split()

    def good(text):
        for verb in verbs:
            found = pattern.fullmatch(text) if f" {verb} " in text else None
            if found and found[5] == verb:
                phrases = [(found[1], found[2]), (found[3], found[4]), (found[6], found[7])]
                agree = all(d in (None, "the") or (d == "these") == (number.get(n) == "many") for d, n in phrases)
                nouns_only = all(n is None or n in number for _, n in phrases)
                middles = re.findall(r"(?:the|this|these) (\w+) (?=\w)", text)
                ordered = all(m in qualities or m in number or m in " ".join(mini.PLACES).split() for m in middles)
                return agree and nouns_only and ordered and number[found[2]] == verbs[verb]
        return False

    for text, _, label in mini.examples("mini-cola", 1500):
        assert good(text) == bool(label), text


def test_corpus_is_true_text_of_the_same_world():
    texts = mini.corpus(2000)
    assert texts == mini.corpus(2000) != mini.corpus(2000, seed=1)
    pairs = [pair for pair in texts if pair[1]]
    assert 0.4 < len(pairs) / len(texts) < 0.7
    for first, second in pairs:
        if "?" in first and "?" not in second:
            assert answers(first, second)
        else:
            assert set(compare(first, second)) <= {"same", "general"}


# Official files

ROWS = {  # header (CoLA has none), two good rows, and the labels that they should get
    "cola": ("", ["gj04|1||a", "gj04|0|*|c"], [1, 0]),
    "sst2": ("sentence|label", ["a|1", "c|0"], [1, 0]),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", ["1|7|8|a|b", "0|7|8|c|d"], [1, 0]),
    "qqp": ("id|qid1|qid2|question1|question2|is_duplicate", ["1|2|3|a|b|1", "1|2|3|c|d|0"], [1, 0]),
    "stsb": ("index|genre|sentence1|sentence2|score", ["0|g|a|b|5.000", "1|g|c|d|0.25"], [5.0, 0.25]),
    "mnli": ("index|sentence1|sentence2|gold_label", ["0|a|b|neutral", "1|c|d|contradiction"], [1, 2]),
    "qnli": ("index|question|sentence|label", ["0|a|b|entailment", "1|c|d|not_entailment"], [0, 1]),
    "rte": ("index|sentence1|sentence2|label", ["0|a|b|entailment", "1|c|d|not_entailment"], [0, 1]),
    "wnli": ("index|sentence1|sentence2|label", ["0|a|b|1", "1|c|d|0"], [1, 0]),
}


def expected_rows(name):
    second = [None, None] if len(TASKS[name].sentences) == 1 else ["b", "d"]
    return list(zip(["a", "c"], second, ROWS[name][2], strict=True))


def write_official(folder, name, change=lambda text: text, end="\n", mark=""):
    header, rows, _ = ROWS[name]
    lines = ([header] if header else []) + rows
    text = change(mark + end.join(lines).replace("|", "\t") + end)
    where = folder / TASKS[name].folder
    where.mkdir(exist_ok=True)
    for file in ("train.tsv", TASKS[name].dev):
        (where / file).write_bytes(text.encode("utf-8"))
    return where


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("end,mark", [("\n", ""), ("\r\n", "\ufeff")])
def test_official_layouts_are_read_with_any_line_end_and_byte_order_mark(tmp_path, name, end, mark):
    where = write_official(tmp_path, name, end=end, mark=mark)
    assert load_task(name, tmp_path) == (expected_rows(name), expected_rows(name))
    assert load_task(name, where) == load_task(name, tmp_path), "the task's own folder will do as well"


def test_quotes_and_odd_line_separators_are_part_of_a_sentence(tmp_path):
    write_official(tmp_path, "sst2", lambda text: text.replace("a\t", 'say "fi\u2028n\x85e\ro \t'))
    assert load_task("sst2", tmp_path)[0][0] == ('say "fi\u2028n\x85e\ro ', None, 1)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("cola", lambda t: t + "gj04\t1\tfew columns\n", r"train.tsv, line 3: 3 columns, expected 4 \(source, label"),
        ("sst2", lambda t: t.replace("c\t", "c\t\t"), "train.tsv, line 3: 3 columns, expected 2"),
        ("sst2", lambda t: t.replace("c\t0", "c\t2"), "line 3: label '2', expected one of 0, 1"),
        ("stsb", lambda t: t.replace("0.25", "7"), "line 3: score '7', expected a number from 0 to 5"),
        ("stsb", lambda t: t.replace("0.25", "much"), "line 3: score 'much', expected a number"),
        ("mnli", lambda t: t.replace("neutral", "-"), "line 2: label '-', expected one of entailment, neutral"),
        ("qqp", lambda t: t.replace("question2", "text"), "has no column question2; its header is 'id', 'qid1'"),
        ("rte", lambda t: "", "has no column sentence1, sentence2, label; its header is empty"),
        ("cola", lambda t: "\n\n", "train.tsv holds no rows"),
    ],
)
def test_bad_files_are_refused_by_file_line_and_value(tmp_path, name, change, message):
    write_official(tmp_path, name, change)
    with pytest.raises(ValueError, match=message):
        load_task(name, tmp_path)


def test_bytes_that_are_not_utf8_are_refused_by_line(tmp_path):
    where = write_official(tmp_path, "sst2")
    (where / "train.tsv").write_bytes(b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match="train.tsv, line 3: byte 0xe9 is not UTF-8"):
        load_task("sst2", tmp_path)


def test_the_broken_lines_of_the_official_qqp_file_are_left_out(tmp_path):
    write_official(tmp_path, "qqp", lambda text: text + "9\t9\t9\thalf a question\n")
    assert load_task("qqp", tmp_path)[0] == expected_rows("qqp")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.train.tsv; expected GLUE's CoLA"):
        load_task("cola", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="task cola needs --data DIR"):
        load_task("cola")


def test_unlabeled_files_need_no_label_column(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    assert read_rows(tmp_path / "test.tsv", TASKS["rte"], labeled=False) == [("a", "b", 0)]


def test_real_glue_files_have_their_published_sizes(glue_dir):
    for name, train, dev, positive in (("cola", 8551, 1043, 721), ("mrpc", 3668, 408, 279), ("sst2", 67349, 872, 444)):
        rows = load_task(name, glue_dir)
        assert (len(rows[0]), len(rows[1]), sum(row[2] for row in rows[1])) == (train, dev, positive)


# Tokens


def test_mini_tokens_of_a_sentence_and_of_a_pair():
    tokenizer = MiniTokenizer()
    [(ids, types, label)] = tokenizer.encode([("the dog .", None, 1)])
    assert [tokenizer.words[i] for i in ids] == ["<s>", "the", "dog", ".", "</s>"] and types == [0] * 5 and label == 1
    [(ids, types, _)] = tokenizer.encode([("the dog", "a zebra", 0)])
    assert [tokenizer.words[i] for i in ids] == ["<s>", "the", "dog", "</s>", "<unk>", "<unk>", "</s>"]
    assert types == [0, 0, 0, 0, 1, 1, 1]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(6, 20))
def test_truncation_takes_from_the_longer_sentence(n, m, longest):
    tokenizer = MiniTokenizer()
    [(ids, types, _)] = tokenizer.encode([(" ".join(["dog"] * n), " ".join(["cat"] * m), 0)], longest)
    left, right = types.count(0) - 2, types.count(1) - 1
    assert len(ids) == len(types) == min(n + m + 3, longest)
    assert (left, right) == (n, m) or abs(left - right) <= 1 or left == n or right == m
    assert left <= n and right <= m


def test_collate_pads_to_the_longest_row():
    ids, mask, types, labels = collate([([0, 5, 2], [0, 0, 0], 1), ([0, 5, 6, 7, 2], [0, 0, 1, 1, 1], 0)], pad=1)
    assert ids.tolist() == [[0, 5, 2, 1, 1], [0, 5, 6, 7, 2]] and mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert types.tolist() == [[0] * 5, [0, 0, 1, 1, 1]] and labels.tolist() == [1, 0]


def reference_tokenizer(family, encoder_dir, roberta_dir):
    """(our tokenizer from the files of a folder, that of `transformers` from the same files)."""
    transformers = pytest.importorskip("transformers")
    if family == "bert":
        return load_tokenizer(encoder_dir), transformers.AutoTokenizer.from_pretrained(encoder_dir)
    vocab, merges = str(roberta_dir / "vocab.json"), str(roberta_dir / "merges.txt")
    try:
        return load_tokenizer(roberta_dir), transformers.RobertaTokenizer(vocab, merges)
    except TypeError:
        return load_tokenizer(roberta_dir), transformers.RobertaTokenizer(vocab=vocab, merges=merges)


@pytest.mark.parametrize("longest", [512, 24])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_tokens_of_all_real_sentences_equal_the_references(
    glue_dir, encoder_dir, roberta_tokenizer_dir, family, longest
):
    ours, other = reference_tokenizer(family, encoder_dir, roberta_tokenizer_dir)
    for name in ("cola", "mrpc", "sst2") if longest == 512 else ("mrpc",):
        train, dev = load_task(name, glue_dir)
        rows = train + dev
        pairs = [[row[0] for row in rows]] + ([[row[1] for row in rows]] if rows[0][1] else [])
        expected = other(*pairs, truncation="longest_first", max_length=longest)
        found = ours.encode(rows, longest)
        different = [row[:2] for row, mine, ids in zip(rows, found, expected["input_ids"]) if mine[0] != ids]
        print(f"{family}, {name}, at most {longest} tokens: {len(different)} of {len(rows)} rows differ")
        assert not different, different[:2]
        if family == "bert":
            assert [row[1] for row in found] == list(expected["token_type_ids"])


def test_word_pieces_from_vocab_txt(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nplay\n##ing\nfine\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode([("Playing", "fine", 1)], 16) == [([2, 5, 6, 3, 7, 3], [0, 0, 0, 0, 1, 1], 1)]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).encode([("Playing", None, 1)], 16)[0][0] == [2, 1, 3]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_damaged_tokenizer_files_are_refused_by_name(tmp_path, name):
    pytest.importorskip("tokenizers")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{name} cannot be read: |has no .CLS., which its BertTokenizer puts"):
        load_tokenizer(tmp_path)


def test_more_words_than_the_encoder_has_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfine\n")
    assert tokenizer_for(tmp_path, TransformerConfig(vocab_size=6), mini=False).size == 6
    with pytest.raises(ValueError, match="has 6 words, but config.json says vocab_size 5"):
        tokenizer_for(tmp_path, TransformerConfig(vocab_size=5), mini=False)
    (tmp_path / "vocab.txt").unlink()
    assert load_tokenizer(tmp_path) is None


# Batches


@pytest.mark.parametrize("types", [1, 2])
def test_a_batch_has_token_types_where_the_encoder_has_them(types):
    encoder = TinyTransformer(TransformerConfig(130, 8, 1, 1, 8, 48, types))
    rows = MiniTokenizer().encode([("the dog", "a cat .", 1), ("the film", None, 0)])
    (ids, mask, found), labels = batch_of(rows, SequenceClassifier(encoder, 2), "cpu")
    assert ids.shape == mask.shape == (2, 8) and mask.sum(1).tolist() == [8, 4] and labels.tolist() == [1, 0]
    expected = [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8]
    assert found is None if types == 1 else found.tolist() == expected


def test_batches_hold_every_row_once_in_an_order_that_the_seed_decides():
    rows = [([0] * (1 + i % 7), None, i) for i in range(50)]
    orders = [[row[2] for batch in batches_of(rows, 8, seed) for row in batch] for seed in (0, 1)]
    assert orders[0] != orders[1] and all(sorted(order) == list(range(50)) != order for order in orders)
    assert [len(batch) for batch in batches_of(rows, 8, 0)] == [*[8] * 6, 2]
    assert batches_of(rows, 8, 0) == batches_of(rows, 8, 0)


# Metrics


def test_metrics_by_hand():
    predicted, gold = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert metrics.accuracy(predicted, gold) == 0.6
    assert metrics.f1(predicted, gold) == pytest.approx(2 * 2 / (3 + 3))
    assert metrics.matthews(predicted, gold) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert metrics.pearson([1, 2, 3], [2, 4, 6.5]) == pytest.approx(0.99794, abs=1e-5)
    assert metrics.spearman([1, 2, 3], [10, 400, 500]) == 1
    assert metrics.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(np.sqrt(3) / 2)
    assert metrics.spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5)), "ranks 1.5, 1.5, 3, 4"
    assert metrics.matthews([1, 1], [0, 1]) == metrics.pearson([1, 1], [0, 1]) == metrics.f1([0, 0], [0, 0]) == 0


def test_a_constant_whose_mean_is_rounded_has_no_correlation():
    assert metrics.pearson([3.8] * 6, [2.2] * 6) == metrics.pearson([3.8] * 6, [1, 2, 3, 4, 5, 6]) == 0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_class_metrics_equal_scikit_learns(pairs):
    sk = pytest.importorskip("sklearn.metrics")
    predicted, gold = zip(*pairs, strict=True)
    assert metrics.accuracy(predicted, gold) == pytest.approx(sk.accuracy_score(gold, predicted))
    assert metrics.f1(predicted, gold) == pytest.approx(sk.f1_score(gold, predicted, zero_division=0))
    assert metrics.matthews(predicted, gold) == pytest.approx(sk.matthews_corrcoef(gold, predicted))


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=40))
def test_correlations_equal_scipys(pairs):
    stats = pytest.importorskip("scipy.stats")
    x, y = (np.array(v, dtype=float) for v in zip(*pairs, strict=True))
    if x.std() > 0 and y.std() > 0:
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_correlations_of_a_nan_are_nan_as_in_scipy():
    """Predictions of a model that diverged have no rank."""
    stats = pytest.importorskip("scipy.stats")
    nan = float("nan")
    for x in ([nan, 1.0, 2.0, 3.0], [nan] * 4):
        for y in ([1.0, 2.0, 3.0, 4.0], [2.0] * 4):
            for a, b in ((x, y), (y, x)):
                assert np.isnan(metrics.pearson(a, b)) and np.isnan(metrics.spearman(a, b))
                assert np.isnan(stats.spearmanr(a, b)[0])


def test_metrics_and_dev_files_are_glues():
    assert {task.metric for task in TASKS.values()} | {"f1", "spearman"} == set(metrics.METRICS)
    assert {name for name, task in TASKS.items() if task.also == "f1"} == {"mrpc", "qqp"}
    assert TASKS["stsb"].also == "spearman"
    assert {task.dev for name, task in TASKS.items() if name != "mnli"} == {"dev.tsv"}
    assert (TASKS["mnli"].dev, TASKS["mnli"].more_dev) == ("dev_matched.tsv", "dev_mismatched.tsv")


def test_a_file_has_labels_if_its_header_says_so_or_if_it_is_a_dev_file_without_header(tmp_path):
    for name, first, expected in (
        ("sst2", "sentence\tlabel", True),
        ("sst2", "index\tsentence", False),
        ("cola", "gj04\t1\t\tThe sailors rode the breeze .", True),
        ("cola", "index\tsentence", False),
        ("cola", "index\tlabel\tsentence", True),
        ("mnli", "index\tsentence1\tsentence2", False),
        ("mnli", "\ufeff\nindex\tsentence1\tsentence2\tgold_label\r", True),
        ("rte", "", False),
        ("cola", "some\ttext", False),
    ):
        (tmp_path / "file.tsv").write_bytes(f"{first}\n".encode())
        assert has_labels(tmp_path / "file.tsv", TASKS[name]) == expected, f"{name}: {first}"
    assert not has_labels(tmp_path / "nowhere.tsv", TASKS["rte"])


# Pre-training


@given(seeds)
def test_corruption_hides_words_only_and_of_a_pair_one_side_only(seed):
    tokenizer = MiniTokenizer()
    rows = tokenizer.encode([(*text, 0) for text in mini.corpus(64, seed)])
    ids, _, types, _ = collate(rows, tokenizer.pad)
    seen, hidden = pretrain.corrupt(ids, types, tokenizer, generator(seed))
    assert not (hidden & (ids <= tokenizer.mask)).any(), "special tokens are never hidden"
    assert torch.equal(seen[~hidden], ids[~hidden]), "what is not predicted is not changed"
    plausible = hidden & (seen != ids) & (seen != tokenizer.mask)
    assert torch.equal(seen[plausible], ids.roll(1, 0)[plausible]), "the word that the text before has there"
    assert (seen[hidden] != ids[hidden]).any() and (seen[hidden] == tokenizer.mask).any()
    for row, kinds in zip(hidden, types, strict=True):
        if kinds.any():
            assert len(kinds[row].unique()) <= 1, "the other sentence stays whole"


def test_mini_encoder_is_trained_once_and_then_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "STEPS", 2)
    monkeypatch.setattr(pretrain, "TEXTS", 128)
    monkeypatch.setattr(pretrain.pretrain, "__defaults__", ("cpu", 2))
    first = pretrain.mini_encoder(tmp_path)
    assert "pre-training" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == [first.name]
    assert pretrain.mini_encoder(tmp_path) == first and capsys.readouterr().out == ""
    lm, _ = load_pretrained(first, MaskedLM)
    assert lm.lm_head.bias.any(), "the trained masked-LM head is kept"
    assert load_pretrained(first)[0].word.weight.equal(lm.encoder.word.weight) and capsys.readouterr().out == ""
    monkeypatch.setattr(pretrain, "STEPS", 3)
    assert pretrain.mini_encoder(tmp_path) != first, "another recipe is another encoder"


def test_of_two_runs_that_pre_train_at_once_the_first_to_finish_leaves_its_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "pretrain", lambda device: TinyTransformer(pretrain.MINI))

    def slower(device):
        first = pretrain.mini_encoder(tmp_path)  # the other run, while this one trains
        (first / "mine").touch()
        return TinyTransformer(pretrain.MINI)

    faster, calls = pretrain.pretrain, iter([slower, None])
    monkeypatch.setattr(pretrain, "pretrain", lambda device: (next(calls) or faster)(device))
    path = pretrain.mini_encoder(tmp_path)
    assert (path / "mine").exists() and list(tmp_path.iterdir()) == [path], "and nothing else stays behind"
