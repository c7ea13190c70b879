"""The paper's figures in miniature, what a step costs, and the animation of the gates."""

import json
from types import SimpleNamespace

import pytest
import torch

from cli import pictures
from experiments import cost, figures
from rank_allocator import Recipe
from salora import salora_layers

ITEMS = {  # some arms of every item that trains
    "fig1": ["lora-8-in-query", "lora-8-in-block-1", "lora-2"],
    "fig4": ["lora-2", "salora-4-to-2", "salora-4-to-2-paper-scaled"],
    "fig5": ["lora-1", "salora-8-to-1", "salora-8-to-1-paper-scaled", "svd-8-to-1"],  # the last without a style
    "fig7": ["salora-8-to-4", "salora-8-to-4-quadratic"],
    "table3": [f"salora-8-to-4-paper-scaled{change}" for change in ("", "-lambda-0", "-beta-0")],
}


@pytest.mark.parametrize("item", ITEMS)
def test_an_item_has_a_row_for_every_arm_and_figures_are_drawn(item, tiny_lm, tmp_path):
    rows = figures.main([item, "--arms", *ITEMS[item], *tiny_lm, "--seeds", "0", "--steps", "5"])
    tasks = ["words", "reverse"] if item == "table3" else ["words"]
    assert [(row["task"], row["arm"]) for row in rows] == [(task, arm) for task in tasks for arm in ITEMS[item]]
    assert (tmp_path / "out" / f"{item}.png").is_file() == (item != "table3")


@pytest.mark.parametrize("place, n", [("query", 2), ("block-1", 6)])
def test_figure_1_adapts_one_place_and_no_other(place, n, tiny_lm):
    args = SimpleNamespace(steps=2, texts=64)
    ranks = json.loads(figures.measure(args, "words", figures.arm_of(f"lora-8-in-{place}"), 0, (0.01, 1))["ranks"])
    adapted = [name for name, rank in ranks.items() if rank]
    assert len(adapted) == n and all(place.replace("block-", ".") in name for name in adapted)


def test_an_ablation_takes_away_only_what_it_names():
    paper, free, loose = (figures.arm_of(name) for name in ITEMS["table3"])
    assert paper.recipe == free.recipe == Recipe.paper_scaled() and loose.recipe == Recipe.paper_scaled(beta=0.0)
    trials = [figures.default_trial(None, "words", arm) for arm in (paper, free, loose)]
    assert trials == 3 * [figures.shift.TUNED["salora-8-to-4-paper-scaled"]]
    assert [arm.name for arm in (paper, free, loose)] == ITEMS["table3"]


def test_without_the_lagrangian_gates_learn_while_lambda_stays_0(tiny_lm):
    data, arm = figures.shift.data_of("words", 0, 64), figures.arm_of("salora-8-to-4-paper-scaled-lambda-0")
    model = figures.shift.model_of(arm, 2, 0)
    allocator = figures.shift.train(model, data, arm, 0.01, 0, 20)
    assert allocator.lagrangian.lam.item() == 0
    assert allocator.C_end != pytest.approx(11 / 12, abs=1e-3), "log_theta has moved"


@pytest.mark.parametrize("log_theta", [-3.0, 0.0, 1.5])
def test_the_density_integrates_to_the_probability_of_a_gate_inside_0_and_1(log_theta):
    log_theta = torch.tensor(log_theta, dtype=torch.float64)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    integral = torch.trapezoid(torch.stack([figures.density_of(log_theta, x) for x in t.tolist()]), t)
    inside = figures.prob_open(log_theta) - figures.prob_one(log_theta)
    torch.testing.assert_close(integral, inside, rtol=0, atol=1e-6)


def test_figure_3_samples_what_it_computes(tmp_path, capsys):
    figures.main(["fig3", "--out", str(tmp_path)])
    said = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert all(float(exact) == pytest.approx(float(found), abs=0.005) for *_, exact, _, found in said)
    assert (tmp_path / "fig3.png").stat().st_size > 5000


def test_the_gates_that_close_last_come_first_and_those_that_are_gone_stay_closed(tmp_path):
    phases = ["before", "window", "window", "after"]
    log_thetas = [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [-9.0, 9.0, 0.0], [9.0]]
    log = [{"step": str(i), "phase": phase, "C": "0.5"} for i, phase in enumerate(phases)]
    trace = [{"step": str(i), "layer": "encoder.layers.0.up", "rank": str(len(some)), "log_theta": json.dumps(some)}
             for i, some in enumerate(log_thetas)]  # fmt: skip
    before, first, last, after = (cells[0, "up"] for _, cells in pictures.open_probabilities(log, trace))
    assert before == [1, 1, 1] and after == [1, 0, 0]
    assert first == figures.prob_open(torch.tensor([2.0, 3.0, 1.0])).tolist() and last == sorted(last, reverse=True)
    pictures.draw_gates(log, trace, tmp_path / "gates.gif")
    assert (tmp_path / "gates.gif").read_bytes()[:4] == b"GIF8"


def test_a_run_for_the_animation_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    asked, run = [], tmp_path / "run"

    def main_job(flags):
        asked.append(flags)
        run.mkdir(exist_ok=True)
        (run / ("checkpoint.pt" if len(asked) == 1 else "summary.json")).touch()
        if len(asked) == 1:
            raise SystemExit(130)
        (run / "checkpoint.pt").unlink()

    monkeypatch.setattr(figures.train_glue_mini, "main", main_job)
    monkeypatch.setattr(figures, "draw_gates", lambda *_: None)
    with pytest.raises(SystemExit):
        figures.main(["gates", "--out", str(tmp_path)])
    for _ in range(2):
        figures.main(["gates", "--out", str(tmp_path)])
    assert asked == [["--trace", "--out", str(run)], ["--resume", str(run)]], "and what is finished is not run again"


@pytest.mark.parametrize("argv", [
    ["fig2"], ["fig3", "--steps", "5"], ["fig4", "--arms", "best-4"], ["fig1", "--arms", "lora-8-in-nowhere"],
    ["table3", "--arms", "lora-8-lambda-0"], ["table3", "--arms", "lora-8-beta-0"],
])  # fmt: skip
def test_what_means_nothing_is_one_line_and_exit_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        figures.main(argv)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_whole_run_weighs_the_phases_by_their_share_of_the_steps():
    assert cost.whole_run([10, 20, 30], Recipe.paper().window) == pytest.approx(0.2 * 10 + 0.3 * 20 + 0.5 * 30)


@pytest.mark.parametrize("recipe", cost.RECIPES)
def test_what_is_measured_is_in_its_phase(recipe):
    for phase, r, state in (("before", 8, "held"), ("window", 8, "free"), ("after", 4, "fixed")):
        step = cost.Stepper(f"{recipe} {phase}", "tiny", 2, "cpu")
        step()
        assert {(layer.r, layer.gate.state) for layer in salora_layers(step.model).values()} == {(r, state)}, phase


def test_every_arm_is_measured_once(tmp_path):
    flags = ["--shapes", "tiny", "--batches", "2", "--rounds", "1", "--out", str(tmp_path)]
    rows = cost.main(flags)
    assert [row["arm"] for row in rows] == [*cost.ARMS, *cost.PEFT, *cost.RECIPES]
    assert {row["ratio"] for row in rows if row["arm"] == "lora-8"} == {"1.0"} and cost.main(flags) == rows
