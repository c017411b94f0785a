"""The best values before a stop: a resumed run goes on from them, or forgets those of another measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from bdpo_pl.training.safety_probe import SafetyProbe
from bdpo_pl.training.watched import WatchedModule


class KeepsBest(L.Callback):
    """Has a resumed run compare its validations with the best ones before the stop, as an uninterrupted run would.

    The checkpoints of these stay where they are: Lightning forgets the best one if the folder is another one, and
    removes none from there. Where validations measure something else from here on, `EarlyStopping` begins again too.
    """

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the saved state of each callback that chooses a best checkpoint, before Lightning restores it."""
        assert isinstance(pl_module, WatchedModule)
        saved = checkpoint.get("callbacks", {})
        suites = _other_suites(trainer, saved)

        def changed(monitor: str) -> str:
            found = [*pl_module.changed_measures, *suites.get(monitor, [])]
            return f"was measured on something else ({', '.join(found)})" if found else ""

        for callback in trainer.checkpoint_callbacks:
            state = saved.get(callback.state_key)
            if not isinstance(callback, ModelCheckpoint) or callback.monitor is None or callback.save_top_k == 0:
                continue
            if not state or not (before := state["best_model_path"]):
                continue
            other = changed(callback.monitor)
            kept = {} if other else _still_there(trainer, state["best_k_models"])
            state |= _state(callback, kept)
            if kept:
                score = f"{callback.monitor} {float(state['best_model_score']):.4f}"
                said = f"is {state['best_model_path']} ({score}); it stays the best one until a validation is better"
            else:
                why = other or "is no longer there"
                said = f"is {before}, which {why}: the best one is chosen from the validations that follow"
            rank_zero_info(f"The best checkpoint before the stop {said}")
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for stops in callbacks:
            if isinstance(stops, EarlyStopping) and stops.state_key in saved and (other := changed(stops.monitor)):
                del saved[stops.state_key]
                rank_zero_info(f"EarlyStopping begins again: its best {stops.monitor} before the stop {other}")


def _other_suites(trainer: L.Trainer, saved: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return, by the metric of safety, the options of prompts that are not those of the callbacks' `saved` state."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return {
        metric: [f"safety.{name}" for name in probe.changed_suites(saved.get(probe.state_key, {}))]
        for probe in callbacks
        if isinstance(probe, SafetyProbe)
        for metric in probe.logged
    }


def _still_there(trainer: L.Trainer, scores: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoints of `scores` that exist, by their path now: there, or beside the one that is resumed."""
    beside = Path(str(trainer.ckpt_path)).parent

    def found(path: str) -> str | None:
        here = [path] if "://" in path else map(str, filter(Path.exists, (Path(path), beside / Path(path).name)))
        return next(iter(here), None)

    # All ranks decide with what the first one sees, which alone writes.
    now = trainer.strategy.broadcast({path: found(path) for path in scores})
    return {place: score for path, score in scores.items() if (place := now[path]) is not None}


def _state(callback: ModelCheckpoint, scores: dict[str, Any]) -> dict[str, Any]:
    """Return the state of `callback` after it has chosen the best of `scores` for its own folder."""
    order = sorted(scores, key=lambda path: float(scores[path]), reverse=callback.mode == "max")
    if callback.save_top_k >= 0:
        order = order[: callback.save_top_k]
    full = bool(order) and len(order) == callback.save_top_k
    return {
        "dirpath": callback.dirpath,
        "best_model_path": order[0] if order else "",
        "best_model_score": scores[order[0]] if order else None,
        "best_k_models": {path: scores[path] for path in order},
        "kth_best_model_path": order[-1] if full else "",
        "kth_value": scores[order[-1]] if full else callback.kth_value,
        "last_model_path": callback.last_model_path,
    }
