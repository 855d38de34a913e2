r"""Regular expressions as automata: what Rust's and Python's syntax share, and a little more.

    a  .  \n \t \r \f \v \a \0  \xHH \x{H...} \uHHHH \u{H...} \UHHHHHHHH  \. and other punctuation
    [abc] [a-z] [^0-9] [\d_]   \d \w \s \D \W \S   \p{Lu} \pL \P{..}: general categories
    (...)  (?:...)  (?P<name>...)  (?<name>...)  a|b
    * + ? {m} {m,} {m,n} {,n}, and with ? behind them: the same texts
    (?i) (?s) (?x) (?a) (?u) at the beginning or for a group (?i:...); (?m) where no anchor stands
    ^ \A at the beginning of the text, $ \z \Z at its end

`.` does not match a line feed; with (?s) it does. \d, \w and \s mean Unicode's digits, letters and
spaces, as in Python; with (?a) only those of ASCII. An expression matches a text as a whole.

A `pattern` of a JSON Schema is searched for anywhere in a text. Its dialects (ECMA 262, which the
standard names, and Python's, which validators in Python use) differ in \d, \w, \s, `.` and $. Read
narrowly, an expression matches what it matches in both; read widely, what it matches in either.

Refused, with the position: back-references, look-around, word boundaries, atomic, conditional and
recursive groups, possessive quantifiers, comments, set operations and POSIX classes.
"""

from __future__ import annotations

from typing import Any, Literal

from ..errors import ConstraintError
from .characters import Reading, any_case, category, dot, shorthand
from .dfa import DFA
from .net import Limits, Net, determinise
from .ranges import LAST, SCALARS, Ranges, common, single, union, without

_FLAGS = "aimsux"
_CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7}
_HEX = "0123456789abcdefABCDEF"
_GROUPS_REFUSED = {
    "(?=": "look-ahead and look-behind are not supported",
    "(?!": "look-ahead and look-behind are not supported",
    "(?<=": "look-ahead and look-behind are not supported",
    "(?<!": "look-ahead and look-behind are not supported",
    "(?P=": "back-references are not supported",
    "(?P>": "recursion is not supported",
    "(?&": "recursion is not supported",
    "(?R": "recursion is not supported",
    "(?>": "atomic groups are not supported",
    "(?(": "conditional groups are not supported",
    "(?#": "comments are not supported",
}
_ESCAPES_REFUSED = {
    **dict.fromkeys("123456789kg", "back-references are not supported"),
    **dict.fromkeys("bB<>", "word boundaries are not supported"),
    "G": "\\G is not supported",
    "K": "\\K is not supported",
}
_MOST_REPEATS = 10_000

# An expression as nested tuples: ("set", ranges), ("cat", parts), ("or", parts),
# ("repeat", part, low, high or None), ("anchor", is_end).
Node = tuple[Any, ...]
_NOTHING: Node = ("cat", ())


def regex(pattern: str, limits: Limits | None = None) -> DFA:
    """Return the automaton of the texts that an expression matches as a whole.

    Raises:
      ConstraintError: if it is invalid or unsupported, with the position, or matches no text.
      LimitError: if it is too large.
    """
    return compiled_node(parse(pattern, "unicode"), Net(limits), search=False)


def search(pattern: str, reading: Literal["narrow", "wide"], limits: Limits | None = None) -> DFA:
    """Return the automaton of the texts in which an expression of a JSON Schema is found.

    Raises:
      ConstraintError: as `regex`.
    """
    return compiled_node(parse(pattern, reading), Net(limits), search=True)


def parse(pattern: str, reading: Reading) -> Node:
    """Return an expression as a tree."""
    return _Parser(pattern, reading).whole()


def compiled_node(node: Node, net: Net, *, search: bool) -> DFA:
    start, begin = net.state(), net.state()
    net.skip(start, begin)
    if search:
        net.move(start, SCALARS, start)
    end = _lay(net, node, begin)
    if search:
        net.move(end, SCALARS, end)
    return determinise(net, start, end)


def _lay(net: Net, node: Node, at: int) -> int:
    """Put an expression into a net behind a state; return the state behind it."""
    kind = node[0]
    if kind == "set":
        end = net.state()
        net.move(at, node[1], end)
        return end
    if kind == "anchor":
        end = net.state()
        net.anchor(at, end, end=node[1])
        return end
    if kind == "cat":
        for part in node[1]:
            at = _lay(net, part, at)
        return at
    end = net.state()
    if kind == "or":
        for part in node[1]:
            begin = net.state()
            net.skip(at, begin)
            net.skip(_lay(net, part, begin), end)
        return end
    _, part, low, high = node
    for _ in range(low):
        at = _lay(net, part, _behind(net, at))
    if high is None:
        hub = _behind(net, at)
        net.skip(_lay(net, part, _behind(net, hub)), hub)
        net.skip(hub, end)
        return end
    for _ in range(high - low):
        net.skip(at, end)
        at = _lay(net, part, _behind(net, at))
    net.skip(at, end)
    return end


def _behind(net: Net, at: int) -> int:
    """Return a state of its own behind another, so that a loop of the next part stays its own."""
    state = net.state()
    net.skip(at, state)
    return state


class _Parser:
    """Reads an expression from left to right."""

    def __init__(self, pattern: str, reading: Reading) -> None:
        self._text, self._at = pattern, 0
        self._is_schema = reading in ("narrow", "wide")
        self._reading: Reading = reading
        self._flags: frozenset[str] = frozenset()
        self._depth = 0

    def whole(self) -> Node:
        node = self._alternatives()
        if self._at < len(self._text):
            raise self._error(self._at, "this ) closes nothing; write \\) for the character")
        return node

    def _error(self, at: int, reason: str) -> ConstraintError:
        shown = f'"{self._text}"' if self._text.isprintable() else repr(self._text)
        return ConstraintError(f"expression {shown}, character {at + 1}: {reason}", position=at)

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _takes(self, text: str) -> bool:
        if self._peek(text):
            self._at += len(text)
            return True
        return False

    def _alternatives(self) -> Node:
        if self._depth > 100:
            raise self._error(self._at, "groups are nested more than 100 deep")
        self._depth += 1
        flags = self._flags
        parts = [self._sequence()]
        while self._takes("|"):
            parts.append(self._sequence())
        self._flags = flags
        self._depth -= 1
        return parts[0] if len(parts) == 1 else ("or", tuple(parts))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if "x" in self._flags and self._passes_blank():
                continue
            start = self._at
            atom = self._atom()
            if atom is not None:
                parts.append(self._repeated(atom, start))
        return parts[0] if len(parts) == 1 else ("cat", tuple(parts))

    def _passes_blank(self) -> bool:
        if self._text[self._at].isspace():
            self._at += 1
            return True
        if self._text[self._at] == "#":
            end = self._text.find("\n", self._at)
            self._at = len(self._text) if end < 0 else end + 1
            return True
        return False

    def _atom(self) -> Node | None:
        """Return the next part; None for flags alone."""
        start = self._at
        character = self._text[start]
        if character == "(":
            return self._group()
        self._at += 1
        if character == "[":
            return ("set", self._class(start))
        if character == ".":
            return ("set", SCALARS if "s" in self._flags else dot(self._meaning()))
        if character in "^$":
            if "m" in self._flags:
                raise self._error(start, "anchors of lines, as (?m) has them, are not supported")
            return self._end_anchor() if character == "$" else ("anchor", False)
        if character in "*+?":
            raise self._error(start, f"there is nothing to repeat; write \\{character}")
        if character == "{" and self._is_count(start):
            raise self._error(start, "there is nothing to repeat; write \\{")
        if character == "\\":
            return self._escape(start)
        return ("set", self._letters(single(ord(character))))

    def _end_anchor(self) -> Node:
        """Return $: in Python it also stands before a line feed at the end."""
        if self._reading != "wide":
            return ("anchor", True)
        return ("or", (("anchor", True), ("cat", (("set", single(10)), ("anchor", True)))))

    def _meaning(self) -> Reading:
        return "ascii" if "a" in self._flags and self._reading == "unicode" else self._reading

    def _letters(self, symbols: Ranges) -> Ranges:
        symbols = common(symbols, SCALARS)
        if "i" not in self._flags:
            return symbols
        ascii_only = "a" in self._flags or self._reading == "narrow"
        return common(any_case(symbols, ascii_only=ascii_only), SCALARS)

    def _group(self) -> Node | None:
        start = self._at
        for form, reason in _GROUPS_REFUSED.items():
            if self._peek(form):
                raise self._error(start, f"{reason}: {form}")
        self._at += 1
        flags = self._flags
        if self._takes("?"):
            if self._takes("P<") or self._takes("<"):
                if self._is_schema and self._text[self._at - 2] != "P":
                    raise self._error(start, "(?<name> is not supported in a schema; write (?:")
                end = self._text.find(">", self._at)
                if end < 0 or not self._text[self._at : end].isidentifier():
                    raise self._error(start, "this group has no valid name")
                self._at = end + 1
            elif not self._takes(":") and self._sets_flags(start):
                return None
        node = self._alternatives()
        self._flags = flags
        if not self._takes(")"):
            raise self._error(start, "this ( is not closed; write \\( for the character")
        return node

    def _sets_flags(self, start: int) -> bool:
        """Read flags; return whether they are for the rest of the group around them."""
        on, off, is_on = set[str](), set[str](), True
        while self._at < len(self._text) and self._text[self._at] in _FLAGS + "-":
            letter = self._text[self._at]
            self._at += 1
            if letter == "-":
                if not is_on:
                    break
                is_on = False
            else:
                (on if is_on else off).add(letter)
        if "u" in on:
            off.add("a")
        flags = (self._flags | on) - off - {"u"}
        if (on or off) and self._takes(")"):
            self._flags = flags
            return True
        if not (on or off) or not self._takes(":"):
            known = ", ".join(_FLAGS)
            raise self._error(start, f"this group is not supported; flags are {known}")
        self._flags = flags
        return False

    def _repeated(self, atom: Node, start: int) -> Node:
        times = 0
        while (counts := self._quantifier()) is not None:
            at, low, high = counts
            if times:
                raise self._error(at, "a quantifier behind another is not supported; use a group")
            if high is not None and low > high:
                raise self._error(at, f"{low} is more than {high}")
            if max(low, high or 0) > _MOST_REPEATS:
                raise self._error(at, f"more than {_MOST_REPEATS} repeats are not supported")
            if self._peek("+"):
                raise self._error(self._at, "possessive quantifiers are not supported")
            self._takes("?")
            atom = ("repeat", atom, low, high)
            times += 1
        return atom

    def _quantifier(self) -> tuple[int, int, int | None] | None:
        """Return place and counts of a quantifier that comes next."""
        while "x" in self._flags and self._at < len(self._text) and self._passes_blank():
            pass
        at = self._at
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return at, *counts
        if not self._peek("{") or not self._is_count(at):
            return None
        end = self._text.index("}", at)
        low, comma, high = self._text[at + 1 : end].partition(",")
        self._at = end + 1
        return at, int(low or 0), (int(high) if high else None) if comma else int(low)

    def _is_count(self, at: int) -> bool:
        """Return whether a { begins a count, which is a character otherwise, as in Python."""
        low, comma, high = self._text[at + 1 : max(at + 1, self._text.find("}", at))].partition(",")
        is_number = all(not part or (part.isascii() and part.isdigit()) for part in (low, high))
        # In ECMA 262 {,3} is text, in Python a count: a schema's reading cannot be both.
        if is_number and comma and high and not low and self._is_schema:
            raise self._error(at, "{,n} has two readings; write {0,n}")
        return is_number and bool(low or (comma and high))

    def _escape(self, start: int) -> Node:
        """Read what follows a backslash outside of a class."""
        letter = self._text[self._at : self._at + 1]
        if letter and letter in "AzZ":
            if self._is_schema:
                raise self._error(start, f"\\{letter} is not supported in a schema; write ^ or $")
            self._at += 1
            return ("anchor", letter != "A")
        return ("set", self._letters(self._escaped(start)))

    def _escaped(self, start: int) -> Ranges:
        """Return the set of an escape, of which the backslash is read."""
        letter = self._text[self._at : self._at + 1]
        self._at += 1
        if not letter:
            raise self._error(start, "a backslash at the end; write \\\\ for the character")
        if letter in "dwsDWS":
            return shorthand(letter, self._meaning())
        if self._is_schema and letter in "aU":
            raise self._error(start, f"\\{letter} is not supported in a schema")
        if letter in _CONTROLS:
            return single(_CONTROLS[letter])
        if letter == "0" and not self._text[self._at : self._at + 1].isdigit():
            return single(0)
        if letter in "xuU":
            return single(self._code(start, letter))
        if letter in "pP":
            return self._category(start, letter)
        if letter in _ESCAPES_REFUSED:
            raise self._error(start, f"{_ESCAPES_REFUSED[letter]}: \\{letter}")
        if letter.isascii() and letter.isalnum():
            raise self._error(start, f"\\{letter} is not supported")
        return single(ord(letter))

    def _code(self, start: int, letter: str) -> int:
        r"""Return the code point of \xHH and its kin."""
        if self._peek("{") and letter in "xu":
            end = self._text.find("}", self._at)
            digits = self._text[self._at + 1 : max(end, self._at + 1)]
            behind = end + 1
            if self._is_schema:
                raise self._error(start, f"\\{letter}{{...}} is not supported in a schema")
        else:
            behind = self._at + {"x": 2, "u": 4, "U": 8}[letter]
            digits = self._text[self._at : behind]
            if len(digits) < behind - self._at:
                digits = ""
        if not digits or set(digits) - set(_HEX) or int(digits, 16) > LAST:
            raise self._error(start, f"\\{letter} needs the hexadecimal number of a character")
        self._at = behind
        return int(digits, 16)

    def _category(self, start: int, letter: str) -> Ranges:
        if self._is_schema:
            raise self._error(start, f"\\{letter} is not supported in a schema")
        if self._takes("{"):
            end = self._text.find("}", self._at)
            name = self._text[self._at : max(end, self._at)]
            self._at = end + 1
        else:
            name = self._text[self._at : self._at + 1]
            self._at += 1
        found = category(name)
        if found is None:
            raise self._error(start, f"{name!r} is no general category such as L, Lu or Nd")
        return found if letter == "p" else without(SCALARS, found)

    def _class(self, start: int) -> Ranges:
        """Return the set of a class, of which the [ is read."""
        is_negated = self._takes("^")
        if self._is_schema and self._peek("]"):
            raise self._error(start, "[] has two readings; write [\\]] for the character")
        reading = self._reading
        if is_negated and self._is_schema:  # what a class leaves out is read the other way
            self._reading = "wide" if reading == "narrow" else "narrow"
        found: list[tuple[int, int]] = []
        is_first = True
        while is_first or not self._peek("]"):
            if self._at >= len(self._text):
                raise self._error(start, "this [ is not closed; write \\[ for the character")
            found += self._range()
            is_first = False
        self._at += 1
        symbols = self._letters(union(found))
        self._reading = reading
        return without(SCALARS, symbols) if is_negated else symbols

    def _range(self) -> Ranges:
        """Return one character, range or set of a class."""
        at = self._at
        low = self._member()
        if not self._peek("-") or self._text[self._at + 1 : self._at + 2] in ("]", ""):
            return low
        self._at += 1
        high = self._member()
        if any(len(part) != 1 or part[0][0] != part[0][1] for part in (low, high)):
            raise self._error(at, "a range needs one character at each end")
        if low > high:
            raise self._error(at, "this range ends before it begins")
        return ((low[0][0], high[0][0]),)

    def _member(self) -> Ranges:
        at = self._at
        for form in ("[:", "&&", "--", "~~"):
            if self._peek(form) and not (form == "--" and self._text[at + 2 : at + 3] == "]"):
                raise self._error(at, f"{form} in a class is not supported")
        if self._peek("[") and not self._is_schema:
            raise self._error(at, "a class in a class is not supported; write \\[")
        character = self._text[at : at + 1]
        self._at += 1
        if character != "\\":
            return single(ord(character)) if character else ()
        if self._peek("b"):
            self._at += 1
            return single(8)
        return self._escaped(at)
