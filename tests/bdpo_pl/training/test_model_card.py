"""What the card of an exported model cites: the papers of the loss that was used, and the software."""

import re
from pathlib import Path

import pytest
import yaml

from bdpo_pl import losses
from bdpo_pl.losses import BalancedDPOLoss, BalancedLoss, DPOLoss, IPOLoss, LDLoss, SFTLoss, WeightedSum, WPOLoss
from bdpo_pl.training.model_card import ModelCard, settings_of

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
