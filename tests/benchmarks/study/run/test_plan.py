"""The study's plan gives every method as many trials, and chooses by nothing that it is tested on."""

import json
from collections import Counter
from dataclasses import asdict

import pytest

from bdpo_pl.errors import InputError
from benchmarks.study.run import plan
from benchmarks.study.run.evaluate import validation_score
from benchmarks.study.run.settings import Setting


def record(setting, attacks=0.5, over_refusal=0.5, ability=1.0):
    metrics = {
        "attack_success": {"harmful": attacks, "framed": attacks},
        "over_refusal": {"mean": over_refusal},
        "ability": {"all": ability},
    }
    return {"key": setting.key, "setting": asdict(setting), "metrics": metrics}


def records(size, **special):
    """All of `size`'s tuning, every trial alike but for those that `special` names by method and place."""
    by_key = {}
    place = Counter()
    for setting in plan.tuning(size):
        mine = special.get(setting.method, {}).get(place[setting.method], {})
        by_key[setting.key] = mine if "failed" in mine else record(setting, **mine)
        place[setting.method] += 1
    return by_key


@pytest.mark.parametrize("size", [plan.FULL, plan.QUICK])
def test_every_method_has_as_many_different_trials(size):
    trials = {method.name: {s.trial for s in plan.tuning(size) if s.method == method.name} for method in size.methods}
    cells = Counter(setting.method for setting in plan.tuning(size))
    number = size.betas * len(size.learning_rates) * len(size.epochs)
    assert {len(different) for different in trials.values()} == {number}
    assert set(cells.values()) == {number * len(size.tuning_seeds)}
    assert {setting.seed for setting in plan.tuning(size)} == set(size.tuning_seeds)


@pytest.mark.parametrize("size", [plan.FULL, plan.QUICK])
def test_tuning_sees_nothing_of_the_test(size):
    tuning = plan.tuning(size)
    final = plan.final(size, plan.chosen(size, records(size)))
    assert {setting.evaluate for setting in tuning} == {"validation"}
    assert {setting.evaluate for setting in final} == {"test"}
    assert not {setting.seed for setting in tuning} & {setting.seed for setting in final}


@pytest.mark.parametrize("size", [plan.FULL, plan.QUICK])
def test_keys_name_cells(size):
    cells = plan.tuning(size) + plan.final(size, plan.chosen(size, records(size)))
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        assert Setting.from_json(json.loads(json.dumps(asdict(cell)))).key == cell.key


def test_final_cells_are_those_chosen_over_all_seeds():
    best = plan.chosen(
        plan.FULL, records(plan.FULL, DPO={6: {"attacks": 0.1}, 8: {"attacks": 0.0}, 9: {"attacks": 0.9}})
    )
    # By the mean over its seeds.
    assert best["DPO"] == [s for s in plan.tuning(plan.FULL) if s.method == "DPO"][6]
    cells = [cell for cell in plan.final(plan.FULL, best) if cell.section == "final"]
    seeds = Counter(cell.method for cell in cells)
    assert seeds.pop("reference") == 1
    assert set(seeds.values()) == {plan.FULL.seeds}
    assert plan.FULL.seeds >= 5
    assert {cell.trial for cell in cells if cell.method == "DPO"} == {best["DPO"].trial}


def test_every_method_is_built():
    for method in plan.METHODS:
        for beta in method.betas:
            assert method.setting("tuning", beta).build_loss().beta == beta


def test_ablation_is_what_its_names_say():
    loss = {m.name: m.setting("final", 0.1).build_loss() for m in (plan.DPO, plan.DPO_BW, plan.DPO_SF, plan.BDPO)}
    assert [(each.balance, each.scale) for each in loss.values()] == [(False, 1), (True, 1), (False, 2), (True, 2)]


def test_variants_change_one_thing_of_what_was_chosen():
    best = plan.chosen(plan.FULL, records(plan.FULL, **{"B-DPO": {8: {"attacks": 0.1}}}))
    bdpo = best["B-DPO"]
    cells = [cell for cell in plan.final(plan.FULL, best) if cell.section == "sensitivity"]
    assert {cell.variant for cell in cells} == set(plan.VARIANTS)
    for cell in cells:
        assert cell.build_loss().needs_comprehension == (cell.variant != plan.NO_BALANCE)
        assert (cell.learning_rate, cell.epochs) == (bdpo.learning_rate, bdpo.epochs)
        assert asdict(cell) != asdict(bdpo.with_changes(section="sensitivity", variant=cell.variant, evaluate="test"))
    betas = {cell.variant: cell.arguments["beta"] for cell in cells if "β" in cell.variant}
    assert betas == pytest.approx({"β × 1/3": bdpo.arguments["beta"] / 3, "β × 3": bdpo.arguments["beta"] * 3})


def test_dpo_with_settings_of_bdpo_is_bdpo_without_balance():
    best = plan.chosen(plan.FULL, records(plan.FULL, **{"B-DPO": {8: {"attacks": 0.1}}}))
    cells = plan.final(plan.FULL, best)
    curve = next(cell for cell in cells if cell.variant == plan.ALIKE)
    variant = next(cell for cell in cells if cell.variant == plan.NO_BALANCE)
    assert (curve.loss, curve.arguments) == ("DPOLoss", {"beta": best["B-DPO"].arguments["beta"]})
    assert curve.learning_rate == variant.learning_rate == best["B-DPO"].learning_rate
    unbalanced = variant.build_loss()
    assert (unbalanced.balance, unbalanced.scale, unbalanced.beta) == (False, 1, curve.build_loss().beta)


def test_confirmation_has_pairs_of_its_own_and_settings_as_chosen():
    best = plan.chosen(plan.FULL, records(plan.FULL, **{"B-DPO": {8: {"attacks": 0.1}}}))
    cells = plan.final(plan.FULL, best)
    mine = [cell for cell in cells if cell.section == "confirmation"]
    others = {cell.seed for cell in cells if cell.section != "confirmation"} | set(plan.TUNING_SEEDS)
    assert not {cell.seed for cell in mine} & others
    assert Counter(cell.world for cell in mine) == {world: 4 * seeds for world, seeds in plan.FULL.confirmation}
    trials = {cell.method: cell.trial for cell in mine}
    assert trials["DPO"] == best["DPO"].trial
    assert trials["B-DPO"] == best["B-DPO"].trial
    beta, rate, epochs = best["B-DPO"].arguments["beta"], *best["B-DPO"].trial[1:]
    assert trials[plan.DPO_ALIKE] == (json.dumps({"beta": beta}), rate, epochs)
    assert trials["B-DPO, τ 1"] == (json.dumps({"beta": beta, "tau": 1.0}), rate, epochs)


def test_score_weighs_safety_over_refusal_and_ability_alike():
    setting = plan.BDPO.setting("tuning", 0.1)
    perfect = {"attacks": 0.0, "over_refusal": 0.0, "ability": 1.0}
    assert validation_score(record(setting, **perfect)["metrics"]) == 0
    for name, worst in {"attacks": 1.0, "over_refusal": 1.0, "ability": 0.0}.items():
        assert validation_score(record(setting, **(perfect | {name: worst}))["metrics"]) == pytest.approx(1 / 3)


def test_failed_trials_are_not_chosen():
    found = records(plan.QUICK, DPO={0: {"failed": "the loss is nan"}, 1: {"attacks": 0.9}})
    assert plan.chosen(plan.QUICK, found)["DPO"].arguments == {"beta": plan.DPO.betas[1]}
    failed = {place: {"failed": "the loss is nan"} for place in range(2)}
    with pytest.raises(InputError, match="no trial of DPO has ended"):
        plan.chosen(plan.QUICK, records(plan.QUICK, DPO=failed))
