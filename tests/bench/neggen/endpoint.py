"""A multimodal model behind an OpenAI-compatible address (vLLM, llama.cpp, Ollama, hosted) as a judge."""

import base64
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import requests
from hosting.errors import HostError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from neggen.pairs import Pair

KEY_VARIABLE = "NEGGEN_API_KEY"
ASK = """You judge one generated picture. Answer with one JSON object and nothing else:
{{"positive": P, "negative": N, "quality": Q}}
P: 1 if the answer to question 1 is yes, 0 if it is no.
N: 1 if the answer to question 2 is yes, 0 if it is no, 0.5 if it is partly so.
Q: from 0 to 1, how good the picture looks: sharp, coherent, free of artefacts. Something is missing from it on purpose;
do not lower Q for that.
Question 1: {0.question_1}
Question 2: {0.question_2}"""
LARGEST_ANSWER = 2**20
LONGEST_WAIT = 60.0
PATCH, ANSWER_TOKENS, SECONDS = 28, 60, 4.0
"""For the estimate: pixels of a side of an image token, tokens of an answer, seconds of one."""


class Verdict(BaseModel):
    """The paper's three scores."""

    model_config = ConfigDict(allow_inf_nan=False)
    positive: float = Field(ge=0, le=1)
    negative: float = Field(ge=0, le=1)
    quality: float = Field(ge=0, le=1)


class Unusable(Exception):
    """An answer that another try may better. wait: seconds that the server asked for."""

    def __init__(self, words: str, wait: float = 0.0) -> None:
        super().__init__(words)
        self.wait = wait


class Broken(HostError):
    """The endpoint will give no answer to anything: a wrong key, model or address."""


@dataclass
class Endpoint:
    """Judges pictures, several at a time if asked from several threads. prices: for a million tokens in and out.

    The key is read from the environment, sent to this address alone, and taken out of whatever is shown or kept.
    """

    address: str
    model: str
    key_variable: str = KEY_VARIABLE
    prices: tuple[float, float] = (0.0, 0.0)
    tries: int = 6
    timeout: float = 120.0
    first_wait: float = 1.0
    tokens_in: int = 0
    tokens_out: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise HostError("--endpoint takes http(s)://host/v1, without a user or password in it")
        self._key, self._lock, self._schema = os.environ.get(self.key_variable, ""), Lock(), True

    @property
    def cost(self) -> float:
        """Of the answers so far."""
        return self._cost(self.tokens_in, self.tokens_out)

    def _cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def estimate(self, pictures: Sequence[tuple[tuple[int, int], Pair]], at_once: int) -> str:
        """What judging pictures of these sizes would take: tokens, cost, and a guess at the time."""
        tokens = 0.0
        for (width, height), pair in pictures:
            tokens += len(ASK.format(pair)) / 4 + math.ceil(width / PATCH) * math.ceil(height / PATCH)
        answers = ANSWER_TOKENS * len(pictures)
        cost = f"{self._cost(tokens, answers):.2f} at the given prices" if any(self.prices) else "no prices were given"
        minutes = len(pictures) * SECONDS / at_once / 60
        return (
            f"{len(pictures)} pictures to {self.model}: about {tokens:,.0f} tokens in, {answers:,} out; cost: {cost}; "
            f"time: {minutes:.1f} min if an answer takes {SECONDS:g} s, {at_once} at a time"
        )

    def judge(self, picture: Path, pair: Pair) -> tuple[tuple[float, float, float], str]:
        """The scores and the model's own words. Raises HostError when no try gives a valid answer."""
        retrying = Retrying(
            retry=retry_if_exception_type(Unusable),
            stop=stop_after_attempt(self.tries),
            wait=self._pause,
            reraise=True,
        )
        try:
            verdict, words = retrying(self._ask, picture, pair)
        except Unusable as error:
            raise HostError(f"no usable answer in {self.tries} tries; the last: {error}") from None
        return (verdict.positive, verdict.negative, verdict.quality), words[:500]

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        usual = wait_exponential_jitter(multiplier=self.first_wait, max=LONGEST_WAIT, jitter=self.first_wait)(state)
        return min(LONGEST_WAIT, max(usual, getattr(error, "wait", 0.0)))

    def clean(self, text: str) -> str:
        """Without the key."""
        return text.replace(self._key, "***") if self._key else text

    def _ask(self, picture: Path, pair: Pair) -> tuple[Verdict, str]:
        image = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        parts = [{"type": "text", "text": ASK.format(pair)}, {"type": "image_url", "image_url": {"url": image}}]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": parts}], "temperature": 0}
        schema = self._schema
        if schema:
            form = {"name": "verdict", "schema": {**Verdict.model_json_schema(), "additionalProperties": False}}
            body["response_format"] = {"type": "json_schema", "json_schema": {**form, "strict": True}}
        status, wait, text = self._post(body)
        if status in (401, 403, 404):
            raise Broken(f"{self.address} answers {status} (key in {self.key_variable}? model?): {text[:300]}")
        if status == 400 and schema:
            self._schema = False
            raise Unusable(f"400, so without a schema next time: {text[:300]}")
        if status != 200:
            raise Unusable(f"{status}: {text[:300]}", wait)
        return self._verdict(text)

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
                asked = answer.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() else 0.0
                return answer.status_code, wait, self.clean(data.decode(errors="replace"))
        except requests.RequestException as error:
            raise Unusable(self.clean(f"{type(error).__name__}: {error}")) from None

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """The key, if there is one; given as ``auth``, so that a netrc file puts in no other."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _verdict(self, text: str) -> tuple[Verdict, str]:
        try:
            answer = json.loads(text)
            content = answer["choices"][0]["message"]["content"]
            words = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
            usage = answer.get("usage") or {}
            with self._lock:
                self.tokens_in += int(usage.get("prompt_tokens") or 0)
                self.tokens_out += int(usage.get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise Unusable(f"not a chat completion ({type(error).__name__}): {text[:300]}") from None
        problem = "no JSON object in it"
        for found in reversed(re.findall(r"\{[^{}]*\}", words)):  # the last: models think aloud first
            try:
                return Verdict.model_validate_json(found), words
            except ValidationError as error:
                problem = str(error.errors(include_url=False)[0]["msg"])
        raise Unusable(f"not the three scores ({problem}): {words[:300]}")
