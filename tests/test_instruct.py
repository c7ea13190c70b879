"""Instructions: the grammar judges, the decoder writes word by word, and the experiment runs nothing twice."""

import json
import math
import random
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments import decoder, instruct, rewrite
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
from glue.tasks import load_task
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


# A real decoder


ANSWERS = {"saw": "the dog saw the old cat .", "was": "the film was not very good ."}


@pytest.fixture
def real(tmp_path, tiny_decoder, tiny_weights, monkeypatch):
    """Flags of a short run: a random decoder, instructions of two kinds, and a classifier that counts "good"."""
    pytest.importorskip("sacrebleu")
    rows = [{"instruction": f"{word} {i}", "input": "new" * (i % 2), "output": answer}
            for i in range(20) for word, answer in ANSWERS.items()]  # fmt: skip
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    texts = {0: "the song was dull .", 1: "the song was good ."}
    for label in (0, 1):
        (tmp_path / f"sentiment.dev.{label}").write_text(f"{texts[label]}\n" * 8)
        (tmp_path / f"reference.{label}").write_text(f"{texts[label]}\t{texts[1 - label]}\n" * 4)
    monkeypatch.setattr(rewrite, "CLASSIFIER_DEV", 2)
    settings = SimpleNamespace(device="cpu")
    monkeypatch.setattr(rewrite, "classifier", lambda args, out: (settings, None, lambda rows: rows))
    monkeypatch.setattr(rewrite, "predict", lambda model, rows, device: [int("good" in text) for text, *_ in rows])
    paths = ["--model", str(tiny_decoder), "--data", str(tmp_path / "alpaca.json"), "--yelp", str(tmp_path)]
    more = ["--classifier-weights", str(tiny_weights), "--device", "cpu", "--out", str(tmp_path / "out")]
    return [*paths, *more, "--steps", "10", "--rows", "32", "--words", "6", "--sentences", "3"]


def test_a_prompt_is_that_of_the_paper_in_alpacas_format():
    asked = rewrite.prompt(rewrite.REQUEST.format("positive"), "it was bad .")
    assert asked == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nPlease change the sentiment of the following sentence to be more positive.\n\n"
        "### Input:\nit was bad .\n\n### Response:\n"
    )
    assert "Input" not in rewrite.prompt("Name a color.")


def test_an_answer_begins_where_its_prompt_ends_and_is_cut_to_length(real, tiny_decoder, tmp_path):
    args = SimpleNamespace(data=tmp_path / "alpaca.json", yelp=tmp_path, length=100, rows=30, sentences=3)
    data = rewrite.Data(args, decoder.load(tiny_decoder)[1])
    assert len(data.train) == 30 and len(data.held_out) == 10
    answers = [data.tokenizer.decode(ids[start:]) for ids, start in data.train + data.held_out]
    assert sorted(answers) == sorted(f"{text} </s>" for text in 20 * list(ANSWERS.values()))
    ids, start = data.row("saw", "new", "the dog", 100)
    assert ids[:start] == data.prompt("saw", "new") and ids[0] == data.tokenizer.bos_token_id
    assert data.row("saw", "new", "the dog", start + 2) == (ids[:-1], start), "cut: it does not end there"
    assert data.row("saw", "new", "the dog", start) is None
    assert data.asked["positive"] == 3 * [("the song was dull .", "the song was good .")]


@torch.no_grad()
def test_a_real_decoder_writes_in_a_batch_what_it_writes_alone(tiny_decoder, monkeypatch):
    monkeypatch.setattr(rewrite, "WRITE_BATCH", 4)
    model, tokenizer = decoder.load(tiny_decoder)
    rng = random.Random(0)
    prompts = [[1, *rng.choices(range(3, 23), k=n)] for n in (3, 9, 5, 14, 3, 7)]
    alone = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model.lm(torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert rewrite.write(model, tokenizer, prompts, 8) == alone and len(set(alone)) > 3


def test_a_real_decoder_is_tuned_and_judged_and_nothing_is_run_twice(real, tmp_path, capsys):
    rows = instruct.main(real)
    assert [row["arm"] for row in rows] == ["copy", "human", *rewrite.DEFAULTS["arms"]]
    found = {row["arm"]: row for row in rows}
    sizes = [float(found[arm]["size"]) for arm in ("untuned", "lora-8", "lora-4")]
    assert sizes == [0, 1, 0.5] and all(0.45 < float(found[arm]["size"]) <= 0.5 for arm in ("salora", "salora-16"))
    for asked in rewrite.ASKED:
        assert [float(found[arm][f"accuracy to {asked}"]) for arm in ("copy", "human")] == [0, 1]
        assert 0 < float(found["copy"][f"bleu to {asked}"]) < float(found["human"][f"bleu to {asked}"]) == 100
    assert found["copy"]["perplexity to positive"] == found["human"]["perplexity to negative"], "the same sentences"
    assert len(rewrite.read_table(tmp_path / "out" / "written.csv")) == 7 * 6
    said = capsys.readouterr().out
    assert f"PPL: under the decoder of {real[1]}, not tuned" in said
    more = instruct.main([*real, "--arms", "untuned", "lora-4", "--seeds", "0", "1"])
    assert more[:7] == rows and [(row["arm"], row["seed"]) for row in more[7:]] == [("lora-4", "1")]


def test_instructions_lower_the_loss_of_held_out_answers_of_a_real_decoder(real):
    *_, untuned, tuned = instruct.main([*real, "--arms", "untuned", "lora-8", "--lr", ".01", "--steps", "30"])
    assert float(tuned["loss"]) < float(untuned["loss"]) - 1


def test_perplexity_is_that_of_a_plain_loop_under_the_decoder_before_tuning(real, tiny_decoder):
    judge = object.__new__(rewrite.Judge)
    judge.decoder, judge.tokenizer = decoder.load(tiny_decoder)
    nats = 0
    for ids in ([1, 3, 4], [1, 5]):
        log_p = judge.decoder.lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(log_p[t - 1, ids[t]].item() for t in range(1, len(ids)))
    assert judge.perplexity(["the a", "", "film"]) == pytest.approx(math.exp(nats / 3), rel=1e-4)
    assert math.isnan(judge.perplexity([""]))


def test_the_classifier_is_a_run_of_the_main_job_that_is_made_once_and_resumed(
    tmp_path, tiny_weights, tiny_decoder, monkeypatch
):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_weights, encoder)
    shutil.copy(tiny_decoder / "tokenizer.json", encoder)
    for label, word in enumerate(("bad", "good")):
        lines = [f"the {noun} was {word} ." for noun in ("film", "song", "dog", "cat")]
        (tmp_path / f"sentiment.dev.{label}").write_text("\n".join(lines))
    monkeypatch.setattr(rewrite, "CLASSIFIER_DEV", 1)
    args = SimpleNamespace(yelp=tmp_path, classifier_weights=str(encoder), device="cpu")
    settings, model, encode = rewrite.classifier(args, tmp_path)
    labels = rewrite.predict(model, encode([("the film was good .", None, 0)]), settings.device)
    assert settings.method == "salora" and labels in ([0], [1])
    train, dev = load_task("sst2", tmp_path)
    assert [row[2] for row in train] == [0, 0, 0, 1, 1, 1]
    assert dev == [("the cat was bad .", None, 0), ("the cat was good .", None, 1)]

    asked = []
    monkeypatch.setattr(rewrite.train_glue_mini, "main", asked.append)
    again = rewrite.classifier(args, tmp_path)[1]
    assert asked == [] and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (tmp_path / "classifier" / "summary.json").rename(tmp_path / "classifier" / "checkpoint.pt")
    with pytest.raises(FileNotFoundError):
        rewrite.classifier(args, tmp_path)
    assert asked == [["--resume", str(tmp_path / "classifier")]]


@pytest.mark.parametrize(
    "more,part",
    [
        (["--model", "nowhere"], "no config.json in nowhere"),
        (["--data", "nowhere"], "no file nowhere"),
        (["--yelp", "nowhere"], "nowhere"),
        (["--rows", "40"], "40 instructions that fit --length 192: take fewer"),
    ],
)
def test_what_a_real_decoder_cannot_use_is_one_line_and_exit_status_2(more, part, real, capsys):
    with pytest.raises(SystemExit) as stopped:
        instruct.main([*real, *more])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and part in said


def test_without_sacrebleu_there_is_one_line(real, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(SystemExit) as stopped:
        instruct.main(real)
    assert stopped.value.code == 2 and "needs sacrebleu: pip install -r req" in capsys.readouterr().err


def test_flags_that_belong_together_are_asked_for(tmp_path, tiny_decoder, capsys):
    for flags, part in (
        (["--model", str(tiny_decoder)], "--model needs --data"),
        (["--data", "x"], "--data is for a real decoder: it needs --model"),
        (["--batch-size", "4"], "--batch-size is for a real decoder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            instruct.main([*flags, "--out", str(tmp_path)])
        assert stopped.value.code == 2 and part in capsys.readouterr().err
