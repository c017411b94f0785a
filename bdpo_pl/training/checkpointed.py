"""The module's part of a checkpoint: the trained weights, the name of their model, and the results so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from bdpo_pl.data.packing import RowLayout
from bdpo_pl.data.splits import PreferenceSplits
from bdpo_pl.errors import InputError
from bdpo_pl.forward.masks import set_attention
from bdpo_pl.forward.prefix_sharing import PrefixSharing
from bdpo_pl.losses import PreferenceLoss
from bdpo_pl.models.adapters import LoraOptions, is_adapter
from bdpo_pl.models.checkpoint import RUN
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.models.reach import frozen_names
from bdpo_pl.models.tied import parameters_with_names
from bdpo_pl.parallel.context_parallel import shares_attention
from bdpo_pl.parallel.state import reshard, whole
from bdpo_pl.scoring.reestimation import Reestimation
from bdpo_pl.scoring.reference import Reference
from bdpo_pl.scoring.reference_sync import ReferenceSync
from bdpo_pl.training.checkpoints import keep_epoch_open
from bdpo_pl.training.optim import in_todays_groups
from bdpo_pl.training.schedule_free import averaged_weights
from bdpo_pl.training.watched import WatchedModule

_KEY = "bdpo_pl"


class CheckpointedModule(WatchedModule):
    """A module whose checkpoints hold only the trained weights, and which refuses checkpoints of another model.

    Attributes:
        source: model whose weights are trained.
        lora: options of the adapters; None: the whole model is trained.
        reestimation: comprehension measured on the policy.
        sync: updates of the reference from the policy.
        reference: reference; None until it is made.
        resumed_at: optimiser step of the checkpoint from which the run is resumed; None if it is not.
        prefix_sharing: choice to read a prompt once for all responses that follow it.
        compile_backend: backend for `torch.compile` of the layers; None: not compiled.
    """

    prefix_sharing: PrefixSharing
    compile_backend: str | None

    def __init__(
        self,
        loss: PreferenceLoss,
        source: ModelSource,
        lora: LoraOptions | None,
        reestimation: Reestimation,
        sync: ReferenceSync,
    ) -> None:
        super().__init__(loss)
        self.source = source
        self.lora = lora
        self.reestimation = reestimation
        self.sync = sync
        self.reference: Reference | None = None
        self.resumed_at: int | None = None
        self._splits: PreferenceSplits | None = None
        self._digests: dict[str, str] = {}
        self._layout: RowLayout | None = None
        if lora is not None:
            # Checkpoints hold the adapters alone; on_load_checkpoint makes sure that they hold all of them.
            self.strict_loading = False

    @property
    def splits(self) -> PreferenceSplits:
        """Pairs of all splits, after `setup` has read them."""
        if self._splits is None:
            raise RuntimeError("the pairs are not read yet: trainer.fit(module, datamodule) has them read")
        return self._splits

    def keep_pairs(self, splits: PreferenceSplits) -> PreferenceSplits:
        """Keep the pairs of a fit, and return them.

        Raises:
            InputError: the module holds scores of other pairs, from an earlier fit.
        """
        if splits is not self._splits:
            if self.reestimation.measured or (self.reference is not None and self.reference.scored):
                held, now = self._pairs_digests(), _digests_of(splits)
                if other := [name for name, digest in now.items() if held.get(name) != digest]:
                    raise InputError(
                        "this module has scored its pairs in an earlier fit, and these are others "
                        f"({', '.join(other)}): make a new PreferenceModule for them; to go on from the trained "
                        "policy, export it, and give the folder as policy"
                    )
            self._splits, self._digests = splits, {}
        return splits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the name of the model and the measurements so far; remove the weights that are not trained."""
        keep_epoch_open(self.trainer, checkpoint)
        checkpoint[_KEY] = {
            "policy": self.source.name,
            "revision": self.source.revision,
            "reestimation": self.reestimation.state_dict()
            | ({} if self.reestimation.every_n_steps is None else {"pairs": self._pairs_digests()}),
            "loss": self.loss.state_dict(),
            "estimator": self._estimator,
            "layout": self._layout_chosen(),
            **({"lora": None} if self.lora is None else self.lora.to_saved()),
            # Joined over all ranks, because the next line of the log shows their mean.
            "train_means": self.train_means.joined(self.trainer.strategy.reduce),
            "padding": self.throughput.joined(self.trainer.strategy.reduce, self.device),
            # The final table of a resumed run begins with these.
            "before": self.evaluations.get(0, {}),
        }
        if "optimizer_states" in checkpoint:
            checkpoint[_KEY]["reference_sync"] = self.sync.state_dict(self.reference)
        trained = self._trained_names()
        # If the weights are split, only rank 0 has them here.
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        if wanted := averaged_weights(self.trainer.optimizers):
            # The optimiser knows the parts of split weights, not those that are gathered.
            reshard(self.policy)
            for number, (names, _) in parameters_with_names(self).items():
                if number in wanted:
                    value = whole(wanted[number])
                    if held := [name for name in names if name in checkpoint["state_dict"]]:
                        # The device needs memory for a whole weight, so they are kept on the CPU.
                        checkpoint["state_dict"].update(dict.fromkeys(held, value.cpu()))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the measurements; refuse the checkpoint of another model.

        Raises:
            InputError: the checkpoint was written for another policy, or its reference would be lost.
        """
        saved = checkpoint.get(_KEY, {})
        _require_same_policy(
            saved, self.source.name, self.lora, self._trained_names() <= checkpoint["state_dict"].keys()
        )
        self.check_reference_sync(checkpoint)
        if self.lora is None and "optimizer_states" in checkpoint:
            states = checkpoint["optimizer_states"]
            checkpoint["optimizer_states"] = [in_todays_groups(state, self.policy) for state in states]
        self._take_up_layout(saved.get("layout"))
        self.resumed_at = checkpoint.get("global_step")
        other = self._other_estimator(checkpoint)
        if other is None:
            self.loss.load_state_dict(saved.get("loss", {}))
        elif found := self.loss.state_dict():
            rank_zero_info(
                f"What the loss measured is not taken from the checkpoint, whose estimator is {other}; by "
                f"{self._estimator}: {', '.join(f'{name} {value:.4g}' for name, value in found.items())}"
            )
        self.sync.load_state_dict(saved.get("reference_sync", {}), self.reference)
        if "reestimation" in saved and self.reestimation.every_n_steps is not None:
            self.reestimation.load_state_dict(self._still_valid(saved["reestimation"], other))
        if saved.get("before"):
            self.evaluations.setdefault(0, saved["before"])
        if "train_means" in saved and self.trainer.is_global_zero:
            self.train_means.take_up(saved["train_means"])
            self.throughput.take_up(saved.get("padding", [0, 0]))

    def check_reference_sync(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise `InputError` if the reference of `checkpoint` has followed the policy, and would now jump back."""
        if checkpoint.get(_KEY, {}).get("reference_sync") and self.sync.options.every is None:
            raise InputError(
                "the checkpoint holds a reference that has followed the policy, and without model.reference_sync.every "
                "it would be lost for the one of the start: set model.reference_sync.every as it was, or, to keep the "
                "reference where it is, to more steps than the run has"
            )

    def _layout_chosen(self) -> dict[str, str | None] | None:
        """Return the layout of rows, the attention that reads them, and what they were chosen for; None: not yet."""
        if self._layout is None:
            return None
        return {"rows": self._layout.value, "attention": self.policy.config._attn_implementation, **self._layout_needs}

    @property
    def _layout_needs(self) -> dict[str, str | None]:
        """What a choice of the layout depends on, beside the model and its pairs."""
        strategy, device = self.trainer.strategy, self.trainer.strategy.root_device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": f"torch {torch.__version__}, transformers {version('transformers')}",
            "strategy": type(strategy).__name__,
            "precision": str(self.trainer.precision),
            "compile": self.compile_backend,
            "prefix_sharing": self.prefix_sharing,
            "attn_implementation": self.source.attn_implementation,
            "together": str(shares_attention()),
        }

    def _take_up_layout(self, saved: Mapping[str, str | None] | None) -> None:
        """Take up the layout of a checkpoint, so that a resumed run rounds as the run before; it is not tried again.

        A trial on other weights, or on another day's clock, could choose another layout. Strategies that split the
        model read the checkpoint after the loader of the pairs has a layout: that one stays.
        """
        if saved is None or self._layout is not None:
            return
        if {name: saved.get(name) for name in self._layout_needs} != self._layout_needs:
            return
        attention = saved["attention"]
        assert attention is not None
        set_attention(self.policy, attention)
        self._layout = RowLayout(saved["rows"])

    def _pairs_digests(self) -> dict[str, str]:
        """Return a digest of the pairs of each split, which do not change in a run."""
        if not self._digests:
            self._digests = _digests_of(self.splits)
        return self._digests

    @property
    def _estimator(self) -> str | None:
        """Estimator of the comprehension that the loss reads; None if it reads none."""
        return self.loss.estimator if self.loss.needs_comprehension else None

    def _other_estimator(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Return the estimator of the run of `checkpoint` if it is not this run's, or `none`; None if it is."""
        # Checkpoints of an earlier version have it among the traits of the run, those of version 0.1 nowhere.
        traits = checkpoint.get(RUN, {}).get("traits", {})
        of_run = traits.get("loss.estimator", {}).get("value", self._estimator)
        was = checkpoint.get(_KEY, {}).get("estimator", of_run)
        return None if self._estimator is None or was == self._estimator else str(was).lower()

    def _still_valid(self, saved: Mapping[str, Any], other: str | None) -> dict[str, Any]:
        """Return the re-estimated comprehension in `saved` that is of the same pairs and by this run's estimator.

        Args:
            saved: state of the re-estimation.
            other: estimator by which it was measured, if that is not this run's.
        """
        # Checkpoints of an earlier version do not say which pairs were measured.
        digests = saved.get("pairs", self._pairs_digests())
        same = [name for name in saved["values"] if digests.get(name) == self._pairs_digests().get(name)]
        kept = {} if other is not None else {name: saved["values"][name] for name in same}
        if lost := sorted(saved["values"].keys() - kept.keys()):
            what = "of other pairs" if other is None else f"by the estimator {other}"
            rank_zero_info(
                f"The checkpoint's comprehension under the policy is {what} ({', '.join(lost)}); until it is measured "
                "again, these have that under the reference"
            )
        return {"step": saved["step"], "values": kept}

    def _trained_names(self) -> set[str]:
        """Return the names of the weights in a checkpoint: all that are trained; with LoRA, those of the adapters."""
        if self.lora is None:
            # Weights that text never reaches do not change, and FSDP2 does not gather them.
            return set(self.state_dict()) - {f"policy.{name}" for name in frozen_names(self.policy)}
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad or is_adapter(name)}


def _digests_of(splits: PreferenceSplits) -> dict[str, str]:
    return {name: table.content_digest() for name, table in splits.tables.items()}


def _require_same_policy(saved: Mapping[str, Any], name: str, lora: LoraOptions | None, whole: bool) -> None:
    """Raise `InputError` if a checkpoint was written for another policy or with other adapters.

    Args:
        saved: module's entry in the checkpoint.
        name: name of the policy.
        lora: options of the adapters that are trained now; None without adapters.
        whole: true if the checkpoint has every weight that is trained now.
    """
    if saved.get("policy", name) != name:
        raise InputError(f"the checkpoint holds weights of {saved['policy']}, but model.policy is {name}")
    adapters = None if lora is None else dataclasses.asdict(lora)
    # Checkpoints of an earlier version lack newer options, which had today's defaults then.
    written = None if saved.get("lora") is None else LoraOptions.from_saved(saved["lora"], saved.get("adapter_config"))
    if written != lora or not whole:
        raise InputError(
            f"the checkpoint was written with model.lora {saved.get('lora')}, but it is now {adapters}; "
            "resume with the options it was written with"
        )
