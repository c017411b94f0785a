"""One request to an OpenAI-compatible chat endpoint, and what its answer means."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

from bdpo_pl.errors import InputError

_LONGEST_RETRY_AFTER = 300.0
_EXCERPT = 300
_FORM = "is it an OpenAI-compatible chat endpoint? Check endpoint.url"


class PassingError(Exception):
    """A failure that may be over at the next try.

    Attributes:
        remedy: what to do if it is not.
        retry_after: seconds that the service asks to wait.
    """

    def __init__(self, message: str, remedy: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.retry_after = retry_after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: urllib would make a GET of the request and send the key along, to whatever host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Leave the status to be handled as an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def complete(url: str, body: dict[str, Any], key: str, key_env: str, timeout: float) -> str:
    """The text that the endpoint at `url` answers to the request `body`.

    Args:
        url: of http or https, up to `/chat/completions`.
        body: the request, as JSON values.
        key: sent as a bearer token; empty to send none.
        key_env: where it came from, for messages, which never hold the key.
        timeout: seconds without a sign of life.

    Raises:
        InputError: the endpoint refuses, or answers in another form, and would again.
        PassingError: it could not be had this time.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")  # noqa: S310 - checked
    remedy = "is it up, and are endpoint.url and endpoint.timeout right?"
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        _refused(error, url, key, key_env)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise InputError(
                f"{url}: its certificate is not trusted ({reason.verify_message}); set SSL_CERT_FILE to the "
                "authority's certificates, or mend endpoint.url"
            ) from None
        if isinstance(reason, TimeoutError):
            raise PassingError(f"no answer within {timeout:g} s", remedy) from None
        raise PassingError(f"no connection, or it broke ({reason or type(reason).__name__})", remedy) from None
    return _text(answer, url, key)


def _refused(error: urllib.error.HTTPError, url: str, key: str, key_env: str) -> NoReturn:
    status = error.code
    try:
        said = _excerpt(error.read(65536).decode("utf-8", "replace"), key)
    except (OSError, http.client.HTTPException):
        said = ""
    told = f"status {status}" + (f": {said}" if said else "")
    if status in (408, 429) or status >= 500:
        remedy = "ask less of it with endpoint.parallel, or wait longer with endpoint.retries"
        raise PassingError(told, remedy, retry_after(error.headers.get("Retry-After"))) from None
    if status in (401, 403):
        sent = f"the key in ${key_env} was sent" if key else "no key was sent"
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
        except ValueError:
            return 0.0
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER)


def _text(body: bytes, url: str, key: str) -> str:
    """The text of the first choice.

    Raises:
        InputError: there is none; the message tells what is there instead.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        said = _excerpt(body[:_EXCERPT].decode("utf-8", "replace"), key)
        raise InputError(f"{url}: the answer is not JSON: {said!r}; {_FORM}") from None
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message["content"]
    except (TypeError, KeyError, IndexError):
        said = _excerpt(json.dumps(answer, ensure_ascii=False), key)
        raise InputError(f"{url}: the answer has no 'choices[0].message.content': {said}; {_FORM}") from None
    # A service that tells refusals apart puts the text there, and null into the content.
    for text in (content, message.get("refusal")):
        if isinstance(text, str):
            return text
    reason = str(choice.get("finish_reason"))
    remedy = {
        "length": "the model ran out of tokens before it answered: raise endpoint.max_tokens",
        "content_filter": "the service's own filter withheld it, so nothing is known of the model: turn the filter off",
    }.get(reason, _FORM)
    raise InputError(
        f"{url}: 'choices[0].message.content' is a {type(content).__name__}, no text (finish_reason {reason}); {remedy}"
    )


def _excerpt(text: str, key: str) -> str:
    """The beginning of `text` on one line, without the key, which some services repeat."""
    line = " ".join(text.split())
    return (line.replace(key, "[key]") if key else line)[:_EXCERPT]
