"""A process for a batch of cases, which cannot take the search down with it."""

import json
import mmap
import os
import resource
import select
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

_PATIENCE = 20

running = [0.0]
"""Seconds in which cases were under way, by the clock, without those in which this process was stopped or starved."""


class TooLongError(Exception):
    """A case has used more of the processor than any may."""


def in_a_process(kind, cases):
    """What was wrong (or None), its position, and what was counted.

    A case that takes more than `kind.SECONDS` of the processor is a fault, since a busy machine is none, and one that
    is stopped by hand does not count that time. A process that waits for something that never comes is ended after
    many times as long.
    """
    at = mmap.mmap(-1, 8)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said, counts = _try(kind, cases, at)
        with os.fdopen(writer, "w") as pipe:
            json.dump([said, dict(counts)], pipe)
        os._exit(0)
    os.close(writer)
    text = _read(reader, child, at, kind.SECONDS)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    position = struct.unpack("q", at[:])[0]
    if not text:
        return f"the process ended with status {status} and said nothing", position, Counter()
    said, counts = json.loads(text)
    return said, position, Counter(counts)


def _try(kind, cases, at):
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    counts = Counter()
    said = None
    signal.signal(signal.SIGPROF, _too_long)
    # What no handler can interrupt ends here.
    resource.setrlimit(resource.RLIMIT_CPU, (int(kind.SECONDS * (len(cases) + 1)),) * 2)
    try:
        os.chdir(folder)
        for position, case in enumerate(cases):
            at[:] = struct.pack("q", position)
            signal.setitimer(signal.ITIMER_PROF, kind.SECONDS)
            said = kind.check(case, folder, counts)
            counts["cases"] += 1
            if said is not None:
                break
    except BaseException:
        said = traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    os.chdir("/")
    shutil.rmtree(folder, ignore_errors=True)
    return said, counts


def _too_long(number, frame):
    raise TooLongError("".join(traceback.format_stack(frame)[-6:]))


def _read(reader, child, at, seconds):
    """All that the process says; it is killed where a case takes too long by the clock, in steps that a stop skips."""
    text, waited, position = b"", 0, -1
    while True:
        began = time.monotonic()
        ready, _, _ = select.select([reader], [], [], 1.0)
        running[0] += min(time.monotonic() - began, 2.0)
        if ready:
            part = os.read(reader, 65536)
            if not part:
                return text
            text += part
            continue
        now = struct.unpack("q", at[:])[0]
        if now != position:
            waited = 0
        elif not _is_starved(child):
            waited += min(time.monotonic() - began, 2.0)
        position = now
        if waited > _PATIENCE * seconds:
            os.kill(child, signal.SIGKILL)
            return b""


def _is_starved(child):
    """Whether the process would run if the machine gave it a processor, or has been stopped by hand."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] in "RT"
