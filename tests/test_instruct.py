"""Instructions: the grammar judges, the decoder writes word by word, and the experiment runs nothing twice."""

import random
from dataclasses import replace

import pytest
import torch

from experiments import instruct
from glue import mini
from glue.instructions import (
    FAULTS,
    InstructionTokenizer,
    answer_to,
    faults_of,
    new_sentence,
    sentiment,
    texts_to_read,
)
from tiny_transformer import TinyTransformer, save_pretrained


def sentences(n=300):
    rng = random.Random(0)
    return [new_sentence(rng) for _ in range(n)]


def test_the_judge_finds_the_sentiment_that_the_world_means():
    rng = random.Random(0)
    for _ in range(1000):
        opinion, _, praise = mini.sst2(rng)
        assert sentiment(opinion) is bool(praise), opinion


def test_the_judge_accepts_the_grammars_answers_and_refuses_the_sentence_itself():
    for sentence, praise in sentences():
        assert faults_of(sentence, not praise, answer_to(sentence)) == []
        assert answer_to(answer_to(sentence)) == sentence
        assert faults_of(sentence, not praise, sentence) == [FAULTS[0]]
        assert faults_of(sentence, praise, answer_to(sentence)) == [FAULTS[0]]


def test_the_judge_refuses_other_sentences_and_no_sentences():
    rng = random.Random(1)
    known = sentences()
    for (sentence, praise), (other, _) in zip(known, known[1:]):
        assert FAULTS[1] in faults_of(sentence, not praise, answer_to(other))
        words = answer_to(sentence).split()
        assert faults_of(sentence, not praise, " ".join(words[:-1])) == FAULTS
        assert faults_of(sentence, not praise, " ".join(rng.sample(words, len(words)))) == FAULTS
    assert faults_of(*known[0], "") == FAULTS


@pytest.mark.parametrize(
    "text,praise",
    [
        ("the film was good .", True),
        ("the film was not good .", False),
        ("the film was good and the song was not bad .", True),
        ("the film was good and the song was bad .", None),
        ("the film was good but the song was bad .", False),
        ("the film was good but the song was great .", None),
        ("the film was bad although the song was good .", False),
        ("although the film was bad the song was good .", True),
        ("although the film was bad but the song was good .", None),
        ("although the film was bad .", None),
        ("the film was good the song was good .", None),
        ("the film was not not good .", None),
        ("the film was good", None),
        ("the dog was good .", None),
    ],
)
def test_sentiment_of(text, praise):
    assert sentiment(text) is praise
    assert sentiment(f"the old dog chased the sad cat in the yard . {text}") is praise


def test_a_decoder_reads_nothing_of_the_instructions_but_their_words():
    tokenizer = InstructionTokenizer()
    texts = texts_to_read(500)
    assert not any("more" in text.split() for pair in texts for text in pair if text)
    assert all(tokenizer.unknown not in tokenizer.encode_pair(*pair, 70)[0] for pair in texts)
    ids = tokenizer.prompt("the film was bad .", True)
    assert [tokenizer.words[i] for i in ids] == "<s> more positive : the film was bad . </s>".split()


# The decoder


def small_decoder():
    """Random, and steep enough that its words differ from place to place."""
    return instruct.NextWord(TinyTransformer(replace(instruct.decoder_config(), num_hidden_layers=2))).eval()


def test_a_batch_asks_for_every_word_of_the_answer_and_for_no_other():
    rows = [([0, 7, 8, 2, 9, 10, 2], 4), ([0, 7, 2, 11, 2], 3), ([0, 7, 8, 2, 12, 2], 1)]
    (ids, places), labels = instruct.batch_of(rows)
    expected = [(i, t - 1, words[t]) for i, (words, start) in enumerate(rows) for t in range(start, len(words))]
    assert [[i, t] for i, t, _ in expected] == places.nonzero().tolist()
    assert [word for *_, word in expected] == labels.tolist()
    assert ids.shape == places.shape == (3, 7)


NEVER = -1  # a word that no decoder writes


@torch.no_grad()
def step_by_step(model, prompt, stop, most):
    """The likeliest next word of one unpadded text, again and again."""
    written = []
    while len(written) < most and stop not in written:
        ids = torch.tensor([prompt + written])
        logits = model(ids, torch.ones_like(ids, dtype=torch.bool))  # (seq, vocab)
        written.append(int(logits[-1].argmax()))
    return written[: written.index(stop)] if stop in written else written


def test_what_is_written_in_a_batch_is_what_is_written_alone_word_by_word():
    model, rng = small_decoder(), random.Random(0)
    prompts = [[0, *(rng.randrange(5, 100) for _ in range(n)), 2] for n in (3, 9, 5, 14, 3, 7)]
    free = [step_by_step(model, prompt, NEVER, 12) for prompt in prompts]
    assert len(set(map(tuple, free))) == len(free) and len(set(sum(free, []))) > 3, "texts that differ"
    for stop in (NEVER, free[0][0], free[1][4], free[3][8]):
        assert instruct.write(model, prompts, stop, 12) == [step_by_step(model, p, stop, 12) for p in prompts]


def test_held_out_sentences_are_asked_for_the_other_sentiment_and_are_not_trained_on(monkeypatch):
    monkeypatch.setattr(instruct, "HELD_OUT", 50)
    data = instruct.Data(0, 100)
    words = data.tokenizer.words
    assert len(data.held_out) == len(data.asked) == 50 and len(data.train) == 100
    texts = [" ".join(words[i] for i in ids) for ids, _ in data.held_out + data.train]
    assert len(set(texts)) == 150
    for (sentence, praise), text in zip(data.asked, texts):
        asked = f"<s> more {'positive' if praise else 'negative'} : {sentence} </s>"
        assert text == f"{asked} {answer_to(sentence)} </s>" and sentiment(sentence) is not praise


# The experiment


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A small random decoder instead of the pre-trained one. Returns flags for a short run."""
    torch.manual_seed(0)
    save_pretrained(small_decoder(), tmp_path / "lm")
    monkeypatch.setattr(instruct, "mini_decoder", lambda: tmp_path / "lm")
    monkeypatch.setattr(instruct, "HELD_OUT", 20)
    monkeypatch.setattr(instruct, "LONGEST", 6)
    return ["--steps", "10", "--rows", "64", "--out", str(tmp_path / "out")]


def test_instructions_add_rows_and_run_nothing_twice(tmp_path, short, capsys):
    rows = instruct.main(["--seeds", "0", *short])
    assert list(rows[0]) == instruct.COLUMNS and [row["arm"] for row in rows] == list(instruct.ARMS)
    sizes = {row["arm"]: float(row["size"]) for row in rows}
    assert [sizes[arm] for arm in ("untuned", "lora-8", "restart-8", "lora-4")] == [0, 1, 1, 0.5]
    assert 0.47 < sizes["salora"] <= 0.5 and 0.47 < sizes["salora-16"] <= 0.5
    assert f"lora-4, {' and '.join(FAULTS)}\n  more " in capsys.readouterr().out, "texts as they came"
    more = instruct.main(["--seeds", "0", "1", "--arms", "lora-4", "untuned", *short])
    assert more[:6] == rows and [(row["seed"], row["arm"]) for row in more[6:]] == [("1", "lora-4"), ("1", "untuned")]
    more = instruct.main(["--seeds", "0", "--arms", "lora-4", "untuned", "--lr", ".001", ".002", *short])
    assert [(row["arm"], row["lr"]) for row in more[8:]] == [("lora-4", "0.001"), ("lora-4", "0.002")]


def test_training_lowers_the_loss_of_held_out_answers(short):
    untuned, tuned = instruct.main(["--seeds", "0", "--arms", "untuned", "lora-8", "--lr", ".01", *short])
    assert float(tuned["loss"]) < float(untuned["loss"]) - 0.5


@pytest.mark.parametrize(
    "flags", [["--arms", "best"], ["--lr", "0"], ["--steps", "0"], ["--rows", "x"], ["--seeds", "a"]]
)
def test_a_flag_that_means_nothing_is_one_line_and_exit_status_2(flags, short, capsys):
    with pytest.raises(SystemExit) as stopped:
        instruct.main([*short, *flags])
    _, _, line = capsys.readouterr().err.partition("error: ")
    assert stopped.value.code == 2 and flags[0] in line and line.count("\n") == 1
