"""Answers of one model from several devices: a process of its own, with the whole model, for each further device.

Questions are dealt in turn, the longest first, before any is answered: so a share depends on nothing but the questions
and the number of devices. This process answers the first share, and it alone hands answers on. Processes end with this
one, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_only

from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.errors import InputError, MachineError, first_line, is_out_of_memory
from bdpo_pl.evaluation.answerers import (
    Answerer,
    GenerationOptions,
    LocalAnswerer,
    OnAnswer,
    Question,
    ignore_answer,
)
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt
from bdpo_pl.evaluation.verdict_log import Answer
from bdpo_pl.models.causal_lm import CausalLM

Load = Callable[[], tuple[CausalLM, TokenizerLike]]

# A process that is forked from this one would share its locks and could not use a GPU.
PROCESSES: Any = multiprocessing.get_context("spawn")

_TURN = 0.2
"""Seconds between two looks at whether a signal has come."""


@dataclass
class _Worker:
    """A process that answers on a device.

    Attributes:
        process: the process, whose name tells its device.
        connection: our end of its pipe.
        share: numbers of the questions that it answers; empty if it answers none.
    """

    process: BaseProcess
    connection: Connection
    share: Sequence[int] = ()


class SpreadAnswerer(Answerer):
    """A model on several devices.

    Args:
        own: the model in this process.
        options: options of the generation.
        further: name of each further device, and function that loads the model there; it is pickled.
    """

    def __init__(self, own: LocalAnswerer, options: GenerationOptions, further: Sequence[tuple[str, Load]]) -> None:
        self.facts, self.batch, self.notes = own.facts, own.batch, own.notes
        self._own, self._options, self._further = own, options, further
        self._workers: list[_Worker] = []
        self._failure: Exception | None = None
        on_cpu = any(device == "cpu" for device, _ in further)
        self._threads = max(1, torch.get_num_threads() // (1 + len(further))) if on_cpu else None

    def questions(self, prompts: Sequence[EvaluationPrompt]) -> list[Question]:
        """Tokenise each prompt, as `LocalAnswerer` does."""
        return self._own.questions(prompts)

    def prepare(self) -> None:
        """Load the model on all devices at the same time."""
        self._start()
        self._own.prepare()

    def respond(self, prompts: Sequence[str]) -> list[str]:
        """Return the answers to `prompts`, without thoughts, from this process: an attack asks a few at a time."""
        return self._own.respond(prompts)

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer = ignore_answer) -> list[Answer]:
        """Generate answers greedily, on all devices.

        Raises:
            InputError: memory runs out on a device, or a question does not fit into the model's window.
            MachineError: a process ended, or failed in another way.
        """
        found: dict[int, Answer] = {}

        def take(number: int, answer: Answer) -> None:
            found[number] = answer
            on_answer(number, answer)

        self._start()
        count = 1 + len(self._workers)
        own, *others = (range(first, len(questions), count) for first in range(count))

        def take_own(number: int, answer: Answer) -> None:
            take(own[number], answer)
            self._collect(take, 0)

        threads = torch.get_num_threads()
        try:
            for worker, share in zip(self._workers, others, strict=True):
                _ask(worker, share, questions)
            torch.set_num_threads(self._threads or threads)
            try:
                self._own.answer([questions[i] for i in own], take_own)
            except (InputError, MachineError):
                self._read_all(take, 0)
                raise
            while any(worker.share for worker in self._workers):
                self._collect(take, _TURN)
        except BaseException:
            self.close()
            raise
        finally:
            torch.set_num_threads(threads)
        return [found[number] for number in range(len(questions))]

    def close(self) -> None:
        """End the processes."""
        while self._workers:
            worker = self._workers.pop()
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def _start(self) -> None:
        if self._workers:
            return
        self._failure = None
        for rank, (device, load) in enumerate(self._further, start=1):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve,
                args=(theirs, load, self._options, rank, self._threads),
                name=f"the process that answers on {device}",
                daemon=True,
            )
            with _without_interrupts():
                process.start()
                self._workers.append(_Worker(process, ours))
            # The pipe then ends when the process does.
            theirs.close()

    def _collect(self, take: OnAnswer, seconds: float) -> None:
        """Take the answers that have come from the processes.

        Args:
            take: function that is called with the number of each question and its answer.
            seconds: time to wait for one if there is none.

        Raises:
            InputError: the model failed on a device; all other answers have been taken.
            MachineError: a process ended or failed; all other answers have been taken.
        """
        self._read_all(take, seconds)
        if self._failure is not None:
            raise self._failure

    def _read_all(self, take: OnAnswer, seconds: float) -> None:
        while busy := {worker.connection: worker for worker in self._workers if worker.share}:
            ready = wait(list(busy), seconds)
            if not ready:
                break
            for connection in ready:
                self._read(busy[connection], take)  # type: ignore[index]
            seconds = 0

    def _read(self, worker: _Worker, take: OnAnswer) -> None:
        try:
            kind, *content = worker.connection.recv()
        except (EOFError, OSError):
            worker.share = ()
            self._failure = self._failure or _death(worker)
            return
        if kind == "answer":
            number, answer = content
            take(worker.share[number], answer)
        elif kind == "note":
            self._own.note(*content)
        else:
            worker.share = ()
            if kind == "failure":
                raised, said = content
                self._failure = self._failure or raised(f"{worker.process.name}: {said}")


def _ask(worker: _Worker, share: Sequence[int], questions: Sequence[Question]) -> None:
    if not share:
        return
    worker.share = share
    # If it has ended, what it said before is read first.
    with suppress(OSError):
        worker.connection.send([questions[i] for i in share])


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that start in the context never see Ctrl-C, which reaches the whole group; it is ours to handle."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(worker: _Worker) -> MachineError:
    worker.process.join()
    status = worker.process.exitcode or 0
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return MachineError(
        f"{worker.process.name} {how}. The system kills processes when memory runs out, and each of them holds the "
        "whole model; lower devices, or free memory"
    )


def _serve(connection: Connection, load: Load, options: GenerationOptions, rank: int, threads: int | None) -> None:
    """Load the model and answer the questions that come, until this process is ended or its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # This process's notices and bars would be those of the first one, again.
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    said: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
    # The parent may be busy with judging, and a full pipe would stop the generation.
    sender = threading.Thread(target=_send, args=(connection, said), daemon=True)
    sender.start()
    doing = "loading the model"
    try:
        loaded = load()
        answerer = LocalAnswerer({}, loaded[1], lambda: loaded, options)
        doing = "generating"
        while True:
            questions = connection.recv()
            answerer.answer(questions, lambda number, answer: said.put(("answer", number, answer)))
            for note in answerer.notes:
                said.put(("note", note))
            said.put(("done",))
    except EOFError:
        os._exit(0)
    except InputError as error:
        said.put(("failure", InputError, str(error)))
    except Exception as error:
        if is_out_of_memory(error):
            what = f"{doing} ran out of memory ({first_line(error)}); lower devices, or free memory"
        else:
            what = f"{doing} failed\n{traceback.format_exc()}"
        said.put(("failure", MachineError, what))
    said.put(None)
    sender.join()


def _send(connection: Connection, said: SimpleQueue[tuple[Any, ...] | None]) -> None:
    while (message := said.get()) is not None:
        connection.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
