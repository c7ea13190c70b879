"""mini-GLUE: eight generated tasks named after and shaped like GLUE's eight. Stand-ins, not GLUE.

One small world. Animals and people, each with a quality, do things to each other at places:

    the old dog chased the happy teacher in the garden .

and opinions: although the film was dull the song was not bad. Every concept has two words ("dog hound"), so two
sentences can say the same thing differently. In a pair both sentences have their words in the same order: an encoder
of three layers learns to compare them within a minute.

`examples(task, n, seed)` makes labeled rows; `corpus(n, seed)` unlabeled text of the same world, single sentences
and pairs that agree with each other, for pre-training. Equal arguments give equal rows on any machine.
"""

import random

ANIMALS = ["dog hound", "cat feline", "horse steed", "pig hog"]
PEOPLE = ["teacher tutor", "doctor physician", "lawyer attorney", "painter artist"]
NOUNS = ANIMALS + PEOPLE
VERBS = ["chase pursue", "help assist", "admire adore", "scare frighten"]
PLACES = ["garden yard", "forest wood", "street road", "shop store"]
QUALITIES = ["big large", "small little", "old elderly", "young youthful", "happy glad", "sad unhappy"]  # by opposites
THINGS = "film movie story song play book actor scene".split()
GOOD = "good great brilliant charming funny moving superb lovely".split()
BAD = "bad awful dull boring silly tedious dreadful ugly".split()
GLUE_WORDS = ". ? the this these which in near by was not but and although animal person area".split()

SLOTS = {
    "agent_is": QUALITIES,
    "agent": NOUNS,
    "act": VERBS,
    "patient_is": QUALITIES,
    "patient": NOUNS,
    "place": PLACES,
}
ASKABLE = ["agent", "patient", "place"]


def past(verb):
    return verb + ("d" if verb.endswith("e") else "ed")


# Every word that a sentence can hold, in a fixed order, without repetition
SINGULAR, INFINITIVE = " ".join(NOUNS).split(), " ".join(VERBS).split()
FORMS = [n + "s" for n in SINGULAR] + [v + "s" for v in INFINITIVE] + [past(v) for v in INFINITIVE]
VOCABULARY = GLUE_WORDS + SINGULAR + INFINITIVE + FORMS + " ".join(QUALITIES + PLACES).split() + THINGS + GOOD + BAD


# Scenes: a concept for every slot, said or asked about in words.


def new_scene(rng):
    scene = {slot: rng.choice(concepts) for slot, concepts in SLOTS.items()}
    scene["agent"], scene["patient"] = rng.sample(NOUNS, 2)
    return scene


def more_general(concept):
    return "area" if concept in PLACES else "animal" if concept in ANIMALS else "person"


def say(scene, rng, ask=None, general=0.0, specific=()):
    """The scene in words. `ask` names a slot to ask for with "which"; a noun or place that is not among `specific`
    becomes the more general word (dog: animal) with probability `general`."""
    word, the = {slot: rng.choice(concept.split()) for slot, concept in scene.items()}, dict.fromkeys(ASKABLE, "the")
    for slot in ASKABLE:
        if slot == ask or (slot not in specific and rng.random() < general):
            word[slot] = more_general(scene[slot])
    if ask:
        the[ask] = "which"
    subject = f"{the['agent']} {word['agent_is']} {word['agent']}"
    patient = f"{the['patient']} {word['patient_is']} {word['patient']}"
    return f"{subject} {past(word['act'])} {patient} in {the['place']} {word['place']} {'?' if ask else '.'}"


def change(scene, slots, rng):
    """Another scene that differs in these slots; "swap" makes agent and patient change places."""
    new = dict(scene)
    for slot in slots:
        if slot == "swap":
            new["agent"], new["patient"] = new["patient"], new["agent"]
        else:
            taken = (new["agent"], new["patient"], scene[slot])
            new[slot] = rng.choice([concept for concept in SLOTS[slot] if concept not in taken])
    return new


def some(slots, rng):
    """One of the slots, or in a third of the cases two."""
    return rng.sample(slots, rng.choice([1, 1, 2]))


# The eight tasks: each function draws one row (sentence, sentence or None, label).


def cola(rng, label=None):
    """Is it grammatical? The verb agrees with its subject, not with the noun beside it; this dog, these dogs."""

    def noun_phrase(plural):
        determiner = rng.choice(["the", "these" if plural else "this"])
        quality = [rng.choice(rng.choice(QUALITIES).split())] if rng.random() < 0.4 else []
        return [determiner, *quality, rng.choice(rng.choice(NOUNS).split()) + ("s" if plural else "")]

    label = rng.randrange(2) if label is None else label
    plural, object_plural = rng.random() < 0.5, rng.random() < 0.5
    subject, patient = noun_phrase(plural), noun_phrase(object_plural)
    verb = rng.choice(rng.choice(VERBS).split()) + ("" if plural else "s")
    beside = [rng.choice(["near", "by"]), *noun_phrase(rng.random() < 0.5)] if rng.random() < 0.3 else []
    place = ["in", "the", rng.choice(rng.choice(PLACES).split())] if rng.random() < 0.4 else []
    fault = None if label else rng.choice(["verb", "determiner", "order"])
    if fault == "verb":
        verb = verb + "s" if plural else verb[:-1]
    phrase, is_plural = rng.choice([(subject, plural), (patient, object_plural)])
    if fault == "determiner":
        phrase[0] = "this" if is_plural else "these"
    if fault == "order":
        i = rng.randrange(len(phrase) - 1)
        phrase[i], phrase[i + 1] = phrase[i + 1], phrase[i]
    return " ".join([*subject, *beside, verb, *patient, *place, "."]), None, label


def sst2(rng):
    """Is it praise? "not" turns a word round, and the clause after "but", or without "although", decides."""

    def clause(praise):
        turned = rng.random() < 0.4
        word = rng.choice(GOOD if praise != turned else BAD)
        return f"the {rng.choice(THINGS)} was {'not ' if turned else ''}{word}"

    label = rng.randrange(2)
    yes, also, no = clause(label), clause(label), clause(not label)
    shapes = [f"{yes}", f"{yes} and {also}", f"{no} but {yes}", f"{yes} although {no}", f"although {no} {yes}"]
    return rng.choice(shapes) + " .", None, label


def mrpc(rng):
    """Do two statements say the same?"""
    scene, label = new_scene(rng), rng.randrange(2)
    other = scene if label else change(scene, some([*SLOTS, "swap"], rng), rng)
    return say(scene, rng), say(other, rng), label


def qqp(rng):
    """Do two questions ask the same?"""
    scene, label, ask = new_scene(rng), rng.randrange(2), rng.choice(ASKABLE)
    other = scene if label else change(scene, some([slot for slot in SLOTS if slot != ask], rng), rng)
    return say(scene, rng, ask), say(other, rng, ask), label


def stsb(rng):
    """How much do two statements agree? The score is how many of five slots do, 0 to 5."""
    scene, score = new_scene(rng), rng.randrange(6)
    slots = ["agent_is", "agent", "act", "patient", "place"]
    return say(scene, rng), say(change(scene, rng.sample(slots, 5 - score), rng), rng), float(score)


def mnli(rng):
    """Does the first sentence entail (0), leave open (1) or contradict (2) the second? Opposites contradict."""
    scene, label = new_scene(rng), rng.randrange(3)
    if label == 0:
        return say(scene, rng), say(scene, rng, general=0.2), label
    if label == 1:
        slots = some(["agent", "act", "patient", "place"], rng)
        return say(scene, rng), say(change(scene, slots, rng), rng, general=0.2, specific=slots), label
    slot = rng.choice(["agent_is", "patient_is"])
    opposite = QUALITIES[QUALITIES.index(scene[slot]) ^ 1]
    return say(scene, rng), say({**scene, slot: opposite}, rng, general=0.2), label


def qnli(rng):
    """Does the second sentence answer the question (0) or not (1)?"""
    scene, label, ask = new_scene(rng), rng.randrange(2), rng.choice(ASKABLE)
    other = change(scene, some([slot for slot in SLOTS if slot != ask], rng), rng) if label else scene
    return say(scene, rng, ask), say(other, rng), label


def rte(rng):
    """Does the first sentence entail the second (0) or not (1)? The second may use a more general word."""
    scene, label = new_scene(rng), rng.randrange(2)
    slots = some(["agent", "act", "patient", "place"], rng) if label else []
    return say(scene, rng), say(change(scene, slots, rng), rng, general=0.2, specific=slots), label


TASKS = {"mini-" + f.__name__: f for f in (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte)}


def examples(task, n, seed=0):
    """n different rows (sentence, sentence or None, label) of a task."""
    rng, rows = random.Random(f"{task} {seed}"), {}
    while len(rows) < n:
        first, second, label = TASKS[task](rng)
        rows.setdefault((first, second), label)
    return [(*pair, label) for pair, label in rows.items()]


def corpus(n, seed=0):
    """n texts (sentence, sentence or None) without a false statement in them: what pre-training reads."""
    rng, rows = random.Random(f"corpus {seed}"), []
    for _ in range(n):
        scene, ask = new_scene(rng), rng.choice(ASKABLE)
        kind = rng.choices(["grammar", "opinion", "same", "general", "questions", "answer"], [8, 1, 4, 3, 1, 3])[0]
        if kind in ("grammar", "opinion"):
            rows.append(cola(rng, label=1)[:2] if kind == "grammar" else sst2(rng)[:2])
        else:
            first = say(scene, rng, ask if kind in ("questions", "answer") else None)
            second = say(scene, rng, ask if kind == "questions" else None, general=0.2 * (kind == "general"))
            rows.append((first, second))
    return rows
