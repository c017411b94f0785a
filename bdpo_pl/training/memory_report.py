"""The memory plan of a run in words: its assumptions, whether the run fits, and which options would reduce it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.table import Table

from bdpo_pl.console import get_console
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError, first_line
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.parallel.fsdp2 import ShardedStrategy
from bdpo_pl.reporting.format import size
from bdpo_pl.training.datamodule import PreferenceDataModule
from bdpo_pl.training.memory_plan import planned
from bdpo_pl.training.module import PreferenceModule
from bdpo_pl.training.start_checks import check_start, device_kind

_USABLE = 0.9
"""Share of a device's memory that a plan may use; the allocator and the process need the rest."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


class _Changes(TypedDict, total=False):
    """Options of `planned` that replace those of the run."""

    pairs: int
    gradient_checkpointing: bool
    activation_offloading: bool
    cpu_offload: bool
    lora: LoraOptions


class _Peak(Protocol):
    """Function that returns the peak in bytes with other options."""

    def __call__(self, **options: Unpack[_Changes]) -> int: ...


def dry_run(trainer: L.Trainer, module: PreferenceModule, data: PreferenceDataModule, reads_data: bool) -> None:
    """Print the memory plan, its assumptions and the options that would change it.

    Args:
        trainer: Trainer, for its strategy, precision and devices.
        module: module of the run.
        data: data module of the run.
        reads_data: read the pairs, and use their lengths.

    Raises:
        InputError: the run itself would refuse its options at its start, or there is no plan for its architecture.
    """
    check_start(module, trainer, data.max_length)
    longest = None
    if reads_data:
        loss = module.loss
        longest = data.read(module.source, order_by_safety=loss.needs_safety, single=loss.needs_labels).tables["train"]
    try:
        plan = planned(trainer, module, data, longest=longest)
    except InputError:
        raise
    except Exception as error:  # code of a model, which runs without values here, may fail in any way
        raise InputError(
            f"there is no memory plan for {module.source.name}: its forward pass does not run without weights "
            f"({type(error).__name__}: {first_line(error)}); leave out --dry_run to train it"
        ) from error
    memory = device_memory(trainer)
    console = get_console()
    console.print(plan.table())
    for line in assumptions(trainer, module, data, longest):
        console.print(line, highlight=False)
    console.print(verdict(plan.peak, memory), highlight=False)
    if plan.offloaded is not None:
        console.print(host_verdict(plan.offloaded.total, machine_memory()), highlight=False)
    console.print(options_table(trainer, module, data, longest, plan.peak, memory))


def assumptions(
    trainer: L.Trainer, module: PreferenceModule, data: PreferenceDataModule, longest: PairTable | None
) -> Iterator[str]:
    """Yield the assumptions of the plan, one sentence each."""
    batch = f"{data.batch_size} pairs" if data.max_tokens_per_batch is None else f"{data.max_tokens_per_batch:,} tokens"
    if longest is None:
        yield (
            f"Assumed: a micro-batch of {batch} that all fill the window of {data.truncation.max_length:,} tokens, "
            "half prompt and half response; with --data.train, the lengths of the data are used."
        )
    else:
        totals = longest.prompt_lengths + longest.chosen_lengths + longest.rejected_lengths
        yield (
            f"Assumed: a micro-batch of {batch} from the longest of {len(longest):,} training pairs; prompt and both "
            f"responses of the longest have {int(totals.max()):,} tokens."
        )
    trained = "all weights" if module.lora is None else module.lora.described
    checkpointing = "with" if module.gradient_checkpointing else "without"
    kept = [
        name
        for name, on in (
            ("weights, gradients and the optimiser's state", getattr(trainer.strategy, "cpu_offload", False)),
            ("activations", module.activation_offloading),
        )
        if on
    ]
    host = f"; {' and '.join(kept)} on the host" if kept else ""
    yield f"{trained}, precision {trainer.precision}, {checkpointing} gradient checkpointing{host}."


def verdict(peak: int, memory: int | None) -> str:
    """Say whether the plan fits into the device."""
    if memory is None:
        return f"The peak is {size(peak)}; the memory of this machine is unknown."
    fits = "fits" if peak <= _USABLE * memory else "does not fit"
    return f"The peak of {size(peak)} {fits} into a device of {size(memory)} ({peak / memory:.0%})."


def host_verdict(needed: int, memory: int | None) -> str:
    """Say whether what is kept on the host fits into the machine's memory."""
    if memory is None:
        return f"On the host, each machine needs {size(needed)}; the memory of this machine is unknown."
    fits = "fits" if needed <= _USABLE * memory else "does not fit"
    return (
        f"On the host, each machine needs {size(needed)}, which {fits} into {size(memory)} ({needed / memory:.0%}); "
        "pinned memory is rounded up, at most to twice as much."
    )


def options_table(
    trainer: L.Trainer,
    module: PreferenceModule,
    data: PreferenceDataModule,
    longest: PairTable | None,
    peak: int,
    memory: int | None,
) -> Table:
    """Return a table of options with the peak that each would lead to."""
    table = Table(title="What would change it", title_justify="left")
    for column in ("option", "peak", "fits"):
        table.add_column(column, justify="right" if column == "peak" else "left")
    for option, other in alternatives(trainer, module, data, longest, memory):
        fits = "" if memory is None or other is None else ("yes" if other <= _USABLE * memory else "no")
        table.add_row(option, "unknown" if other is None else f"{size(other)} ({(other - peak) / peak:+.0%})", fits)
    return table


def alternatives(
    trainer: L.Trainer,
    module: PreferenceModule,
    data: PreferenceDataModule,
    longest: PairTable | None,
    memory: int | None,
) -> Iterator[tuple[str, int | None]]:
    """Yield (option, peak in bytes) for options that reduce the peak, and for the largest batch that fits.

    The peak is None where it is unknown: the forward pass does not run without weights.
    """

    def peak(**options: Unpack[_Changes]) -> int:
        return planned(trainer, module, data, longest=longest, **options).peak

    if data.max_tokens_per_batch is None:
        yield from _batches(trainer, data.batch_size, peak, memory)
    for option, changes in _changes(trainer, module):
        try:
            found = peak(**changes)
        except InputError:
            # The run would refuse the option.
            continue
        except Exception:  # as in `dry_run`
            found = None
        yield option, found


def _batches(trainer: L.Trainer, pairs: int, peak: _Peak, memory: int | None) -> Iterator[tuple[str, int]]:
    """Yield (option, peak in bytes) for other micro-batches of as many pairs a step, or of more if none are summed."""
    summed = trainer.accumulate_grad_batches
    step = pairs * summed

    def option(part: int) -> str:
        number = max(1, step // part)
        more = "" if number == summed else f" --trainer.accumulate_grad_batches {number}"
        return f"--data.batch_size {part}{more}"

    sizes = [part for part in range(1, step + 1) if step % part == 0]
    if memory is not None:
        larger = [pairs * 2**k for k in range(1, 7)] if summed == 1 else []
        best = largest_batch(lambda part: peak(pairs=part), memory, [*sizes, *larger])
        if best is not None and best != pairs:
            yield f"{option(best)}: the largest that fits", peak(pairs=best)
    if smaller := [part for part in sizes if part <= pairs // 2]:
        yield option(smaller[-1]), peak(pairs=smaller[-1])


def _changes(trainer: L.Trainer, module: PreferenceModule) -> Iterator[tuple[str, _Changes]]:
    """Yield (option, arguments of `planned`) for options that reduce the peak."""
    recomputes = module.gradient_checkpointing
    if not recomputes:
        yield "--model.gradient_checkpointing true", {"gradient_checkpointing": True}
    yield from _on_the_host(trainer, module)
    if _can_be_adapted(trainer, module):
        yield "--model.lora.r 16", {"lora": LoraOptions()}
        if not recomputes:
            both: _Changes = {"lora": LoraOptions(), "gradient_checkpointing": True}
            yield "--model.lora.r 16 --model.gradient_checkpointing true", both


def _can_be_adapted(trainer: L.Trainer, module: PreferenceModule) -> bool:
    """Return true if this run could train adapters instead of all weights."""
    if module.lora is not None:
        return False
    adapted = copy.copy(module)
    adapted.lora = LoraOptions()
    try:
        check_start(adapted, trainer, None)
    except InputError:
        return False
    return True


def _on_the_host(trainer: L.Trainer, module: PreferenceModule) -> Iterator[tuple[str, _Changes]]:
    """Yield (option, arguments of `planned`) for what a GPU can leave to the host's memory."""
    if device_kind(trainer) != "cuda":
        return
    moves = not module.activation_offloading and module.compile_backend is None
    if moves:
        yield "--model.activation_offloading true", {"activation_offloading": True}
        if not module.gradient_checkpointing:
            both: _Changes = {"activation_offloading": True, "gradient_checkpointing": True}
            yield "--model.activation_offloading true --model.gradient_checkpointing true", both
    if _can_be_split(trainer, module):
        strategy = "--trainer.strategy bdpo_pl.parallel.fsdp2.ShardedStrategy --trainer.strategy.cpu_offload true"
        yield strategy, {"cpu_offload": True}
        if moves:
            held: _Changes = {"cpu_offload": True, "activation_offloading": True}
            yield f"{strategy} --model.activation_offloading true", held


def _can_be_split(trainer: L.Trainer, module: PreferenceModule) -> bool:
    """Return true if FSDP2 could keep the weights of this run on the host, and does not do so yet."""
    strategy = trainer.strategy
    if isinstance(strategy, ShardedStrategy):
        known = not strategy.cpu_offload and not strategy.splits_layers
    else:
        whole = module.sync.options.every is None and module.reestimation.every_n_steps is None
        known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and whole and module.reference_mode != "live"
    return known and module.quantization is None and not str(trainer.precision).startswith("16")


def largest_batch(peak: Callable[[int], int], memory: int, sizes: Iterable[int]) -> int | None:
    """Return the last of the ascending `sizes` before the `peak` outgrows `memory`; None if the first one does."""
    found = None
    for pairs in sizes:
        if peak(pairs) > _USABLE * memory:
            break
        found = pairs
    return found


def device_memory(trainer: L.Trainer) -> int | None:
    """Return the bytes of one GPU, or each process's share of the memory that the machine or container allows."""
    if device_kind(trainer) == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    memory = machine_memory()
    return None if memory is None else memory // max(1, trainer.num_devices)


def machine_memory() -> int | None:
    """Return the bytes of memory that this machine or container allows; None if they are unknown."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:
        limit = "max"
    return min(memory, int(limit) if limit.isdigit() else memory)


class WarnsOfMemory(L.Callback):
    """Warns before the scoring pass if the run will not fit into its device."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare the plan with the device's memory."""
        if stage != "fit":
            return
        assert isinstance(pl_module, PreferenceModule)
        splits = pl_module.read_pairs()
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        data, memory = trainer.datamodule, device_memory(trainer)  # type: ignore[attr-defined]
        try:
            plan = planned(trainer, pl_module, data, longest=splits.tables["train"])
        except Exception as error:  # a warning must not end a run; other ranks would wait for this one
            rank_zero_warn(
                f"whether this run fits into its device is not known beforehand: there is no memory plan for "
                f"{pl_module.source.name} ({type(error).__name__}: {first_line(error)})"
            )
            return
        host = machine_memory()
        if plan.offloaded is not None and host is not None and plan.offloaded.total > _USABLE * host:
            rank_zero_warn(
                f"this run will need {size(plan.offloaded.total)} of host memory on a machine of {size(host)}: see "
                "with --dry_run true what is kept there"
            )
        if memory is not None and plan.peak > _USABLE * memory:
            option = "batch_size" if data.max_tokens_per_batch is None else "max_tokens_per_batch"
            rank_zero_warn(
                f"this run will need {size(plan.peak)} on a device of {size(memory)}: lower data.{option}, or see with "
                "--dry_run true what each option saves"
            )
