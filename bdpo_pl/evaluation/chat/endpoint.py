"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, or a hosted service."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import Message
from bdpo_pl.evaluation.chat.completions import (
    Completion,
    Key,
    Limits,
    OptionNames,
    PassingError,
    complete,
    new_client,
)

_LONGEST_BACKOFF = 60.0
_PATH = "/chat/completions"

_TURN = 0.2

_T = TypeVar("_T")

MaxTokensName = Literal["max_tokens", "max_completion_tokens"]
"""Name of the maximum number of tokens in a request."""


@dataclass
class EndpointOptions:
    """Address of an endpoint, and the options of requests to it.

    Args:
        url: address of the API, such as `http://localhost:8000/v1`; `/chat/completions` is appended if it is missing.
            Several servers of the same model are separated by commas; each gets the key, and the first names the model.
        model: the endpoint's name for the model.
        api_key_env: environment variable that contains the key. No key is sent if the default variable is unset, or if
            this option is empty. The key itself is never an option, because options are written into files.
        max_tokens: maximum number of tokens in an answer; null omits it from the request.
        temperature: sampling temperature, 0 for greedy decoding; null omits it from the request.
        timeout: seconds to wait for data from the endpoint, in each attempt.
        deadline: seconds to wait for a whole answer, in each attempt.
        max_bytes: maximum number of bytes of a whole answer; a longer one is an error, and reading stops.
        retries: number of further attempts after a temporary failure: no connection, status 408, 429 or 5xx.
        parallel: number of simultaneous requests to each server.
        max_tokens_name: name of `max_tokens` in a request; OpenAI's reasoning models take only `max_completion_tokens`.

    Raises:
        InputError: a value is out of range, or the URL is invalid.
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
    max_tokens_name: MaxTokensName = "max_tokens"

    def __post_init__(self) -> None:
        check_urls(self.url, OptionNames())
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
    """Failure of an endpoint: it was unreachable, or answered with an error.

    Attributes:
        replies: the answers received, in the order of the conversations; None for a conversation without one.
    """

    def __init__(self, message: str, replies: Sequence[Completion | None]) -> None:
        super().__init__(message)
        self.replies = list(replies)


class Endpoint:
    """A chat model behind an endpoint.

    Args:
        options: address of the endpoint, and the options of requests to it.
        sleep: function that waits for a number of seconds between attempts. By default the wait ends early if another
            request fails permanently.
        names: names of the options, for messages.

    Attributes:
        name: name of the model.
        url: full address of the requests to the first server, which identifies the model.
        urls: full addresses of all servers.

    Raises:
        InputError: the key is missing or malformed.
    """

    def __init__(
        self,
        options: EndpointOptions,
        sleep: Callable[[float], object] | None = None,
        names: OptionNames | None = None,
    ) -> None:
        self.options = options
        self.name = options.model
        bases = [url.rstrip("/") for url in options.url.split(",")]
        self.urls = [base if base.endswith(_PATH) else base + _PATH for base in bases]
        self.url = self.urls[0]
        self._sleep = sleep
        self._names = names or OptionNames()
        self._key = Key(_read_key(options.api_key_env, self._names), options.api_key_env)
        self._limits = Limits(options.timeout, options.deadline, options.max_bytes)

    def facts(self) -> dict[str, str]:
        """Return the address and what each request asks for, which replies depend on."""
        return {
            "endpoint": self.url,
            "temperature": f"{'of the server' if self.options.temperature is None else self.options.temperature}",
            "max_tokens": f"{'of the server' if self.options.max_tokens is None else self.options.max_tokens}",
        }

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return the text of the next turn of each conversation, in order.

        Raises:
            EndpointError: an answer could not be obtained, after retries, or contains only a thought.
        """
        replies = self.completions(conversations)
        if any(not reply.text and reply.thought for reply in replies):
            raise EndpointError(f"{self.url}: an answer contains only a thought; {self._names.more_tokens}", replies)
        return [reply.text for reply in replies]

    def completions(self, conversations: Sequence[Sequence[Message]]) -> list[Completion]:
        """Return the next turn of each conversation, in order, with `parallel` simultaneous requests to each server.

        Raises:
            EndpointError: an answer could not be obtained, after retries; requests under way are completed and kept.
        """
        replies: list[Completion | None] = [None] * len(conversations)
        failures: dict[int, InputError] = {}
        _aside(self._reply_all(conversations, replies, failures))
        if failures:
            first = failures[min(failures)]
            had = sum(reply is not None for reply in replies)
            raise EndpointError(f"{first} ({had} of {len(replies)} answers were received)", replies) from first
        return [reply for reply in replies if reply is not None]

    async def _reply_all(
        self,
        conversations: Sequence[Sequence[Message]],
        replies: list[Completion | None],
        failures: dict[int, InputError],
    ) -> None:
        stop, places = asyncio.Event(), asyncio.Queue[str]()
        for url in self.urls * self.options.parallel:
            places.put_nowait(url)

        async def fetch(client: httpx.AsyncClient, i: int) -> None:
            # A server that is done sooner gets more.
            url = await places.get()
            try:
                replies[i] = await self._fetch(client, url, conversations[i], stop)
            except InputError as error:
                failures[i] = error
                stop.set()
            finally:
                places.put_nowait(url)

        async with new_client(self._limits, places.qsize()) as client:
            await asyncio.gather(*(fetch(client, i) for i in range(len(conversations))))

    async def _fetch(
        self, client: httpx.AsyncClient, url: str, conversation: Sequence[Message], stop: asyncio.Event
    ) -> Completion | None:
        """Return the answer to one conversation; None if another request has failed permanently meanwhile."""
        body: dict[str, Any] = {"model": self.name, "messages": [dict(message) for message in conversation]}
        if self.options.max_tokens is not None:
            body[self.options.max_tokens_name] = self.options.max_tokens
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        tries = 0
        while not stop.is_set():
            try:
                return await complete(client, url, body, self._key, self._limits, self._names)
            except PassingError as failure:
                tries += 1
                if tries > self.options.retries:
                    times = "once" if tries == 1 else f"{tries} times"
                    raise InputError(f"{url}: {failure}; tried {times}; {failure.remedy}") from None
                await self._wait(max(min(2.0 ** (tries - 1), _LONGEST_BACKOFF), failure.retry_after), stop)
        return None

    async def _wait(self, seconds: float, stop: asyncio.Event) -> None:
        if self._sleep is not None:
            self._sleep(seconds)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)


def _aside(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` in an event loop in a separate thread.

    A signal then interrupts the wait in this thread, rather than a callback of the loop, which would swallow the
    exception. The thread is a daemon, so that the process can end whatever the endpoint does.
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
        # Short waits, because a signal delivered to another thread is handled only when this one wakes.
        while not wait([done], timeout=_TURN).done:
            pass
        return done.result()
    except BaseException:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(task.cancel)
        raise


def check_urls(urls: str, names: OptionNames) -> None:
    """Raise `InputError` if one of `urls`, separated by commas, is not the address of a server or may hold a key."""
    for url in urls.split(","):
        _check_url(url, names)


def _check_url(url: str, names: OptionNames) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"{names['url']} must be an address such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"{names['url']} holds more than an address, and may hold a key, which would be written into files: leave "
            "out the part before an @ and the parts after a ? or a #, and put the key into the variable that "
            f"{names['api_key_env']} names"
        )


def _read_key(env: str, names: OptionNames) -> str:
    key = os.environ.get(env, "").strip() if env else ""
    if env and env != EndpointOptions.api_key_env and not key:
        raise InputError(f"{names['api_key_env']} names ${env}, which is not set; export it, or set the option to ''")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the key in ${env} holds characters that no key has; is it whole, and on one line?")
    return key
