"""One request to an OpenAI-compatible chat endpoint, and the parsing of its answer.

The endpoint is not trusted: its answers are limited in time and size, and escaped before they are shown or saved.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import httpx2 as httpx

from bdpo_pl.console import printable
from bdpo_pl.errors import InputError

_LONGEST_RETRY_AFTER = 300.0
_EXCERPT = 300
_REFUSAL_BYTES = 65536


class PassingError(Exception):
    """A temporary failure, which may not occur in the next attempt.

    Attributes:
        remedy: Advice for a failure that persists.
        retry_after: Number of seconds to wait, as requested by the service.
    """

    def __init__(self, message: str, remedy: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.retry_after = retry_after


@dataclass(frozen=True)
class OptionNames:
    """Names of an endpoint's options on the command line, for messages.

    Attributes:
        group: Group of the options, such as `judge.endpoint`.
        others: Names of the options that are elsewhere, by the endpoint's own name.
    """

    group: str = "endpoint"
    others: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.others.get(name, f"{self.group}.{name}")

    @property
    def more_tokens(self) -> str:
        """Advice for an answer that was cut off before it began."""
        return f"the model ran out of tokens before it answered: raise {self['max_tokens']}"

    @property
    def form(self) -> str:
        """Advice for an answer of another form."""
        return f"is it an OpenAI-compatible chat endpoint? Check {self['url']}"


@dataclass(frozen=True)
class Limits:
    """Limits on the time and size of an answer.

    Attributes:
        timeout: Maximum number of seconds without data.
        deadline: Maximum number of seconds for the whole answer.
        max_bytes: Maximum number of bytes of the whole answer.
    """

    timeout: float
    deadline: float
    max_bytes: int


@dataclass(frozen=True)
class Key:
    """An API key, which must not appear in any message or answer.

    Attributes:
        value: The key, sent as a bearer token; empty: no key is sent.
        env: The environment variable that contained the key, for messages.
    """

    value: str
    env: str

    def __repr__(self) -> str:
        return f"Key(from ${self.env})"

    def redact(self, text: str) -> str:
        """Remove the key from `text`, even if it is interspersed with blanks or invisible characters."""
        if not self.value:
            return text
        return re.sub(r"[\s\x00-\x1f\x7f\u200b-\u200f\u2060\ufeff]*".join(map(re.escape, self.value)), "[key]", text)


def new_client(limits: Limits, parallel: int) -> httpx.AsyncClient:
    """Create a client that follows no redirects, which could send the key to another host."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(limits.timeout, pool=None),
        follow_redirects=False,
        limits=httpx.Limits(max_connections=parallel),
        # Certificates of the system, and those of SSL_CERT_FILE.
        verify=ssl.create_default_context(),
    )


@dataclass(frozen=True)
class Completion:
    """An endpoint's answer.

    Attributes:
        text: The text, without lone surrogates and without the key.
        finished: False if the endpoint says that it cut the text off.
        num_tokens: Number of generated tokens, as the endpoint counts them; 0 if it does not report it.
        thought: The model's thought, from endpoints that return it separately from the text.
    """

    text: str
    finished: bool = True
    num_tokens: int = 0
    thought: str = ""


async def complete(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], key: Key, limits: Limits, names: OptionNames
) -> Completion:
    """Request a completion and return it.

    Args:
        client: A client made by `new_client`.
        url: The http or https address, up to and including `/chat/completions`.
        body: The request, as JSON values.
        key: The API key.
        limits: Limits on the answer.
        names: Names of the options, for messages.

    Raises:
        InputError: The endpoint refuses, or its answer has another form or is too long; a retry would not help.
        PassingError: A temporary failure.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    if key.value:
        headers["Authorization"] = f"Bearer {key.value}"
    remedy = f"is it up, and are {names['url']}, {names['timeout']} and {names['deadline']} right?"
    try:
        async with asyncio.timeout(limits.deadline):
            async with client.stream("POST", url, content=json.dumps(body).encode(), headers=headers) as response:
                if response.status_code != 200:
                    said, _ = await _read(response, _REFUSAL_BYTES)
                    _refused(response, said, url, key, names)
                answer, whole = await _read(response, limits.max_bytes)
    except TimeoutError:
        raise PassingError(f"no whole answer within {limits.deadline:g} s", remedy) from None
    except httpx.TimeoutException:
        raise PassingError(f"no answer within {limits.timeout:g} s", remedy) from None
    except (httpx.HTTPError, OSError) as error:
        causes = list(_causes(error))
        untrusted = [cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)]
        if untrusted:
            raise InputError(
                f"{url}: its certificate is not trusted ({untrusted[0].verify_message}); set SSL_CERT_FILE to the "
                f"authority's certificates, or correct {names['url']}"
            ) from None
        # The last error of the chain is the one from the operating system.
        system = [cause for cause in causes if isinstance(cause, OSError) and cause.errno is not None]
        reasons = [os.strerror(c.errno) if c.errno and c.errno > 0 else str(c.strerror) for c in system]
        text = _shown(reasons[-1] if reasons else str(error) or type(error).__name__, key)
        raise PassingError(f"no connection, or it broke ({text})", remedy) from None
    if not whole:
        raise InputError(
            f"{url}: the answer is longer than {limits.max_bytes} bytes and was cut off; {names.form}, or raise "
            f"{names['max_bytes']}"
        )
    return _completion(answer, url, key, names)


async def _read(response: httpx.Response, most: int) -> tuple[bytes, bool]:
    """Read the body's first `most` bytes, and return them and whether that is the whole body."""
    found = bytearray()
    async for part in response.aiter_bytes():
        found += part
        if len(found) > most:
            return bytes(found[:most]), False
    return bytes(found), True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and all errors that caused it."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from _causes(inner)
        error = error.__cause__ or error.__context__


def _refused(response: httpx.Response, body: bytes, url: str, key: Key, names: OptionNames) -> NoReturn:
    status = response.status_code
    said = _shown(body.decode("utf-8", "replace"), key)
    failure = f"status {status}" + (f": {said}" if said else "")
    if status in (408, 429) or status >= 500:
        remedy = f"send fewer requests at a time with {names['parallel']}, or wait longer with {names['retries']}"
        raise PassingError(failure, remedy, retry_after(response.headers.get("Retry-After"))) from None
    if status in (401, 403):
        sent = f"the key in ${key.env} was sent" if key.value else "no key was sent"
        remedy = f"{sent}; put a valid one into an environment variable and name it in {names['api_key_env']}"
    elif status in (404, 405):
        remedy = f"check {names['url']} (it mostly ends with /v1) and {names['model']}"
    elif 300 <= status < 400:
        remedy = f"it redirects elsewhere, where no key is sent; set {names['url']} to the address that it moved to"
    else:
        remedy = (
            f"it refuses the request: check {names['model']}; set {names['max_tokens']} and {names['temperature']} to "
            f"values that it accepts (null omits the temperature), or {names['max_tokens_name']} to "
            "max_completion_tokens"
        )
    raise InputError(f"{url}: {failure}; {remedy}") from None


def retry_after(value: str | None) -> float:
    """Parse a Retry-After header, seconds or a date, into at most 300 seconds to wait; 0 if it is neither."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER)


def _completion(body: bytes, url: str, key: Key, names: OptionNames) -> Completion:
    """Return the first choice.

    Raises:
        InputError: There is none, or it has neither text nor thought; the message quotes the answer.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        said = _shown(body[: 4 * _EXCERPT].decode("utf-8", "replace"), key)
        raise InputError(f"{url}: the answer is not JSON: '{said}'; {names.form}") from None
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message["content"]
    except (TypeError, KeyError, IndexError):
        said = _shown(json.dumps(answer, ensure_ascii=False), key)
        raise InputError(f"{url}: the answer has no 'choices[0].message.content': {said}; {names.form}") from None
    # Servers that return thoughts separately use one of these names.
    thought = _first_text(message, "reasoning_content", "reasoning")
    # Some services put refusals into a separate field, and null into the content.
    text = content if isinstance(content, str) else _first_text(message, "refusal")
    if not isinstance(text, str) and not (thought and choice.get("finish_reason") == "length"):
        reason = _shown(str(choice.get("finish_reason")), key)
        remedy = {
            "length": names.more_tokens,
            "content_filter": (
                "the service's own filter withheld it, so the model's answer is unknown: turn the filter off"
            ),
        }.get(reason, names.form)
        raise InputError(
            f"{url}: 'choices[0].message.content' is a {type(content).__name__}, no text (finish_reason {reason}); "
            f"{remedy}"
        )
    return Completion(
        key.redact(whole_characters(text or "")),
        # Anything else, such as a tool call or a stop sequence, is the model's own end.
        choice.get("finish_reason") not in ("length", "content_filter"),
        _count(answer.get("usage")),
        key.redact(whole_characters(thought or "")),
    )


def _first_text(message: Mapping[str, object], *names: str) -> str | None:
    return next((text for name in names if isinstance(text := message.get(name), str)), None)


def _count(usage: object) -> int:
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0


def whole_characters(text: str) -> str:
    """Replace each unpaired surrogate in `text`, which no tokenizer accepts, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown(text: str, key: Key) -> str:
    """Return an excerpt of an endpoint's answer: one line, without the key, with control characters escaped."""
    # The key is removed first, because the excerpt could end within it.
    return printable(" ".join(key.redact(text).split()))[:_EXCERPT]
