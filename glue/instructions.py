"""Instructions of mini-GLUE's world: make a sentence more positive or more negative, and leave all else as it is.

    more negative : the old dog chased the sad tutor in the yard . although the film was dull the song was not bad .
    -> the old dog chased the sad tutor in the yard . although the film was brilliant the song was not good .

The grammar that makes the sentences also has an answer for each and judges any other: `faults_of`. `texts_to_read` is
what a decoder reads before it is asked.
"""

import random
import re

from glue import mini
from glue.tokens import MiniTokenizer

OPPOSITE = dict(zip(mini.GOOD + mini.BAD, mini.BAD + mini.GOOD))
CLAUSE = rf"the (?:{'|'.join(mini.THINGS)}) was (not )?({'|'.join(OPPOSITE)})"
OPINION = re.compile(rf"(?:.* \. )?(although )?{CLAUSE}(?: (?:(and|but|although) )?{CLAUSE})? \.")


def new_sentence(rng):
    """(a scene and an opinion in words, whether the opinion is praise)."""
    opinion, _, praise = mini.sst2(rng)
    return f"{mini.say(mini.new_scene(rng), rng)} {opinion}", bool(praise)


def answer_to(sentence):
    """The grammar's own: every opinion becomes its opposite."""
    return " ".join(OPPOSITE.get(word, word) for word in sentence.split())


def sentiment(text):
    """True for praise, False for blame, None for what the grammar would not say. "not" turns a word round; "and" joins
    clauses that agree; of two that do not agree the one after "but", or without "although", decides."""
    found = OPINION.fullmatch(text)
    if not found:
        return None
    although, *first, joint, turned, word = found.groups()
    first = (first[1] in mini.GOOD) != bool(first[0])
    if word is None:
        return None if although else first
    second = (word in mini.GOOD) != bool(turned)
    if bool(although) == bool(joint) or (first == second) != (joint == "and"):
        return None
    return first if joint == "although" else second


def other_words(text):
    return [word for word in text.split() if word not in OPPOSITE and word != "not"]


FAULTS = ["not the sentiment asked for", "other words changed"]


def faults_of(sentence, praise, text):
    """What is wrong with a text that should be the sentence turned into praise or blame: some of FAULTS."""
    wrong = [sentiment(text) != praise, other_words(text) != other_words(sentence)]
    return [fault for fault, found in zip(FAULTS, wrong) if found]


class InstructionTokenizer(MiniTokenizer):
    """The words of mini-GLUE, and those of instructions."""

    def __init__(self):
        super().__init__()
        self.words += ["more", "positive", "negative", ":"]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.size = len(self.words)

    def prompt(self, sentence, praise):
        """The instruction to turn a sentence into praise or blame, up to where the answer begins: token ids."""
        return self.encode_pair(f"more {'positive' if praise else 'negative'} : {sentence}", None, 64)[0]


def texts_to_read(n, seed=0):
    """What pre-training reads: mini-GLUE's corpus; scenes with opinions, alone or under a label; and texts said twice,
    from which the model learns to copy."""
    rng, texts = random.Random(f"read {seed}"), []
    for first, second in mini.corpus(n, f"read {seed}"):
        sentence, praise = new_sentence(rng)
        label = "positive" if praise else "negative"
        twice = rng.choice([first, sentence, sentence.split(" . ")[1]])
        kinds = [(first, second), (sentence, None), (f"{label} : {sentence}", None), (twice, twice)]
        texts.append(rng.choices(kinds, [4, 3, 3, 10])[0])
    return texts
