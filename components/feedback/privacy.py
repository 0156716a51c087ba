"""What may not be learned: secrets and personal data, found by libraries that know their shapes, and masked.

Keys and tokens by detect-secrets, telephone numbers by phonenumbers (with a country code, else they are
arithmetic), card and account numbers by python-stdnum's check digits. None of it loads a model or asks a network.
Names such as `package.function`, dotted versions and local addresses stay: code is what people talk of here.
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
"""Start, end, what it is."""

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
_SAID = re.compile(
    r"(?i)\b(?:pass(?:word|wd|phrase)?|secret|api[ _-]?key|token|pwd)\b[\"']?\s*(?:is|:|=)\s*[\"']?([^\s\"',;]{6,})"
)
_MIN_BITS = 2.5
"""Entropy per character, above which what follows `password is` is no word of a sentence."""
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
"""Of detect-secrets, those that know a shape; what guesses by entropy would take digests and names for secrets."""


def mask(text: str) -> str:
    """The text with `<SECRET>`, `<EMAIL_ADDRESS>`, `<PHONE_NUMBER>` and the like in place of what was found."""
    if len(text) < 6:
        return text
    parts, at = [], 0
    for start, end, what in _apart(found(text)):
        parts.append(f"{text[at:start]}<{what}>")
        at = end
    return "".join([*parts, text[at:]])


def _apart(spans: Iterable[Span]) -> list[Span]:
    """Spans in order that do not overlap: a secret is whole, and wins over what else it looks like."""
    taken: list[Span] = []
    for start, end, what in sorted(spans, key=lambda span: (span[2] != SECRET, span[0], -span[1])):
        others = [span for span in taken if span[0] < end and start < span[1]]
        if others and what != SECRET:
            continue
        for span in others:
            taken.remove(span)
            start, end = min(start, span[0]), max(end, span[1])
        taken.append((start, end, what))
    return sorted(taken)


def is_nothing_but_masks(masked: str) -> bool:
    """Whether masking left no word of a text that it masked."""
    return bool(MASK.search(masked)) and not re.search(r"\w", MASK.sub("", masked))


def found(text: str) -> Iterator[Span]:
    """Where secrets and personal data stand; spans may overlap."""
    yield from _secrets(text)
    for match in _EMAIL.finditer(text):
        if not _EXAMPLES.search(match[0]):
            yield match.start(), match.end(), "EMAIL_ADDRESS"
    yield from _numbers(text)
    for match in _ADDRESS.finditer(text):
        if _is_of_someone(match[0]):
            yield match.start(), match.end(), "IP_ADDRESS"


def _secrets(text: str) -> Iterator[Span]:
    for match in _PEM.finditer(text):
        yield match.start(), match.end(), SECRET
    for detector in _detectors():
        for secret in detector.analyze_string(text):
            if secret:
                yield from _places(text, str(secret))
    for pattern in (_BEARER, _SAID, _PREFIXED):
        for match in pattern.finditer(text):
            group = pattern.groups
            if pattern is not _SAID or _is_random(match[1]):
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


def _is_of_someone(text: str) -> bool:
    """Whether an address is a machine's on the internet, and no documentation's, network's or version's."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and int(address) >> 24 > 9 and text not in _FAMOUS


_FAMOUS = {"255.255.255.255", "192.88.99.1"}


def _is_random(word: str) -> bool:
    """Whether a word is more like a password than like a name: digits or marks among letters, few repeated."""
    plain = word.strip(".!?()[]<>`")
    mixed = bool(re.search(r"\d|[^\w.]", plain)) and bool(re.search(r"[A-Za-z]", plain))
    counts = Counter(plain).values()
    bits = -sum(count / len(plain) * math.log2(count / len(plain)) for count in counts) if plain else 0.0
    return mixed and bits >= _MIN_BITS and "(" not in plain and not MASK.search(word)


@cache
def _detectors() -> tuple[Any, ...]:
    from importlib import import_module

    made = []
    for name in _TOKENS:
        module, _, kind = name.partition(".")
        made.append(getattr(import_module(f"detect_secrets.plugins.{module}"), kind)())
    return tuple(made)
