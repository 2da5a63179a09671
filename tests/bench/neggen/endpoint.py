"""A multimodal model behind an OpenAI-compatible address (vLLM, llama.cpp, Ollama, hosted) as a judge."""

import base64
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from hosting.errors import HostError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from neggen.forms import Form
from neggen.forms import load as load_form
from neggen.pairs import Pair
from neggen.store import opened
from neggen.words import plain

KEY_VARIABLE = "NEGGEN_API_KEY"
LARGEST_ANSWER = 2**20
LONGEST_WAIT = 60.0
PATCH, ANSWER_TOKENS, REASON_TOKENS, SECONDS = 28, 60, 120, 4.0
"""For the estimate: pixels of a side of an image token, tokens of an answer, tokens of its reasons, seconds of one."""
MOST_TOKENS = 10**7
"""No count of one answer is larger."""
READS = 2
"""So many answers about a picture are looked at, if none of them can be read."""
LASTING = (400, 413, 422)
"""Statuses that another try with the same picture does not change."""

Scores = tuple[float | None, ...]
"""Positive, negative and quality; None for what the form does not ask."""


class Unreadable(HostError):
    """A model answered, and none of its answers about a picture had the form that was asked for."""


class Unusable(Exception):
    """An answer that another try may better. wait: seconds that the server asked for; said: a model answered."""

    def __init__(self, words: str, wait: float = 0.0, said: bool = False) -> None:
        super().__init__(words)
        self.wait, self.said = wait, said


class Broken(HostError):
    """The endpoint will give no answer to anything: a wrong key, model or address."""


@dataclass
class Endpoint:
    """Judges pictures, several at a time if asked from several threads. prices: for a million tokens in and out;
    tokens_in, tokens_out: as the server counts them, or a guess where it says nothing sensible.

    The key is read from the environment, sent to this address alone, and taken out of whatever is shown or kept.
    """

    address: str
    model: str
    key_variable: str = KEY_VARIABLE
    prices: tuple[float, float] = (0.0, 0.0)
    tries: int = 6
    timeout: float = 120.0
    first_wait: float = 1.0
    form: Form = field(default_factory=lambda: load_form("ours"))
    tokens_in: int = 0
    tokens_out: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise HostError("--endpoint takes http(s)://host/v1, without a user or password in it")
        self._key, self._lock, self._schema = os.environ.get(self.key_variable, "").strip(), Lock(), True
        self._secret = _spellings(self._key) if self._key else None

    @property
    def cost(self) -> float:
        """Of the answers so far."""
        return self._cost(self.tokens_in, self.tokens_out)

    def _cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def estimate(self, pictures: Sequence[tuple[tuple[int, int], Pair]], at_once: int) -> str:
        """What judging pictures of these sizes would take: tokens, cost, and a guess at the time."""
        tokens = sum(self._guess(self.form.size(*size), pair) for size, pair in pictures)
        answers = (ANSWER_TOKENS + REASON_TOKENS * bool(self.form.reasons)) * len(pictures)
        cost = f"{self._cost(tokens, answers):.2f} at the given prices" if any(self.prices) else "no prices were given"
        minutes = len(pictures) * SECONDS / at_once / 60
        return (
            f"{len(pictures)} pictures to {self.model}: about {tokens:,.0f} tokens in, {answers:,} out; cost: {cost}; "
            f"time: {minutes:.1f} min if an answer takes {SECONDS:g} s, {at_once} at a time"
        )

    def _guess(self, size: tuple[int, int], pair: Pair) -> int:
        """Tokens of one question, about."""
        width, height = size
        return sum(map(len, self.form.texts(pair))) // 4 + math.ceil(width / PATCH) * math.ceil(height / PATCH)

    def judge(self, picture: Path, pair: Pair) -> tuple[Scores, str]:
        """The scores and the model's own words. Raises HostError when no try gives a valid answer, Unreadable when
        the model answered and never in the form that was asked for."""
        body, guess = self._question(picture, pair)
        said = 0

        def enough(state: RetryCallState) -> bool:
            nonlocal said
            error = state.outcome.exception() if state.outcome else None
            said += getattr(error, "said", False)
            return state.attempt_number >= self.tries or said >= READS

        retrying = Retrying(retry=retry_if_exception_type(Unusable), stop=enough, wait=self._pause, reraise=True)
        try:
            return retrying(self._ask, body, guess)
        except Unusable as error:
            kind = Unreadable if error.said else HostError
            tries = retrying.statistics["attempt_number"]
            raise kind(f"no usable answer in {tries} tries; the last: {error}") from None

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        usual = wait_exponential_jitter(multiplier=self.first_wait, max=LONGEST_WAIT, jitter=self.first_wait)(state)
        return min(LONGEST_WAIT, max(usual, getattr(error, "wait", 0.0)))

    def clean(self, text: str) -> str:
        """Without the key, however it is spelled, and fit to be shown and kept."""
        text = plain(text, len(text))
        return self._secret.sub("***", text) if self._secret else text

    def _question(self, picture: Path, pair: Pair) -> tuple[dict[str, Any], int]:
        """The request about a picture, and how many tokens it has, about. The judge gets the pixels alone: ComfyUI
        writes the whole graph into its files."""
        image, out = self.form.seen(opened(picture)), BytesIO()
        image.save(out, "PNG")
        url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
        system, user = self.form.texts(pair)
        parts = [{"type": "text", "text": user}, {"type": "image_url", "image_url": {"url": url}}]
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": parts})
        return {"model": self.model, "messages": messages, "temperature": 0}, self._guess(image.size, pair)

    def _ask(self, body: dict[str, Any], guess: int) -> tuple[Scores, str]:
        schema = self._schema
        if schema:
            form = {"name": "verdict", "schema": self.form.schema(), "strict": True}
            body = {**body, "response_format": {"type": "json_schema", "json_schema": form}}
        status, wait, text = self._post(body)
        if status in (401, 403, 404):
            raise Broken(f"{self.address} answers {status} (key in {self.key_variable}? model?): {text[:300]}")
        if status == 400 and schema:
            self._schema = False
            raise Unusable(f"400, so without a schema next time: {text[:300]}")
        if status in LASTING:
            raise HostError(f"{self.address} answers {status}: {text[:300]}")
        if status != 200:
            raise Unusable(f"{status}: {text[:300]}", wait)
        return self._verdict(text, guess)

    def _post(self, body: dict[str, Any]) -> tuple[int, float, str]:
        """Status, wait that is asked for, and text. The whole answer has ``timeout`` seconds."""
        end = time.monotonic() + self.timeout
        try:
            url = f"{self.address.rstrip('/')}/chat/completions"
            options: dict[str, Any] = {"timeout": self.timeout, "stream": True, "allow_redirects": False}
            with requests.post(url, json=body, auth=self._sign, **options) as answer:
                data = b""
                for chunk in answer.iter_content(8192):
                    data += chunk
                    if len(data) > LARGEST_ANSWER:
                        raise Unusable(f"an answer of more than {LARGEST_ANSWER} bytes")
                    if time.monotonic() > end:
                        raise Unusable(f"no whole answer in {self.timeout:g} s")
                asked = re.fullmatch(r"[0-9]{1,6}", answer.headers.get("Retry-After", ""))
                wait = float(asked[0]) if asked else 0.0
                return answer.status_code, wait, self.clean(data.decode(errors="replace"))
        except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError, ValueError) as error:
            raise Unusable(self.clean(f"{type(error).__name__}: {error}")) from None

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """The key, if there is one; given as ``auth``, so that a netrc file puts in no other."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _verdict(self, text: str, guess: int) -> tuple[Scores, str]:
        try:
            answer = json.loads(text)
            content = answer["choices"][0]["message"]["content"]
            words = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
            usage = answer.get("usage") or {}
            asked, said = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            self._count(guess, len(text) // 4)
            raise Unusable(f"not a chat completion ({type(error).__name__}): {text[:300]}", said=True) from None
        self._count(_tokens(asked, guess), _tokens(said, len(words) // 4))
        words = self.clean(words)
        try:
            return self.form.read(words), words[:500]
        except ValueError as error:
            raise Unusable(
                f"not in the form asked for ({self.clean(str(error))[:200]}): {words[:300]}", said=True
            ) from None

    def _count(self, asked: int, said: int) -> None:
        with self._lock:
            self.tokens_in += asked
            self.tokens_out += said


def _tokens(told: Any, guess: int) -> int:
    """A server's count, if it can be one: none that is negative, endless or of another kind takes off what is spent."""
    fits = isinstance(told, (int, float)) and not isinstance(told, bool) and 0 < told <= MOST_TOKENS
    return int(told) if fits else guess


def _spellings(key: str) -> re.Pattern[str]:
    """Finds a key as it is, and as JSON, addresses and HTML may spell its characters."""
    spelled = (
        rf"(?:{re.escape(c)}|\\+{re.escape(c)}|\\+u{ord(c):04x}|\\+x{ord(c):02x}|%{ord(c):02x}|&#0*{ord(c)};|&#x0*{ord(c):x};)"
        if c.isascii()
        else re.escape(c)
        for c in key
    )
    return re.compile("".join(spelled) + "|" + re.escape(key), re.IGNORECASE)
