"""What the card of an exported model cites: the papers of the loss that was used, and the software."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

from bdpo_pl import losses
from bdpo_pl.losses import BalancedDPOLoss, BalancedLoss, DPOLoss, IPOLoss, LDLoss, SFTLoss, WeightedSum, WPOLoss
from bdpo_pl.training.model_card import ModelCard, base_name, run_settings, settings_of

BDPO, DPO, RPO, IPO = "2603.22829", "2305.18290", "2404.19733", "2310.12036"
CITATION = Path(__file__).parents[3] / "CITATION.cff"
# Written out once more, not read from the docstrings.
PAPERS = {
    "APODownLoss": "2408.06266",
    "APOZeroLoss": "2408.06266",
    "AdaDPOLoss": "2605.28440",
    "BSOLoss": "2605.12339",
    "BalancedDPOLoss": BDPO,
    "CPOLoss": "2401.08417",
    "DPOLoss": DPO,
    "DrDPOLoss": "2407.07880",
    "HingeLoss": "2305.10425",
    "IPOLoss": IPO,
    "KTOLoss": "2402.01306",
    "RMiPOLoss": "2604.24804",
    "RobustDPOLoss": "2403.00409",
    "SafeDPOLoss": "2505.20065",
    "SigmoidNormLoss": "2411.15124",
    "SimPOLoss": "2405.14734",
}


class OwnLoss(DPOLoss):
    """A loss of someone's own.

    It was read next to arXiv:2305.18290, which is not its source.
    """


def card(loss):
    rows = [["accuracy", "8", "50 %", "60 %"]]
    return ModelCard("it", None, settings_of(loss), loss.papers(), {"loss": "as above"}, rows, 8, False).text()


def test_each_loss_names_its_paper():
    alone = {
        name
        for name in losses.__all__
        if name.endswith("Loss") and name not in ("PreferenceLoss", "BalancedLoss", "LDLoss", "SFTLoss", "WPOLoss")
    }
    assert alone == PAPERS.keys()
    # CPO is trained with the NLL of the chosen response by its paper.
    assert {name: getattr(losses, name)().papers() for name in alone} == {n: [paper] for n, paper in PAPERS.items()}


@pytest.mark.parametrize(
    ("loss", "papers"),
    [
        (DPOLoss(sft_weight=0.1), [DPO, RPO]),
        (BalancedDPOLoss(balance=False, scale=1.0), [DPO]),
        (BalancedDPOLoss(balance=False, scale=2.0), [BDPO]),
        (BalancedLoss(IPOLoss()), [BDPO, IPO]),
        (LDLoss(BalancedLoss(IPOLoss())), ["2409.06411", BDPO, IPO]),
        (WPOLoss(DPOLoss()), ["2406.11827", DPO]),
        (WeightedSum([DPOLoss(), SFTLoss(), DPOLoss(0.2)]), ["2411.10442", DPO]),
        (SFTLoss(), []),
        (OwnLoss(), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_card_cites_the_papers_of_its_loss_and_no_others(loss, papers):
    assert loss.papers() == papers
    text = card(loss)
    assert re.findall(r"\[arXiv:([0-9.]+)\]\(https://arxiv.org/abs/\1\)", text) == papers
    if BDPO not in papers:
        for word in (BDPO, "b-dpo", "Balanced Direct", "zhao"):
            assert word not in text
    if not papers:
        assert f"`{type(loss).__name__}`, names no paper" in text


class Renamed(DPOLoss):
    """A loss that keeps an argument under another name."""

    def __init__(self, inner, strength=2.0):
        super().__init__()
        self.inner, self.k = inner, strength


BALANCE = "tau=0.7, weighting=softmax, estimator=pmi, scale=2.0, max_weight_ratio=None"


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            WeightedSum([DPOLoss(beta=0.3), SFTLoss()], [1.0, 0.2]),
            "WeightedSum(losses=[DPOLoss(beta=0.3, label_smoothing=0.0, sft_weight=0.0), SFTLoss()], "
            "weights=[1.0, 0.2])",
        ),
        (BalancedLoss(IPOLoss(0.2), tau=0.7), f"BalancedLoss(loss=IPOLoss(beta=0.2), {BALANCE})"),
        (
            LDLoss(BalancedLoss(IPOLoss(0.2), tau=0.7), 0.4),
            f"LDLoss(loss=BalancedLoss(loss=IPOLoss(beta=0.2), {BALANCE}), alpha=0.4)",
        ),
        (WPOLoss(SFTLoss()), "WPOLoss(loss=SFTLoss())"),
        (losses.KTOLoss(0.2), "KTOLoss(beta=0.2, desirable_weight=1.0, undesirable_weight=1.0)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_loss_is_shown_as_a_call_of_its_constructor(loss, said):
    assert settings_of(loss) == said


def test_all_arguments_of_our_losses_are_found():
    for name in losses.__all__:
        kind = getattr(losses, name)
        if name.endswith("Loss") and name not in ("PreferenceLoss", "BalancedLoss", "LDLoss", "WPOLoss"):
            options = inspect.signature(kind).parameters
            assert re.findall(r"(\w+)=", settings_of(kind())) == list(options)


def test_a_loss_of_ones_own_shows_all_that_it_keeps():
    said = settings_of(Renamed(IPOLoss(0.2), 3.0))
    assert "inner=IPOLoss(beta=0.2)" in said
    assert "k=3.0" in said
    assert "beta=0.1" in said


def test_tau_that_was_measured_is_shown():
    for loss in (BalancedDPOLoss(tau="auto"), BalancedLoss(IPOLoss(), tau="auto")):
        loss.load_state_dict({"tau": 0.31234})
        assert "tau=auto (measured: 0.3123)," in settings_of(loss)
    both = WeightedSum([BalancedDPOLoss(tau="auto"), SFTLoss()])
    both.load_state_dict({"0.tau": 0.5})
    assert "tau=auto (measured: 0.5)," in settings_of(both)


def test_the_card_of_adapters_does_not_say_that_they_are_merged():
    facts = {"loss": "as above", "trained": "LoRA of rank 4, merged"}
    merged = ModelCard("it", None, "DPOLoss()", [], facts, [], None, False)
    assert "| trained | LoRA of rank 4, merged |" in merged.text()
    assert "| trained | LoRA of rank 4 |" in merged.of_adapter().text()


def test_a_short_warm_up_is_not_rounded_away(job):
    trainer, module, data = job(warmup_ratio=0.004)
    module.trainer = trainer
    trainer.strategy.optimizers = [module.optimizer([torch.nn.Parameter(torch.zeros(2))])]
    assert "warm-up 0.4%, weight decay" in run_settings(trainer, module, data)["optimiser"]


def test_a_folder_called_model_is_named_by_its_parent(tmp_path):
    for name in ("version_0/model", "version_0/model-2", "mine"):
        (tmp_path / name).mkdir(parents=True)
    found = [base_name(str(tmp_path / name)) for name in ("version_0/model", "version_0/model-2", "mine")]
    assert found == ["version_0", "version_0/model-2", "mine"]
    assert base_name("Qwen/model") == "Qwen/model"


def test_a_card_cites_the_software_as_the_project_does():
    cited = yaml.safe_load(CITATION.read_text(encoding="utf-8"))
    for loss in (BalancedDPOLoss(), losses.KTOLoss(), OwnLoss()):
        entry = card(loss).split("@software{bdpo_pl,")[1]
        assert f"title   = {{{cited['title']}}}," in entry
        assert f"author  = {{{{{cited['authors'][0]['name']}}}}}," in entry
        assert f"version = {{{cited['version']}}}," in entry


def test_a_card_of_balanced_dpo_says_what_is_reconstructed():
    text = card(BalancedDPOLoss())
    assert "tags:\n- dpo\n- b-dpo\n- preference-alignment\n- bdpo-pl\n---\n" in text
    assert text.count("@article") == 1
    assert "scaling factor are this project's reconstruction" in text
    assert "tags:\n- kto\n- preference-alignment\n- bdpo-pl\n---\n" in card(losses.KTOLoss())
