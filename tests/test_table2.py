"""Instructions in miniature: the grammar judges, the decoder writes word by word, and adapters learn."""

import random
from dataclasses import replace

import torch

from experiments import table2
from glue import decoder, mini
from glue.instructions import FAULTS, InstructionTokenizer, answer_to, faults_of, new_sentence, sentiment
from hub.roberta import save_pretrained
from tiny_transformer import TinyTransformer


def test_the_judge_accepts_the_grammars_answers_alone():
    rng = random.Random(0)
    known = [new_sentence(rng) for _ in range(100)]
    for (sentence, praise), (other, _) in zip(known, known[1:]):
        assert faults_of(sentence, not praise, answer_to(sentence)) == []
        assert faults_of(sentence, not praise, sentence) == [FAULTS[0]]
        assert FAULTS[1] in faults_of(sentence, not praise, answer_to(other))
        assert faults_of(sentence, not praise, answer_to(sentence)[:-2]) == FAULTS


def test_the_judge_finds_the_sentiment_that_the_world_means_and_no_other():
    rng = random.Random(0)
    for _ in range(300):
        opinion, _, praise = mini.sst2(rng)
        assert sentiment(opinion) is bool(praise), opinion
    for text in ("the film was good and the song was bad .", "although the film was bad .", "the film was good",
                 "the film was good but the song was great .", "the film was not not good .", "the dog was good .",
                 "the film was good the song was good ."):  # fmt: skip
        assert sentiment(text) is None and sentiment(f"the old dog chased the sad cat in the yard . {text}") is None


def small_decoder():
    return decoder.NextWord(TinyTransformer(replace(decoder.decoder_config(), num_hidden_layers=2))).eval()


@torch.no_grad()
def step_by_step(model, prompt, stop, most):
    """The likeliest next word of one unpadded text, again and again."""
    written = []
    while len(written) < most and stop not in written:
        ids = torch.tensor([prompt + written])
        written.append(int(model(ids, torch.ones_like(ids, dtype=torch.bool))[-1].argmax()))
    return written[: written.index(stop)] if stop in written else written


def test_what_is_written_in_a_batch_is_what_is_written_alone_word_by_word():
    model, rng = small_decoder(), random.Random(0)
    prompts = [[0, *(rng.randrange(5, 100) for _ in range(n)), 2] for n in (3, 9, 5, 14, 3, 7)]
    never = -1  # a word that no decoder writes
    free = [step_by_step(model, prompt, never, 12) for prompt in prompts]
    assert len(set(map(tuple, free))) == len(free) and len(set(sum(free, []))) > 3, "texts that differ"
    for stop in (never, free[0][0], free[1][4], free[3][8]):
        assert decoder.write(model, prompts, stop, 12) == [step_by_step(model, p, stop, 12) for p in prompts]


def test_held_out_sentences_are_asked_for_the_other_sentiment_and_are_not_trained_on(monkeypatch):
    monkeypatch.setattr(table2, "HELD_OUT", 50)
    table2.data_of.cache_clear()
    asked, held_out, train = table2.data_of(0, 100)
    table2.data_of.cache_clear()
    words = InstructionTokenizer().words
    texts = [" ".join(words[i] for i in ids) for ids, _ in held_out + train]
    assert len(asked) == len(held_out) == 50 and len(train) == 100 and len(set(texts)) == 150
    for (sentence, praise), text in zip(asked, texts):
        prompt = f"<s> more {'positive' if praise else 'negative'} : {sentence} </s>"
        assert text == f"{prompt} {answer_to(sentence)} </s>" and sentiment(sentence) is not praise


def test_adapters_keep_to_their_size_and_lower_the_loss_of_held_out_answers(tmp_path, monkeypatch):
    save_pretrained(small_decoder(), tmp_path / "lm")
    monkeypatch.setattr(table2, "mini_decoder", lambda: tmp_path / "lm")
    monkeypatch.setattr(table2, "HELD_OUT", 20)
    monkeypatch.setattr(table2, "LONGEST", 6)
    table2.data_of.cache_clear()
    arms = ["untuned", "lora-8", "lora-4", "salora-16-to-4"]
    flags = ["--seeds", "0", "--steps", "10", "--rows", "64", "--out", str(tmp_path / "out")]
    rows = table2.main(["--arms", *arms, *flags])
    table2.data_of.cache_clear()
    found = {row["arm"]: row for row in rows}
    sizes = [float(found[arm]["size"]) for arm in arms]
    assert sizes[:3] == [0, 1, 0.5] and 0.47 < sizes[3] <= 0.5
    assert float(found["lora-8"]["loss"]) < float(found["untuned"]["loss"]) - 0.5
