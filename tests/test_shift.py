"""The studies on a language that shifts, and SaLoRA beside its peers: data, arms and what is measured."""

import json
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from main_job import spoiled_update
from strategies import installed_parameters

import train_glue_mini
from cli.files import digest_of
from experiments import arms, compare, ladder, plots, shift
from experiments.arms import PLACEMENTS, arm_of, shuffled
from experiments.study import TUNE_SEED
from glue.tasks import load_task
from glue.tokens import collate
from peers import METHODS
from peers.sora import SoRA
from rank_allocator import Recipe
from salora import salora_layers

D, M, LAYERS, WORDS, POSITIONS = 16, 32, 2, 130, 48  # of the small masked LM
LORA_1 = LAYERS * (4 * 2 * D + 2 * (D + M))  # parameters
BLOCK = 4 * (D * D + D) + 2 * D * M + M + D + 2 * 2 * D
PLACED = [f"lora-4{placement}" for placement in PLACEMENTS]
CLOSED_FORMS = {
    "lora-4": 4 * LORA_1,
    "adapter-h-5": installed_parameters("adapter-h", 5, LAYERS, D, M),
    "adapter-p-5": installed_parameters("adapter-p", 5, LAYERS, D, M),
    "prefix-3": installed_parameters("prefix", 3, LAYERS, D, M),
    "prompt-3": installed_parameters("prompt", 3, LAYERS, D, M),
    "bitfit": installed_parameters("bitfit", 0, LAYERS, D, M),
    "ia3": installed_parameters("ia3", 0, LAYERS, D, M),
    "full": LAYERS * BLOCK + (WORDS + POSITIONS + 2) * D + 2 * D,
    "child-tuning": LAYERS * BLOCK + (WORDS + POSITIONS + 2) * D + 2 * D,
    "head": 0,
    "mam-5": installed_parameters("mam", 5, LAYERS, D, M),
    "propelt-adapter-5": installed_parameters("propelt-adapter", 5, LAYERS, D, M),
    "propelt-prefix-3": installed_parameters("propelt-prefix", 3, LAYERS, D, M),
    "propelt-lora-4": installed_parameters("propelt-lora", 4, LAYERS, D, M),
    "qlora-4": 4 * LORA_1,
}


def test_shifts_are_permutations_of_the_words():
    texts = shift.mini.corpus(200, "test")
    for task, shifted in shift.SHIFTS.items():
        new = shifted(texts, random.Random(0))
        sentences = [(a.split(), b.split()) for old, text in zip(texts, new) for a, b in zip(old, text) if a]
        pairs = {pair for a, b in sentences for pair in zip(a, b[::-1] if task == "reverse" else b, strict=True)}
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs), "one word for each word"
        assert (new == texts) == (task == "chance")


def test_a_seed_draws_the_language_and_every_arm_guesses_the_same_words_of_it(tiny_lm, monkeypatch):
    """Of the same texts, which a seed draws as well."""
    corpus, guessed = shift.mini.corpus(104, "test"), []

    def fit(model, batches, *_, batch_of, **more):
        guessed.append(digest_of([batch_of([batch]) for batch in batches]))

    monkeypatch.setattr(shift.mini, "corpus", lambda n, seed: corpus)
    monkeypatch.setattr(shift, "fit", fit)
    languages, held_out = [], []
    for seed, arm, drawn_before in ((0, "lora-4", 0), (0, "salora-8-to-4", 3), (1, "lora-4", 0)):
        data = shift.Data("words", seed, 64)
        languages.append(sorted(ids for batch in data.train for ids, *_ in batch))
        held_out.append(digest_of(data.held_out))
        for _ in range(drawn_before):
            data.batch_of(data.train[:1])
        shift.train(None, data, arm_of(arm), 0.01, seed, 8)
    for one, again, other in (languages, held_out, guessed):
        assert one == again != other


def test_child_tuning_chooses_by_all_batches_and_then_guesses_the_same_words_as_every_arm(tiny_lm):
    data, model = shift.Data("words", 0, 64), shift.model_of(arm_of("child-tuning"), 1, 0)
    data.generator.manual_seed(3)
    expected = digest_of(data.batch_of(data.train[:1]))
    losses = list(shift.losses_on(data.train, data, model, 3))
    assert len(losses) == len(data.train) and all(loss.requires_grad and loss > 0 for loss in losses)
    assert digest_of(data.batch_of(data.train[:1])) == expected
    rows = compare.main(["--tasks", "words", "--arms", "child-tuning", "--seeds", "0", *tiny_lm])
    assert len(rows) == 1 and float(rows[0]["loss"]) > 0


def test_only_in_the_negative_control_the_words_to_be_guessed_are_others(tiny_lm):
    for task in shift.SHIFTS:
        data = shift.Data(task, 0, 64)
        ids, *_ = collate(data.train[0], data.tokenizer.pad)
        (_, _, _, hidden), labels = data.batch_of(data.train[:1])
        right = (labels == ids[hidden]).float().mean()
        assert right < 0.2 if task == "chance" else right == 1
        assert (labels > data.tokenizer.mask).all(), "and they are words"


@pytest.mark.parametrize("name", ["lora-4", "salora-16-to-4", "adalora-8-to-4"])
def test_the_scale_of_an_update_is_that_of_the_trial_whatever_the_rank(name, tiny_lm):
    layers = salora_layers(shift.model_of(arm_of(name), 3, 0)).values()
    assert {(layer.r0, layer.scale) for layer in layers} == {(arm_of(name).start, 3)}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_every_arm_trains_what_it_says_and_only_one_the_head_of_the_masked_lm(name, tiny_lm):
    model = shift.model_of(arm_of(name), 1, 0)
    assert shift.parameters_of(model) == CLOSED_FORMS[name]
    assert sum(p.numel() for p in model.encoder.parameters() if p.requires_grad) == CLOSED_FORMS[name]
    assert {p.requires_grad for p in model.lm_head.parameters()} == {name == "head"}


def test_runs_end_at_their_size_and_are_drawn_against_it(tiny_lm, tmp_path):
    sizes = {"lora-8": 1, "lora-4": 0.5, "salora-16-to-4": 0.5, "svd-16-to-1": 1 / 8}
    sizes["bitfit"] = CLOSED_FORMS["bitfit"] / (8 * LORA_1)
    rows = shift.main(["--tasks", "words", "--arms", *sizes, "--seeds", "0", "1", *tiny_lm])
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in "01" for arm in sizes]
    slack = {arm: 0.02 if "-to-" in arm else 1e-4 for arm in sizes}  # less than a triplet of this small model
    assert all(-slack[row["arm"]] <= float(row["size"]) - sizes[row["arm"]] <= 1e-4 for row in rows)
    assert len({row["loss"] for row in rows}) == len(rows), "seeds and arms differ"
    assert [row["trial"] for row in rows[:2]] == ["0.006:4", "0.012:2"], "the tuned ones"
    assert (tmp_path / "out" / "shift.png").stat().st_size > 5000
    assert plots.loss_by_size([row for row in rows if row["arm"] != "lora-8"]) is None, "nothing to compare with"


def test_arms_of_one_size_are_compared_with_lora_of_that_size_and_of_twice_that():
    names = [*shift.TUNED, *PLACED, "bitfit"]
    wanted = ["lora-4", "lora-4-restart", "lora-8", "lora-8-restart", "svd-16-to-4"]
    assert shift.rivals("salora-8-to-4", names) == shift.rivals("bitfit", names) == wanted
    assert shift.rivals("salora-16-to-.5", names) == ["lora-1", "lora-1-restart", "svd-16-to-.5"]
    assert shift.rivals("lora-4", names) == shift.rivals("lora-4-uniform", names) == []
    assert shift.rivals("lora-4-found", names) == ["lora-4-shuffled", "lora-4-uniform"]


def test_alora_scores_ranks_on_texts_that_it_does_not_train_on_the_same_in_every_run(tiny_lm, monkeypatch):
    found, score_on = [], shift.score_on

    def look(batches, data, model):
        score = score_on(batches, data, model)
        found.append(score())
        assert batches == data.train[-1:] and score() == found[-1] < 0 and model.training
        monkeypatch.setattr(data, "batch_of", lambda some, *rest: seen.extend(some) or type(data).batch_of(data, some))
        return score

    monkeypatch.setattr(shift, "score_on", look)
    for drawn_before in (0, 3):
        data, seen = shift.Data("words", 0, 96), []
        for _ in range(drawn_before):
            data.batch_of(data.train[:1])
        shift.train(shift.model_of(arm_of("alora-8-to-4"), 2, 0), data, arm_of("alora-8-to-4"), 0.01, 0, 8)
        assert {id(batch) for batch in seen} == {id(batch) for batch in data.train[:-1]}
    assert found[0] == found[1], "the same words are hidden"


def test_shuffled_ranks_stay_among_matrices_of_one_shape():
    ranks = [*range(6), 10, 11, 12, 13]
    new = shuffled(ranks, ["square"] * 6 + ["wide"] * 4, random.Random(0))
    assert sorted(new[:6]) == ranks[:6] and sorted(new[6:]) == ranks[6:] and new != ranks


def test_transplanted_ranks_are_those_of_salora_on_the_same_seed(tiny_lm, capsys):
    flags = ["--tasks", "words", "--seeds", "0", "1", *tiny_lm]
    with pytest.raises(SystemExit):
        shift.main(["--arms", "lora-4-found", *flags])
    assert "lora-4-found needs the ranks of salora-16-to-4 on words, seed 0: run that arm" in capsys.readouterr().err
    rows = shift.main(["--arms", "salora-16-to-4", *PLACED, *flags])
    for seed in "01":
        source, found, shuffled, uniform = (json.loads(row["ranks"]) for row in rows if row["seed"] == seed)
        assert found == source and sorted(shuffled) == sorted(source) and set(uniform) == {4}
    assert {row["trial"] for row in rows[1:4]} == {"0.012:2"}, "that of lora-4"


def test_a_seed_decides_how_ranks_are_shuffled(tiny_lm, monkeypatch):
    arm, found = arm_of("lora-4-shuffled"), []
    monkeypatch.setattr(arms, "rows_with", lambda *_, **more: [{"ranks": json.dumps([*range(12)])}])
    for seed in (0, 0, 1):
        model = shift.model_of(arm, 1, 0)
        arms.place_ranks(SimpleNamespace(table=None), "words", arm, seed, model)
        found.append(arms.ranks_of(model))
    one, again, other = found
    assert one == again != other and sorted(one) == sorted(other) == [*range(12)]


def test_the_ladder_leads_from_the_papers_recipe_to_ours_by_one_change_a_rung(tmp_path, capsys):
    rungs = ladder.RUNGS
    assert rungs["salora-8-to-4-paper"].recipe == Recipe.paper() and rungs["salora-8-to-4"].recipe == Recipe.ours()
    changed = {}
    for name in list(rungs)[1:]:
        [above] = ladder.above(name, rungs)
        one, other = ({**asdict(rungs[arm].recipe), "start": rungs[arm].start} for arm in (above, name))
        changed[name] = {key for key in one if one[key] != other[key]}
    assert changed.pop("salora-8-to-4-until-budget-rule") == {"rule", "survivors"}
    assert changed.pop("salora-8-to-4-window-.2-.5") == {"restart", "dropout"}, "there is no dropout to leave out"
    assert all(len(keys) == 1 for keys in changed.values()), changed
    assert {rung.size for rung in rungs.values()} == {4}
    assert ladder.above("svd-16-to-4", rungs) == ladder.above("salora-16-to-4-quadratic", rungs) == ["salora-16-to-4"]
    with pytest.raises(SystemExit):
        ladder.main(["--arms", "lora-4", "--out", str(tmp_path)])
    assert "'lora-4' is not a rung" in capsys.readouterr().err


def test_the_comparison_has_every_method_with_as_many_trials():
    known = [arm_of(name) for name in compare.ARMS]
    outside = {name for name, trial in shift.TUNED.items() if trial not in shift.GRID}
    assert outside == {"adalora-8-to-4"}, "whose best has a larger scale than any other arm can bear"
    assert {arm.method for arm in known} == set(METHODS)
    for study, count in ((compare.STUDY, 5), (compare.ON_GLUE, 3), (compare.ON_SHIFT, 10)):
        grids = {arm.name: study.trials(None, study.tasks[0], arm) for arm in known}
        assert {len(set(grid)) for grid in grids.values()} == {count}
        inside = [arm for arm in known if arm.name not in outside]
        assert all(study.default(None, study.tasks[0], arm) in grids[arm.name] for arm in inside)
    assert set(shift.GRID) < set(compare.WIDE)


@pytest.mark.parametrize("name", ["sora-8", "sora-8-eq-10"])
def test_soras_thresholds_add_up_to_its_reach(tiny_lm, name):
    lam, total = compare.lambda_of(0.8, arm_of(name), 0.01, 70), 0.0
    model = shift.model_of(arm_of("sora-8"), 1, 0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    sora = arm_of(name).allocator(model, optimizer, 70, 0, sparse_lambda=lam)
    for step in range(70):
        sora.step, optimizer.param_groups[-1]["lr"] = step, 0.01 * sora.lr_factor(step)
        total += sora.threshold()
    assert isinstance(sora, SoRA) and total == pytest.approx(0.8)


@pytest.fixture
def flags(tiny_weights, monkeypatch, tmp_path):
    """Flags of a short run; 200 rows of a generated task stand in for the rows of every task."""
    rows = compare.mini.examples("mini-rte", 200)
    monkeypatch.setattr("cli.settings.mini_encoder", lambda **_: tiny_weights)
    monkeypatch.setattr(compare, "load_task", lambda task, folder: (rows[:100], rows[100:]))
    monkeypatch.setattr(compare, "fresh_rows", lambda task: [("the dog", "the cat", 1)] * 8)
    return ["--seeds", "0", "--rows", "32", "--steps", "8", "--device", "cpu", "--out", str(tmp_path)]


def test_the_comparison_counts_parameters_without_heads(flags):
    names = ["salora-8-to-4", "lora-4", "alora-8-to-4", "sora-8", "ia3", "head", "child-tuning"]
    rows = compare.main(["--tasks", "mini-rte", "--arms", *names, *flags])
    found = {row["arm"]: (int(row["trained"]) / LORA_1, int(row["final"]) / LORA_1) for row in rows}
    assert found["lora-4"] == (4, 4) and found["head"] == (0, 0) and found["ia3"][0] == CLOSED_FORMS["ia3"] / LORA_1
    assert found["salora-8-to-4"][0] == 8 and 3.7 < found["salora-8-to-4"][1] <= 4


def test_generated_tasks_are_tuned_on_dev_rows_and_reported_on_rows_after_them(flags, monkeypatch):
    assert compare.rows_of("mini-rte", None, 0)[1] == compare.fresh_rows("mini-rte")
    assert compare.rows_of("mini-rte", None, TUNE_SEED) == compare.load_task("mini-rte", None)
    monkeypatch.undo()
    rows = [row[:2] for part in (*load_task("mini-rte"), compare.fresh_rows("mini-rte")) for row in part]
    assert len(set(rows)) == len(rows) == 4000 + 1000 + compare.FRESH_ROWS


def test_official_tasks_are_tuned_on_held_out_training_rows_and_reported_on_dev_rows(flags, tiny_weights, capsys):
    train, dev = compare.load_task("rte", "x")
    assert compare.rows_of("rte", "x", 0) == (train, dev)
    kept, held_out = compare.rows_of("rte", "x", TUNE_SEED)
    assert held_out == train[::10] and sorted(kept + held_out) == sorted(train)
    official = ["--tasks", "rte", "--arms", "lora-4", *flags]
    with pytest.raises(SystemExit):
        compare.main(official)
    assert "a run needs --data and --weights" in capsys.readouterr().err


def test_a_run_trains_on_as_many_rows_as_asked_for_and_alora_holds_out_an_eighth(flags, monkeypatch):
    args, seen = compare.STUDY.parser().parse_args(flags), []
    monkeypatch.setattr(compare, "fine_tune", lambda model, rows, _, allocator, **more: seen.append((rows, allocator)))
    for name in ("lora-4", "alora-8-to-4"):
        compare.measure(args, "mini-rte", arm_of(name), 0, (0.01,))
    (rows, _), (kept, allocator) = seen
    assert len(rows) == 32 and kept == rows[:28]
    monkeypatch.setattr(train_glue_mini, "loss_of", lambda model, some: len(some) / 10 if some == rows[28:] else 99)
    assert allocator.score() == -0.4, "the negative loss of the others"


def test_a_run_has_the_settings_of_the_main_job(flags):
    args = compare.STUDY.parser().parse_args([*flags, "--precision", "bf16"])
    lora, full = (compare.settings_of(args, "mini-rte", arm_of(name), 3, (0.01,)) for name in ("lora-16", "full"))
    assert (lora.rank, lora.alpha, lora.dropout, lora.precision) == (16, 32, [0, 0], "bf16")
    assert (full.lr, full.seed, full.steps, full.rank) == (0.01, 3, 8, None)
    assert compare.measure(args, "mini-rte", arm_of("lora-4"), 0, (0.01,))["score"] in (0, 1), "fresh rows are alike"


def test_a_run_that_diverges_in_its_last_update_has_the_worst_score_and_no_other_value(flags, capsys):
    """Predictions of NaN would have a score."""
    with spoiled_update(8):
        [found] = compare.main(["--tasks", "mini-rte", "--arms", "lora-4", *flags])
    assert (found["score"], found["trained"], found["final"], found["ms"]) == ("-inf", "", "", "")
    assert found["steps"] == "8" and found["trial"] == "0.002"
    said = capsys.readouterr().out
    assert "mini-rte, lora-4, 0: -inf (weights are not finite at step 8: try a smaller --lr), " in said
    assert "diverged, and in no mean: lora-4 on mini-rte, seed 0" in said


def test_the_comparison_on_a_shift_is_by_loss(tiny_lm):
    rows = compare.main(["--tasks", "words", "--arms", "salora-8-to-4", "sora-8", "--seeds", "0", *tiny_lm])
    assert [row["trained"] for row in rows] == 2 * [str(8 * LORA_1)] and "loss" in rows[0]
