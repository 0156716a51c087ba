"""Masks secrets and personal data, which must not be trained on.

Keys and tokens by detect-secrets, telephone numbers by phonenumbers (with a country code, else they are arithmetic),
card and account numbers by python-stdnum's check digits. Nothing loads a model or uses the network. Names such as
`package.function`, dotted versions and local addresses are not masked: conversations are about code.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

Span = tuple[int, int, str]
"""Start, end, kind."""

SECRET = "SECRET"
MASK = re.compile(r"<[A-Z][A-Z_]+>")
_EMAIL = re.compile(r"\b[A-Za-z0-9][A-Za-z0-9._%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b")
_EXAMPLES = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.IGNORECASE)
_PHONE = re.compile(r"(?<![\w.+])\+\d[\d ()/.-]{6,20}\d(?![\w.])")
_DIGITS = re.compile(r"(?<![\w.+*/-])(?<![*/+] )\d(?:[ -]?\d){12,18}(?![\w*/-]|\.\d|\s*[*/+%])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_BEARER = re.compile(r"(?i)\bbearer\s+([A-Za-z0-9._~+/-]{16,}=*)")
_PREFIXED = re.compile(r"\b(?:sk-|gh[pousr]_|github_pat_)[A-Za-z0-9_-]{20,}")
_STATED = re.compile(
    r"(?i)\b(?:pass(?:word|wd|phrase)?|secret|api[ _-]?key|token|pwd)\b[\"']?\s*(?:is|:|=)\s*[\"']?([^\s\"',;]{6,})"
)
_MIN_BITS = 2.5
"""Entropy per character above which the word after `password is` is a secret, not prose."""
_TOKENS = (
    "artifactory.ArtifactoryDetector",
    "aws.AWSKeyDetector",
    "azure_storage_key.AzureStorageKeyDetector",
    "basic_auth.BasicAuthDetector",
    "discord.DiscordBotTokenDetector",
    "gitlab_token.GitLabTokenDetector",
    "jwt.JwtTokenDetector",
    "mailchimp.MailchimpDetector",
    "npm.NpmDetector",
    "openai.OpenAIDetector",
    "pypi_token.PypiTokenDetector",
    "sendgrid.SendGridDetector",
    "slack.SlackDetector",
    "square_oauth.SquareOAuthDetector",
    "stripe.StripeDetector",
    "telegram_token.TelegramBotTokenDetector",
    "twilio.TwilioKeyDetector",
)
"""The detectors of detect-secrets that match a format; those that estimate entropy mask digests and names."""


def mask(text: str) -> str:
    """The text with secrets and personal data replaced by `<SECRET>`, `<EMAIL_ADDRESS>`, `<PHONE_NUMBER>` etc."""
    if len(text) < 6:
        return text
    parts, at = [], 0
    for start, end, kind in _disjoint(spans_of(text)):
        parts.append(f"{text[at:start]}<{kind}>")
        at = end
    return "".join([*parts, text[at:]])


def _disjoint(spans: Iterable[Span]) -> list[Span]:
    """Sorted spans without overlaps: a secret absorbs those it overlaps, others are dropped."""
    disjoint: list[Span] = []
    for start, end, kind in sorted(spans, key=lambda span: (span[2] != SECRET, span[0], -span[1])):
        others = [span for span in disjoint if span[0] < end and start < span[1]]
        if others and kind != SECRET:
            continue
        for span in others:
            disjoint.remove(span)
            start, end = min(start, span[0]), max(end, span[1])
        disjoint.append((start, end, kind))
    return sorted(disjoint)


def is_nothing_but_masks(masked: str) -> bool:
    """Whether a masked text has no words but masks."""
    return bool(MASK.search(masked)) and not re.search(r"\w", MASK.sub("", masked))


def spans_of(text: str) -> Iterator[Span]:
    """Spans of secrets and personal data; they may overlap."""
    yield from _secrets(text)
    for match in _EMAIL.finditer(text):
        if not _EXAMPLES.search(match[0]):
            yield match.start(), match.end(), "EMAIL_ADDRESS"
    yield from _numbers(text)
    for match in _ADDRESS.finditer(text):
        if _is_public(match[0]):
            yield match.start(), match.end(), "IP_ADDRESS"


def _secrets(text: str) -> Iterator[Span]:
    for match in _PEM.finditer(text):
        yield match.start(), match.end(), SECRET
    for detector in _detectors():
        for secret in detector.analyze_string(text):
            if secret:
                yield from _places(text, str(secret))
    for pattern in (_BEARER, _STATED, _PREFIXED):
        for match in pattern.finditer(text):
            group = pattern.groups
            if pattern is not _STATED or _is_random(match[1]):
                yield match.start(group), match.end(group), SECRET


def _places(text: str, secret: str) -> Iterator[Span]:
    at = text.find(secret)
    while at >= 0:
        yield at, at + len(secret), SECRET
        at = text.find(secret, at + len(secret))


def _numbers(text: str) -> Iterator[Span]:
    import phonenumbers
    from stdnum import iban, luhn

    for match in _PHONE.finditer(text):
        try:
            number = phonenumbers.parse(match[0], None)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number):
            yield match.start(), match.end(), "PHONE_NUMBER"
    for match in _DIGITS.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if digits[0] in "23456" and len(set(digits)) > 1 and luhn.is_valid(digits):
            yield match.start(), match.end(), "CREDIT_CARD"
    for match in _IBAN.finditer(text):
        if iban.is_valid(match[0]):
            yield match.start(), match.end(), "IBAN_CODE"
    for match in _SSN.finditer(text):
        if not match[0].startswith(("000", "666", "9")):
            yield match.start(), match.end(), "US_SSN"


def _is_public(text: str) -> bool:
    """Whether an address is of a host on the internet: not documentation, a network or a version number."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and int(address) >> 24 > 9 and text not in _FAMOUS


_FAMOUS = {"255.255.255.255", "192.88.99.1"}


def _is_random(word: str) -> bool:
    """Whether a word is like a password: digits or symbols among letters, with high entropy."""
    plain = word.strip(".!?()[]<>`")
    mixed = bool(re.search(r"\d|[^\w.]", plain)) and bool(re.search(r"[A-Za-z]", plain))
    counts = Counter(plain).values()
    bits = -sum(count / len(plain) * math.log2(count / len(plain)) for count in counts) if plain else 0.0
    return mixed and bits >= _MIN_BITS and "(" not in plain and not MASK.search(word)


@cache
def _detectors() -> tuple[Any, ...]:
    from importlib import import_module

    detectors = []
    for name in _TOKENS:
        module, _, kind = name.partition(".")
        detectors.append(getattr(import_module(f"detect_secrets.plugins.{module}"), kind)())
    return tuple(detectors)
