"""The paper's figures and tables in miniature: what is drawn is right, and nothing is run twice."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from strategies import make_layer

from budget import RankAllocator, Recipe
from experiments import cost, figures


@pytest.fixture
def flags(tiny_lm):
    """Those of runs of five steps."""
    return [*tiny_lm, "--seeds", "0", "--steps", "5", "--samples", "1000"]


@pytest.mark.parametrize(
    "item", ["fig1", "fig3", "fig5", "fig6", "fig7", "table3", pytest.param("fig4", marks=pytest.mark.slow)]
)
def test_an_item_writes_its_files_and_runs_nothing_twice(item, flags, tmp_path, monkeypatch, capsys):
    rows = figures.main([item, *flags])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{item}.csv", f"{item}.png"}
    assert f"{item}.csv" in capsys.readouterr().out
    monkeypatch.setattr(figures, "measure", None)  # calling it would be an error
    assert figures.main([item, *flags]) == rows, "what is there is not done again"


def test_another_seed_adds_rows(flags):
    first = figures.main(["table3", *flags])
    both = figures.main(["table3", *flags, "--seeds", "0", "1"])
    assert both[: len(first)] == first and len(both) == 2 * len(first)


@pytest.mark.parametrize("log_theta", [-3.0, 0.0, 1.5])
def test_the_density_integrates_to_the_probability_of_a_gate_inside_0_and_1(log_theta):
    log_theta = torch.tensor(log_theta, dtype=torch.float64)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    integral = torch.trapezoid(torch.stack([figures.density_of(log_theta, x) for x in t.tolist()]), t)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # stratified noise
    g = figures.sample_gate(log_theta, u)
    inside = ((g > 0) & (g < 1)).double().mean()
    torch.testing.assert_close(integral, inside, rtol=0, atol=2e-5)


def test_the_density_is_that_of_samples_and_masses_add_up_to_1(flags):
    rows = figures.main(["fig3", *flags, "--samples", "400000"])
    for row in rows:
        assert abs(float(row["exact"]) - float(row["sampled"])) < 0.04, row
    for log_theta in ("-2.0", "0.0", "2.0"):
        some = [row for row in rows if row["log_theta"] == log_theta]
        weights = [0.05 if row["part"] == "density" else 1 for row in some]  # a bin is 1/20 wide
        assert sum(w * float(row["sampled"]) for w, row in zip(weights, some)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("where, adapted", [("query", ["0.query", "1.query"]), ("block 1", 6), ("all", 12)])
def test_figure_1_adapts_one_place_and_no_other(flags, where, adapted):
    ranks = json.loads(figures.measure(figures.Run("lora", 8, where=where), 2, 64)["ranks"])
    found = [name for name, rank in ranks.items() if rank == 8]
    assert all(rank in (0, 8) for rank in ranks.values())
    if isinstance(adapted, list):
        assert [name.removeprefix("encoder.layers.") for name in found] == adapted
    else:
        assert len(found) == adapted and (where == "all" or all(".1." in name for name in found))


def test_an_ablation_takes_away_only_what_it_names():
    Allocator, recipe, tuned_as = figures.ARMS["paper"]
    assert (Allocator, recipe) == (RankAllocator, Recipe.paper())
    assert figures.ARMS["no Lagrangian"] == (figures.FreeGates, recipe, tuned_as)
    assert figures.ARMS["no orthogonality"] == (Allocator, Recipe.paper(beta=0), tuned_as)


def test_without_the_lagrangian_gates_learn_while_lambda_stays_0(flags):
    layer = make_layer(4, 3, 2, seed=0)
    model = torch.nn.Sequential(layer)
    lagrangian = figures.FreeGates(model, torch.optim.AdamW([layer.A, layer.B]), 10).lagrangian
    lagrangian(torch.tensor(1.0)).backward()
    lagrangian.ascend()
    assert lagrangian.lam.item() == 0
    row = figures.measure(figures.Run("no Lagrangian", 8, 0.5), 20, 64)
    assert row["C"] != pytest.approx(11 / 12, abs=1e-3), "log_theta has moved"


def test_a_run_that_diverges_is_a_row_with_an_infinite_loss(flags, monkeypatch, capsys):
    def diverges(*_, **__):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(figures.shift, "fit", diverges)
    for item in ("fig4", "fig7", "table3"):
        rows = figures.main([item, *flags])
        assert {row["loss"] for row in rows} == {"inf"}, item


def test_other_texts_are_other_runs(flags):
    first = figures.main(["fig7", *flags])
    assert len(figures.main(["fig7", *flags, "--texts", "96"])) == 2 * len(first)


def test_figure_6_shows_the_density_fall_and_lambda_rise_in_the_window(flags):
    rows = figures.main(["fig6", *flags, "--steps", "20"])
    for arm, lam_rises in (("paper", True), ("ours", False)):
        mine = [row for row in rows if row["arm"] == arm]
        window = [row for row in mine if row["phase"] == "window"]
        assert len(mine) == 20 and len(window) == (6 if arm == "paper" else 2)
        assert float(window[-1]["C"]) < 11 / 12 and (float(window[-1]["lam"]) > 0) == lam_rises
        assert all(float(row["orth_A"]) > 0 and float(row["orth_B"]) > 0 for row in window)


def test_table_4_weighs_the_phases_of_salora_by_their_share_of_a_run():
    values = {f"{recipe} {phase}": x for recipe in cost.RECIPES for phase, x in zip(cost.PHASES, (10.0, 20.0, 30.0))}
    assert set(values) < set(cost.arms())
    whole = cost.with_whole_runs(values, cost.weighted)
    assert whole == pytest.approx({**values, "paper": 0.2 * 10 + 0.3 * 20 + 0.5 * 30, "ours": 4 + 2 + 15})
    assert cost.with_whole_runs(values, cost.largest)["paper"] == 30


@pytest.mark.parametrize("recipe", cost.RECIPES)
def test_what_table_4_measures_is_in_its_phase(recipe):
    for phase, r, free in (("open", 8, False), ("window", 8, True), ("pruned", 4, False)):
        step = cost.Stepper(f"{recipe} {phase}", "tiny", 2, "cpu")
        step()
        layers = step.allocator.layers.values()
        assert all(layer.r == r and (layer.gate.fixed is None) == free for layer in layers), phase


def test_table_4_measures_every_arm_once(flags, monkeypatch, capsys):
    monkeypatch.setattr(cost, "memory_of", lambda names, *_: dict.fromkeys(names, 100.0))
    short = ["table4", "--shapes", "tiny", "--batches", "2", "--rounds", "1", *flags]
    rows = figures.main(short)
    assert {"frozen", "lora", "paper", "ours window", "ours"} <= {row["arm"] for row in rows}
    assert all(float(row["ms"]) > 0 and row["memory_ratio"] == "1.0" for row in rows)
    assert figures.main(short) == rows, "what is there is not done again"


@pytest.mark.parametrize("missing", [1, 4])
def test_table_4_goes_on_where_arms_are_missing(flags, monkeypatch, tmp_path, missing):
    """Of an interrupted run, or of a machine without PEFT."""
    monkeypatch.setattr(cost, "memory_of", lambda names, *_: dict.fromkeys(names, 100.0))
    short = ["table4", "--shapes", "tiny", "--rounds", "1", *flags]
    figures.main([*short, "--batches", "2", "3"])
    path = tmp_path / "out/table4.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-missing]) + "\n")
    arms = {(row["batch_size"], row["arm"]) for row in figures.main([*short, "--batches", "2"])}
    assert ("2", "ours") in arms and ("3", "ours") not in arms
    assert ("3", "ours") in {(row["batch_size"], row["arm"]) for row in figures.main([*short, "--batches", "3"])}


def test_a_device_that_is_not_there_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        figures.main(["table4", *flags, "--device", "cuda:99"])
    assert stopped.value.code == 2 and "no device 'cuda:99' here" in capsys.readouterr().err


class PoolHere:
    """Calls in this process what a pool would call in another, which starts with the same environment."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def starmap(self, function, calls, chunksize):
        return [function(*arguments) for arguments in calls]


def test_memory_is_measured_where_free_memory_goes_back_at_once(monkeypatch):
    monkeypatch.setattr(cost, "get_context", lambda _: SimpleNamespace(Pool=lambda *_, **__: PoolHere()))
    assert cost.in_processes(os.getenv, [("MALLOC_TRIM_THRESHOLD_",)]) == ["0"]
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    """Without that, a large batch would leave its peak to the small one after it."""
    large, small = cost.in_processes(cost.peak_memory, [("lora", "tiny", size, "cpu") for size in (256, 1)])
    assert large > small + 20
    assert len(set(cost.in_processes(os.getpid, [()] * 3)) - {os.getpid()}) == 3


def test_an_unknown_item_is_one_line_and_exit_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        figures.main(["fig2"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "fig2" in last and "fig3" in last
