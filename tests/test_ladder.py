"""The ladder from the published algorithm to ours: one change a rung, all rungs of one size, rows that add up."""

from dataclasses import asdict

import pytest
import torch
from strategies import make_layer
from torch import nn

from budget import FixedRanks, RankAllocator, Recipe, kept_density
from cli.flags import build_parser, recipe_of, settle
from experiments import arms, ladder, planted_ranks
from salora import adapt, salora_layers


def changes(one, other):
    first, second = asdict(one.recipe) | {"r0": one.r0}, asdict(other.recipe) | {"r0": other.r0}
    return {name for name in first if first[name] != second[name]}


def test_the_ladder_leads_from_the_papers_recipe_to_ours():
    rungs = ladder.ladder()
    assert rungs["paper"].recipe == Recipe.paper() and rungs["late"].recipe == Recipe.ours()
    assert rungs["wide"].recipe == arms.arm_of("ours-4").recipe and rungs["wide"].r0 == 16
    assert rungs["no gates"].recipe == arms.arm_of("svd-4").recipe


def test_a_rung_changes_one_thing():
    rungs = ladder.ladder()
    for name, rival in ladder.above(rungs).items():
        changed = changes(rungs[name], rungs[rival])
        if name == "budget rule":
            assert changed == {"rule", "survivors"}
        elif name == "restart":
            assert changed == {"restart", "dropout"}, "dropout is 0 in what the ladder trains"
        elif name in ("energy", "four cuts", "no gates, energy"):
            assert changed <= {"window"} and rungs[name].Allocator is not RankAllocator
        else:
            assert len(changed) == 1, (name, changed)
    assert ladder.above(rungs)["late"] == "restart" and ladder.above(rungs)["four cuts"] == "wide"


@pytest.mark.parametrize("name", ["paper", "canonical", "restart", "wide", "quadratic", "no gates"])
def test_flags_say_what_a_rung_is(name):
    rung = ladder.ladder()[name]
    settings = settle(build_parser().parse_args(ladder.flags_of(rung)))
    used = recipe_of(settings)
    assert asdict(used) | {"dropout": None} == asdict(rung.recipe) | {"dropout": None}
    assert settings.rank * settings.density == 4 and settings.alpha / settings.rank == 2


def network(rank):
    torch.manual_seed(0)
    return adapt(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), [r"\d"], rank, alpha=rank)


def train(model, rung, steps=40, density=None):
    """Returns the density kept after every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator, kept = rung.allocator(model, optimizer, steps, 0, density), []
    x, y = torch.randn(16, 6), torch.randn(16, 5)
    for step in range(steps):
        allocator.before_step(step)
        nn.functional.mse_loss(model(x), y).backward()
        allocator.after_backward()
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
        kept.append(kept_density(salora_layers(model)))
    allocator.finish()
    return kept


@pytest.mark.parametrize("name", [*ladder.ladder()])
def test_every_rung_ends_within_its_budget(name):
    rung, model = ladder.ladder()[name], network(4)
    kept = train(model, rung, density=0.5)
    if rung.recipe.rule == "budget":
        assert kept[-1] <= 0.5
    assert (kept[0], len(kept)) == (1, 40)


def test_four_cuts_remove_a_quarter_of_the_way_each():
    kept = train(network(5), ladder.ladder()["four cuts"], density=0.3)
    wanted = [1.0] * 8 + [0.3**0.25] * 4 + [0.3**0.5] * 4 + [0.3**0.75] * 4 + [0.3] * 20
    largest = 14 / (5 * (14 + 13))  # a triplet of the larger matrix
    assert all(want - largest <= kept <= want for want, kept in zip(wanted, kept))
    assert len(set(kept)) == 5


def test_four_cuts_warm_up_after_each():
    model = network(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = ladder.ladder()["four cuts"].allocator(model, optimizer, 1000, 0)
    dips = [step for step in range(1, 1000) if allocator.lr_factor(step) < allocator.lr_factor(step - 1) / 2]
    assert dips == [200, 300, 400, 500]


def test_energy_is_the_root_mean_square_of_what_a_triplet_adds_to_the_outputs():
    layer = make_layer(6, 5, 3, seed=0, dtype=torch.float32)
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.0)
    rung = ladder.ladder()["energy"]
    allocator = rung.allocator(model, optimizer, 20, 0, 0.5)
    x = torch.randn(50, 5) * torch.tensor([5.0, 1, 1, 0.1, 2])
    for step in range(9):
        allocator.before_step(step)
        if step < 8:
            model(x).sum().backward()
            allocator.after_backward()
            optimizer.step()
            allocator.after_step()
            optimizer.zero_grad()
    added = [torch.outer(layer.A[i] @ x.T, layer.B[:, i]) for i in range(3)]  # (50, 6) each
    energy = torch.stack([(part.square().sum(1).mean() / layer.triplet_size).sqrt() for part in added])
    gaps = layer.gate.log_theta - rung.recipe.spread * energy.log()
    assert torch.allclose(gaps, gaps.mean().expand(3), atol=1e-3), "log theta = spread log(energy) + constant"


def test_report_pairs_every_rung_with_the_one_above_it_over_shared_seeds():
    values = {"paper": [2.0, 3.0, 9.0], "budget rule": [1.5, 2.7], "no regularizer": [1.0]}
    rows = [
        {"rung": rung, "measure": "words", "seed": str(seed), "value": str(value)}
        for rung, some in values.items() for seed, value in enumerate(some)
    ]  # fmt: skip
    rows.append({"rung": "paper", "measure": "words", "seed": str(ladder.TUNE_SEED), "value": "77"})
    head, paper, rule, regularizer, *_ = ladder.report(rows, ladder.ladder()).splitlines()
    assert head.split() == ["words"] and paper.split() == ["paper", "4.6667"]
    assert rule.split() == ["budget", "rule", "2.1000", "-0.4000", "+-", "0.2000"], "-.5 and -.3: s.e. .1"
    assert regularizer.split() == ["no", "regularizer", "1.0000"], "one seed has no error"


def test_the_smallest_mean_of_both_kinds_is_chosen_on_the_tuning_seed():
    rung = ladder.ladder()["paper"]
    values = {(6e-3, 1): (2.0, 2.0), (6e-3, 2): (1.0, 2.5), (1.2e-2, 1): (0.1,)}  # the last has not seen both kinds
    rows = [
        {"rung": "paper", "rank": "4", "seed": str(ladder.TUNE_SEED), "lr": str(lr), "scale": str(scale), "value": v}
        for (lr, scale), some in values.items() for v in map(str, some)
    ]  # fmt: skip
    other = {"rung": "paper", "rank": "4", "seed": "0", "lr": "0.012", "scale": "1", "value": "0"}
    assert ladder.tuned([*rows, other], rung) == (6e-3, 2)
    with pytest.raises(ValueError, match="paper has not been tuned"):
        ladder.tuned([other], rung)


def test_rows_are_added_and_none_is_done_twice(tmp_path, monkeypatch, capsys):
    asked = []

    def learn(kind, steps, method, noise, seed, allocator_of):
        asked.append((kind, steps, method, noise, seed))
        return {"right": 0.5, "share": 1.0}

    monkeypatch.setattr(planted_ranks, "learn", learn)
    flags = ["planted", "--rungs", "paper", "wide", "restart", "--out", str(tmp_path)]
    for seeds in (["0"], ["0", "1"]):
        rows = ladder.main([*flags, "--seeds", *seeds])
    assert [(row["rung"], row["seed"]) for row in rows] == [(r, s) for s in "01" for r in ("paper", "restart")]
    assert asked == [("bank", 600, rung, 1.0, seed) for seed in (0, 1) for rung in ("paper", "restart")]


@pytest.mark.parametrize("flags, said", [
    (["plants"], "no measure plants"),
    (["tasks", "--tune"], "--tune is for shift alone"),
    (["shift", "--rungs", "wide"], "wide has not been tuned at this size"),
])  # fmt: skip
def test_bad_input_is_one_line(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ladder.main([*flags, "--out", str(tmp_path)])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_student_of_the_ladder_gets_the_allocator_of_its_rung():
    seen = []

    def allocator_of(network, optimizer, steps, density):
        seen.append(density)
        return FixedRanks(network, steps)

    row = planted_ranks.learn("bank", 2, "mine", 0.1, 0, allocator_of)
    assert 0 < seen[0] < 1 and set(row["learned"]) == {8}
