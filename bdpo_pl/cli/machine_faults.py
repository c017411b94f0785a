"""Remedies for failures of memory, a data worker or the disk in the middle of a run."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from bdpo_pl.errors import MachineError, first_line, is_out_of_memory

_LOWER = (
    "Lower one of these, the cheapest first: data.batch_size or data.max_tokens_per_batch (raise "
    "trainer.accumulate_grad_batches to keep the batch), model.scoring.batch_tokens if it was in the scoring pass, "
    "data.max_length. Or set model.gradient_checkpointing true, add model.lora, or split the model over more devices "
    "with trainer.strategy fsdp2. --dry_run true prints what a run will need"
)


def machine_error(error: BaseException) -> MachineError | None:
    """Return `error` as one that names a remedy, if it is a fault of the machine; else None."""
    if isinstance(error, MachineError):
        return error
    if is_out_of_memory(error):
        return MachineError(f"out of memory: {first_line(error)}. {_LOWER}")
    if (died := next(filter(_says_that_a_worker_died, _with_causes(error)), None)) is not None:
        return MachineError(
            f"a process that builds batches died: {first_line(died).rstrip('.')}. The system kills such processes when "
            "memory runs out: lower data.num_workers, or set it to 0; then resume with --ckpt_path last"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(
            f"the disk is full: {error}. Free space, or set trainer.logger.init_args.save_dir; then resume with "
            "--ckpt_path last"
        )
    return None


def _says_that_a_worker_died(error: BaseException) -> bool:
    said = r"DataLoader worker .*(killed by signal|exited unexpectedly)"
    return isinstance(error, RuntimeError) and re.search(said, str(error)) is not None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and the errors behind it: torch tells of a death amid any code, which may raise its own."""
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        yield behind
        behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)
