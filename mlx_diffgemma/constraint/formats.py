"""The formats of JSON Schema's strings as expressions. Each matches a part of what its RFC allows,
and nothing else; where validators differ, what all of them accept."""

from __future__ import annotations

from functools import lru_cache

from .build import difference, intersection
from .dfa import DFA
from .regex import regex

_YEAR = "[0-9]{4}"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    f"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
    "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(\.{_OCTET}){{3}}"
_H = "[0-9A-Fa-f]{1,4}"
_LAST32 = f"({_H}:{_H}|{_IPV4})"
_IPV6 = "|".join(
    [f"({_H}:){{6}}{_LAST32}", f"::({_H}:){{5}}{_LAST32}"]
    + [f"(({_H}:){{0,{n}}}{_H})?::({_H}:){{{4 - n}}}{_LAST32}" for n in range(4)]
    + [f"(({_H}:){{0,4}}{_H})?::{_LAST32}"]
    + [f"(({_H}:){{0,5}}{_H})?::{_H}", f"(({_H}:){{0,6}}{_H})?::"]
)
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,60}[A-Za-z0-9])?"
_ATEXT = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_DOMAIN = "[A-Za-z0-9]+(-+[A-Za-z0-9]+)*"
_HEX = "[0-9A-Fa-f]"
_PCT = f"%{_HEX}{{2}}"
_UCS = "\\u00a0-\\ud7ff\\uf900-\\ufdcf\\ufdf0-\\uffef"


def _uri(more: str, *, is_reference: bool = False) -> str:
    """Return RFC 3986's URI, or its relative reference too, with more letters for an IRI, without
    hosts that are addresses in brackets: these have 150 states of their own."""
    plain = rf"A-Za-z0-9._~!$&'()*+,;={more}\-"
    pchar = f"([{plain}:@]|{_PCT})"
    authority = f"(([{plain}:]|{_PCT})*@)?([{plain}]|{_PCT})*(:[0-9]*)?"
    tail = rf"(\?({pchar}|[/?])*)?(#({pchar}|[/?])*)?"
    slashed = f"//{authority}(/{pchar}*)*|/({pchar}+(/{pchar}*)*)?"
    whole = f"[A-Za-z][A-Za-z0-9+.-]*:({slashed}|{pchar}+(/{pchar}*)*|){tail}"
    if not is_reference:
        return whole
    no_colon = f"([{plain}@]|{_PCT})"
    return f"{whole}|({slashed}|{no_colon}+(/{pchar}*)*|){tail}"


_EXPRESSIONS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([0-9]+W|(DATE(TIME)?|TIME))".replace(
        "DATE", "([0-9]+Y([0-9]+M([0-9]+D)?)?|[0-9]+M([0-9]+D)?|[0-9]+D)"
    ).replace("TIME", "T([0-9]+H([0-9]+M([0-9]+S)?)?|[0-9]+M([0-9]+S)?|[0-9]+S)"),
    "email": rf"{_ATEXT}+(\.{_ATEXT}+)*@{_DOMAIN}(\.{_DOMAIN})*",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": f"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "uri": _uri(""),
    "uri-reference": _uri("", is_reference=True),
    "iri": _uri(_UCS),
    "iri-reference": _uri(_UCS, is_reference=True),
    "json-pointer": "(/([^/~]|~[01])*)*",
    "relative-json-pointer": "(0|[1-9][0-9]*)(#|(/([^/~]|~[01])*)*)",
}
_EXPRESSIONS["idn-email"] = _EXPRESSIONS["email"]
_EXPRESSIONS["idn-hostname"] = _EXPRESSIONS["hostname"]
_EXPRESSIONS["ip-address"] = _IPV4  # draft 3
# Those of the standard that no expression here can hold; every other name is an annotation.
UNSUPPORTED = ("regex", "uri-template")
_YEAR_ZERO = "0000-.*"


@lru_cache(32)
def format_texts(name: str) -> DFA | None:
    """Return the automaton of a format, or None for one that is not of the standard."""
    if name not in _EXPRESSIONS:
        return None
    found = regex(_EXPRESSIONS[name])
    if name in ("date", "date-time"):
        return difference(found, regex(_YEAR_ZERO))
    if name.endswith("hostname"):
        return intersection(found, regex("(..?|..[^-].*|..-[^-].*)"))  # "xn--" has more rules
    return found
