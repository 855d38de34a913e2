"""Expressions that a slot refuses, and the ones that look like them."""

from __future__ import annotations

import pytest

from mlx_diffgemma.language.pattern import find_problem, syntax_problem


@pytest.mark.parametrize(
    ("pattern", "at", "reason"),
    [
        (r"(a)\1", 3, r"back-references are not supported: \1"),
        (r"(?P<x>a)(?P=x)", 8, "back-references"),
        (r"(?<x>a)\k<x>", 7, "back-references"),
        ("(?=a)", 0, "look-ahead and look-behind"),
        ("a(?!b)", 1, "look-ahead and look-behind"),
        ("(?<=a)b", 0, "look-ahead and look-behind"),
        ("b(?<!a)", 1, "look-ahead and look-behind"),
        (r"\bword\b", 0, "word boundaries"),
        (r"a\B", 1, "word boundaries"),
        ("^a", 0, r"leave out ^"),
        ("a$", 1, r"leave out $"),
        (r"\Aa", 0, r"leave out \A"),
        (r"a\z", 1, r"leave out \z"),
        (r"a\Z", 1, r"leave out \Z"),
        ("(?>a)", 0, "atomic groups"),
        ("(a)?(?(1)b)", 4, "conditional groups"),
        ("a(?#b)", 1, "comments"),
        ("(?R)", 0, "recursion"),
        ("a++", 1, "possessive quantifiers"),
        ("a{2}+", 1, "possessive quantifiers"),
        ("a)", 1, "closes nothing"),
        ("[^]]^", 4, "leave out ^"),
    ],
)
def test_what_is_not_supported_is_named_with_its_place(pattern, at, reason):
    problem = find_problem(pattern)
    assert problem is not None and problem.at == at and reason in problem.reason


@pytest.mark.parametrize(
    "pattern",
    [
        r"\\1",
        r"\$\^",
        "[$^a]",
        r"[^$\]]",
        "[]$]",
        "[a[$]^]",
        r"\(\?=",
        r"(?:a)(?P<n>b)(?<m>c)",
        r"(?i)a(?-i:b)",
        r"a+\+",
        r"\p{L}\x{41}",
        "a+?",
        r"\.\d\w\s",
    ],
)
def test_what_looks_like_it_is_left_alone(pattern):
    assert find_problem(pattern) is None


def test_what_python_says_is_passed_on_only_where_rust_agrees():
    assert syntax_problem("a(b") == (1, "missing ), unterminated subpattern")
    assert syntax_problem("a[b") == (1, "unterminated character set")
    assert syntax_problem(r"\p{L}(") is None
    assert syntax_problem("ab") is None
