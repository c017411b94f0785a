"""A model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, or a hosted service."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.chat_model import Message
from bdpo_pl.evaluation.chat.completions import PassingError, complete

_LONGEST_BACKOFF = 60.0
_PATH = "/chat/completions"


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
        timeout: seconds to wait for a sign of life from the endpoint, at each try.
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
        if not self.timeout > 0.0:
            raise InputError(f"endpoint.timeout must be above 0 seconds; got {self.timeout}")
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
        self._key = _read_key(options.api_key_env)

    def reply(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The next turn of each conversation, in order, `parallel` of them at a time.

        Raises:
            EndpointError: one could not be had, after retries; others under way are waited for and kept.
        """
        replies: list[str | None] = [None] * len(conversations)
        failures: dict[int, InputError] = {}
        stop = threading.Event()

        def fetch(i: int) -> None:
            try:
                replies[i] = self._fetch(conversations[i], stop)
            except InputError as error:
                failures[i] = error
                stop.set()

        pool = ThreadPoolExecutor(max_workers=self.options.parallel)
        try:
            for future in [pool.submit(fetch, i) for i in range(len(conversations))]:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        if failures:
            first = failures[min(failures)]
            had = sum(reply is not None for reply in replies)
            raise EndpointError(f"{first} ({had} of {len(replies)} answers had been given)", replies) from first
        return [reply for reply in replies if reply is not None]

    def _fetch(self, conversation: Sequence[Message], stop: threading.Event) -> str | None:
        """The answer to one conversation; None if another has failed for good meanwhile."""
        body: dict[str, Any] = {"model": self.name, "messages": [dict(message) for message in conversation]}
        if self.options.max_tokens is not None:
            body["max_tokens"] = self.options.max_tokens
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        wait = self._sleep or stop.wait
        tries = 0
        while not stop.is_set():
            try:
                return complete(self.url, body, self._key, self.options.api_key_env, self.options.timeout)
            except PassingError as failure:
                tries += 1
                if tries > self.options.retries:
                    times = "once" if tries == 1 else f"{tries} times"
                    raise InputError(f"{self.url}: {failure}; tried {times}; {failure.remedy}") from None
                wait(max(min(2.0 ** (tries - 1), _LONGEST_BACKOFF), failure.retry_after))
        return None


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
