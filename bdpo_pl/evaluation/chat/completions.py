"""One request to an OpenAI-compatible chat endpoint, and what its answer means.

The endpoint is not trusted: an answer has a time and a size, and what it says is made fit to be shown and kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import httpx2 as httpx

from bdpo_pl.console import printable
from bdpo_pl.errors import InputError

_LONGEST_RETRY_AFTER = 300.0
_EXCERPT = 300
_REFUSAL_BYTES = 65536
_FORM = "is it an OpenAI-compatible chat endpoint? Check endpoint.url"


class PassingError(Exception):
    """A failure that may be over at the next try.

    Attributes:
        remedy: What to do if it is not.
        retry_after: Seconds that the service asks to wait.
    """

    def __init__(self, message: str, remedy: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """How long and how large an answer may be.

    Attributes:
        timeout: Seconds without a sign of life.
        deadline: Seconds for the whole answer.
        max_bytes: Bytes of the whole answer.
    """

    timeout: float
    deadline: float
    max_bytes: int


@dataclass(frozen=True)
class Key:
    """An API key, which no message and no answer may show.

    Attributes:
        value: Sent as a bearer token; empty: none is sent.
        env: The environment variable that it came from, for messages.
    """

    value: str
    env: str

    def __repr__(self) -> str:
        return f"Key(from ${self.env})"

    def redact(self, text: str) -> str:
        """`text` without the key, wherever a service repeats it, also with blanks or invisible characters within."""
        if not self.value:
            return text
        return re.sub(r"[\s\x00-\x1f\x7f\u200b-\u200f\u2060\ufeff]*".join(map(re.escape, self.value)), "[key]", text)


def new_client(limits: Limits, parallel: int) -> httpx.AsyncClient:
    """A client that follows no redirect, which would send the key along to whatever host."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(limits.timeout, pool=None),
        follow_redirects=False,
        limits=httpx.Limits(max_connections=parallel),
        # The system's certificates, and those of SSL_CERT_FILE.
        verify=ssl.create_default_context(),
    )


async def complete(client: httpx.AsyncClient, url: str, body: dict[str, Any], key: Key, limits: Limits) -> str:
    """The text that the endpoint at `url` answers to the request `body`: no lone surrogates, and no key.

    Args:
        client: Of `new_client`.
        url: Of http or https, up to `/chat/completions`.
        body: The request, as JSON values.
        key: The API key.
        limits: Of the answer.

    Raises:
        InputError: The endpoint refuses, or answers in another form or at another length, and would again.
        PassingError: It could not be had this time.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    if key.value:
        headers["Authorization"] = f"Bearer {key.value}"
    remedy = "is it up, and are endpoint.url, endpoint.timeout and endpoint.deadline right?"
    try:
        async with asyncio.timeout(limits.deadline):
            async with client.stream("POST", url, content=json.dumps(body).encode(), headers=headers) as response:
                if response.status_code != 200:
                    said, _ = await _read(response, _REFUSAL_BYTES)
                    _refused(response, said, url, key)
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
                "authority's certificates, or mend endpoint.url"
            ) from None
        # The system's own word is the last one of the chain.
        system = [cause for cause in causes if isinstance(cause, OSError) and cause.errno is not None]
        reasons = [os.strerror(c.errno) if c.errno and c.errno > 0 else str(c.strerror) for c in system]
        text = _shown(reasons[-1] if reasons else str(error) or type(error).__name__, key)
        raise PassingError(f"no connection, or it broke ({text})", remedy) from None
    if not whole:
        raise InputError(
            f"{url}: the answer is longer than {limits.max_bytes} bytes and was cut off; {_FORM}, or raise "
            "endpoint.max_bytes"
        )
    return _text(answer, url, key)


async def _read(response: httpx.Response, most: int) -> tuple[bytes, bool]:
    """The body's first `most` bytes, and whether that is all."""
    found = bytearray()
    async for part in response.aiter_bytes():
        found += part
        if len(found) > most:
            return bytes(found[:most]), False
    return bytes(found), True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and everything that it comes from."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from _causes(inner)
        error = error.__cause__ or error.__context__


def _refused(response: httpx.Response, body: bytes, url: str, key: Key) -> NoReturn:
    status = response.status_code
    said = _shown(body.decode("utf-8", "replace"), key)
    told = f"status {status}" + (f": {said}" if said else "")
    if status in (408, 429) or status >= 500:
        remedy = "ask less of it with endpoint.parallel, or wait longer with endpoint.retries"
        raise PassingError(told, remedy, retry_after(response.headers.get("Retry-After"))) from None
    if status in (401, 403):
        sent = f"the key in ${key.env} was sent" if key.value else "no key was sent"
        remedy = f"{sent}; put a valid one into an environment variable and name it in endpoint.api_key_env"
    elif status in (404, 405):
        remedy = "check endpoint.url (it mostly ends with /v1) and endpoint.model"
    elif 300 <= status < 400:
        remedy = "it redirects elsewhere, where no key is sent; set endpoint.url to the address that it moved to"
    else:
        remedy = (
            "it does not take the request: check endpoint.model, and set endpoint.max_tokens and endpoint.temperature "
            "to what it takes (null leaves one out)"
        )
    raise InputError(f"{url}: {told}; {remedy}") from None


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks to wait, at most 300: it holds them, or a date; else 0."""
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


def _text(body: bytes, url: str, key: Key) -> str:
    """The text of the first choice.

    Raises:
        InputError: There is none; the message says what is there instead.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        said = _shown(body[: 4 * _EXCERPT].decode("utf-8", "replace"), key)
        raise InputError(f"{url}: the answer is not JSON: '{said}'; {_FORM}") from None
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message["content"]
    except (TypeError, KeyError, IndexError):
        said = _shown(json.dumps(answer, ensure_ascii=False), key)
        raise InputError(f"{url}: the answer has no 'choices[0].message.content': {said}; {_FORM}") from None
    # A service that tells refusals apart puts the text there, and null into the content.
    for text in (content, message.get("refusal")):
        if isinstance(text, str):
            return key.redact(_whole_characters(text))
    reason = _shown(str(choice.get("finish_reason")), key)
    remedy = {
        "length": "the model ran out of tokens before it answered: raise endpoint.max_tokens",
        "content_filter": "the service's own filter withheld it, so nothing is known of the model: turn the filter off",
    }.get(reason, _FORM)
    raise InputError(
        f"{url}: 'choices[0].message.content' is a {type(content).__name__}, no text (finish_reason {reason}); {remedy}"
    )


def _whole_characters(text: str) -> str:
    """`text` with each half of a surrogate pair that stands alone, which no tokenizer takes, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown(text: str, key: Key) -> str:
    """The beginning of what an endpoint said: on one line, without the key, control characters escaped."""
    # Redacted first, or an excerpt could end within the key.
    return printable(" ".join(key.redact(text).split()))[:_EXCERPT]
