"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, or a hosted service."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import Message
from bdpo_pl.evaluation.chat.completions import Key, Limits, PassingError, complete, new_client

_LONGEST_BACKOFF = 60.0
_PATH = "/chat/completions"

_TURN = 0.2

_T = TypeVar("_T")


@dataclass
class EndpointOptions:
    """Which endpoint, and how to speak to it.

    Args:
        url: of the API, as `http://localhost:8000/v1`; `/chat/completions` is added where it is missing.
        model: the name by which the endpoint knows the model.
        api_key_env: environment variable that holds the key. No key is sent if the default one is unset, or if this is
            empty. The key itself is never an option: options are written into files.
        max_tokens: tokens in an answer at most; null leaves it out of the request.
        temperature: of sampling, 0 for greedy; null leaves it out of the request.
        timeout: Seconds to wait for a sign of life from the endpoint, at each try.
        deadline: Seconds to wait for a whole answer, at each try.
        max_bytes: Bytes of a whole answer at most; a longer one is an error, and is not read to its end.
        retries: further tries after a failure that may pass: no connection, status 408, 429 or 5xx.
        parallel: requests at a time.

    Raises:
        InputError: a value out of range, or a URL that is none.
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int | None = 512
    temperature: float | None = 0.0
    timeout: float = 120.0
    deadline: float = 600.0
    max_bytes: int = 4_000_000
    retries: int = 5
    parallel: int = 8

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not self.model:
            raise InputError("endpoint.model is empty; give the name by which the endpoint knows the model")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"endpoint.max_tokens must be at least 1, or null; got {self.max_tokens}")
        if self.temperature is not None and not self.temperature >= 0.0:
            raise InputError(f"endpoint.temperature must be at least 0, or null; got {self.temperature}")
        for name in ("timeout", "deadline"):
            if not getattr(self, name) > 0.0:
                raise InputError(f"endpoint.{name} must be above 0 seconds; got {getattr(self, name)}")
        if self.max_bytes < 1:
            raise InputError(f"endpoint.max_bytes must be at least 1; got {self.max_bytes}")
        if self.retries < 0:
            raise InputError(f"endpoint.retries must be at least 0; got {self.retries}")
        if self.parallel < 1:
            raise InputError(f"endpoint.parallel must be at least 1; got {self.parallel}")


class EndpointError(InputError):
    """An endpoint that could not be had, or answered with an error.

    Attributes:
        replies: the answers that came before, in the order of the conversations; None where there is none.
    """

    def __init__(self, message: str, replies: Sequence[str | None]) -> None:
        super().__init__(message)
        self.replies = list(replies)


class Endpoint:
    """A chat model behind an endpoint.

    Args:
        options: which, and how.
        sleep: waits so many seconds between tries; by default until then, or until another request has failed for good.

    Attributes:
        name: the model's.
        url: that requests go to.

    Raises:
        InputError: the key is missing or malformed.
    """

    def __init__(self, options: EndpointOptions, sleep: Callable[[float], object] | None = None) -> None:
        self.options = options
        self.name = options.model
        base = options.url.rstrip("/")
        self.url = base if base.endswith(_PATH) else base + _PATH
        self._sleep = sleep
        self._key = Key(_read_key(options.api_key_env), options.api_key_env)
        self._limits = Limits(options.timeout, options.deadline, options.max_bytes)

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The next turn of each conversation, in order, `parallel` of them at a time.

        Raises:
            EndpointError: one could not be had, after retries; others under way are waited for and kept.
        """
        replies: list[str | None] = [None] * len(conversations)
        failures: dict[int, InputError] = {}
        _aside(self._reply_all(conversations, replies, failures))
        if failures:
            first = failures[min(failures)]
            had = sum(reply is not None for reply in replies)
            raise EndpointError(f"{first} ({had} of {len(replies)} answers had been given)", replies) from first
        return [reply for reply in replies if reply is not None]

    async def _reply_all(
        self,
        conversations: Sequence[Sequence[Message]],
        replies: list[str | None],
        failures: dict[int, InputError],
    ) -> None:
        stop, places = asyncio.Event(), asyncio.Semaphore(self.options.parallel)

        async def fetch(client: httpx.AsyncClient, i: int) -> None:
            async with places:
                try:
                    replies[i] = await self._fetch(client, conversations[i], stop)
                except InputError as error:
                    failures[i] = error
                    stop.set()

        async with new_client(self._limits, self.options.parallel) as client:
            await asyncio.gather(*(fetch(client, i) for i in range(len(conversations))))

    async def _fetch(
        self, client: httpx.AsyncClient, conversation: Sequence[Message], stop: asyncio.Event
    ) -> str | None:
        """The answer to one conversation; None if another has failed for good meanwhile."""
        body: dict[str, Any] = {"model": self.name, "messages": [dict(message) for message in conversation]}
        if self.options.max_tokens is not None:
            body["max_tokens"] = self.options.max_tokens
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        tries = 0
        while not stop.is_set():
            try:
                return await complete(client, self.url, body, self._key, self._limits)
            except PassingError as failure:
                tries += 1
                if tries > self.options.retries:
                    times = "once" if tries == 1 else f"{tries} times"
                    raise InputError(f"{self.url}: {failure}; tried {times}; {failure.remedy}") from None
                await self._wait(max(min(2.0 ** (tries - 1), _LONGEST_BACKOFF), failure.retry_after), stop)
        return None

    async def _wait(self, seconds: float, stop: asyncio.Event) -> None:
        if self._sleep is not None:
            self._sleep(seconds)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)


def _aside(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` in an event loop of a thread of its own.

    A signal then interrupts the waiting of this thread and no callback of the loop, which would swallow its exception.
    The thread is a daemon: whatever the endpoint does, the process can end.
    """
    done: Future[_T] = Future()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            done.set_result(loop.run_until_complete(task))
        except BaseException as error:
            done.set_exception(error)
        finally:
            loop.close()

    threading.Thread(target=run, name="endpoint", daemon=True).start()
    try:
        # In short turns: a signal that another thread is given is handled only when this one wakes.
        while not wait([done], timeout=_TURN).done:
            pass
        return done.result()
    except BaseException:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(task.cancel)
        raise


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError("endpoint.url must be an address such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            "endpoint.url holds more than an address, and may hold a key, which would be written into files: leave out "
            "what stands before an @ and after a ?, and put the key into the variable that endpoint.api_key_env names"
        )


def _read_key(env: str) -> str:
    key = os.environ.get(env, "").strip() if env else ""
    if env and env != EndpointOptions.api_key_env and not key:
        raise InputError(f"endpoint.api_key_env names ${env}, which is not set; export it, or set the option to ''")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the key in ${env} holds characters that no key has; is it whole, and on one line?")
    return key
