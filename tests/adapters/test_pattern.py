"""The bounded regular expressions against Python's own and PEFT's, and against patterns made to run away."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from tenora.adapters import matching
from tenora.adapters import pattern as pattern_module
from tenora.adapters.matching import MAX_EXPRESSIONS, Expressions, KeyTable, layer_number
from tenora.adapters.pattern import MAX_LENGTH, Pattern, PatternError
from tenora.errors import AdapterFormatError

PATHS = [
    f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]

atoms = st.sampled_from(["a", "b", ".", r"\.", "1", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", r"[\d_]", r"\b", "^", "$"])
repeats = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,}", "{0,2}", "{,1}"])


def _join(parts: list[tuple[str, str]]) -> str:
    return "".join(atom + ("" if atom in (r"\b", "^", "$") else repeat) for atom, repeat in parts)


sequences = st.lists(st.tuples(atoms, repeats), max_size=4).map(_join)
patterns = st.recursive(
    sequences,
    lambda inner: st.builds(
        lambda options, opening, repeat, after: f"{opening}{'|'.join(options)}){repeat}{after}",
        st.lists(inner, min_size=1, max_size=3),
        st.sampled_from(["(", "(?:"]),
        repeats,
        sequences,
    ),
    max_leaves=4,
)


@given(patterns, st.lists(st.text("ab1._", max_size=6), max_size=5))
def test_equals_python(pattern: str, texts: list[str]) -> None:
    ours = Pattern(pattern)
    for text in texts:
        assert ours.fullmatch(text) == (re.fullmatch(pattern, text) is not None), (pattern, text)


# What adapters in the wild hold.
REAL = [
    r".*\.(q_proj|o_proj)",
    r"model\.layers\.(0|10)\..*",
    r".*(q_proj|down_proj)$",
    r"^model\.layers\.[01]\.mlp\.down_proj",
    r"model.layers.\d{2}.self_attn.[qo]_proj",
    (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|o_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))"
    ),
    r"(?P<layer>.*)\.mlp\.\w+",
    "q_proj",
    "",
]


@pytest.mark.parametrize("pattern", REAL)
def test_equals_python_on_module_paths(pattern: str) -> None:
    ours = Pattern(pattern)
    for path in PATHS:
        assert ours.fullmatch(path) == (re.fullmatch(pattern, path) is not None)


AHEAD = [
    r"^(?!.*visual).*\.(q_proj|o_proj)",
    r"(?!.*(?:visual|mlp)).*",
    r"(?=.*self_attn)(?!.*q_proj).*_proj",
    r"^(?=model\.)(?:(?:.*q_proj)|.*o_proj)$",
    r"^(?!(?:model\.)?layers\.1\.)[^(|]+",
]


@pytest.mark.parametrize("pattern", AHEAD)
def test_conditions_at_the_start_are_those_of_python(pattern: str) -> None:
    ours = Pattern(pattern)
    paths = [*PATHS, "model.visual.blocks.0.attn.q_proj", "lm_head"]
    assert [ours.fullmatch(path) for path in paths] == [re.fullmatch(pattern, path) is not None for path in paths]


REFUSED = [
    *(
        r".*(?=a)",
        r"(?!a)b|c",
        r"(?<=a)b",
        r"a(?#x)",
        r"(a)\1",
        r"(?P<x>a)(?P=x)",
        r"\p",
        r"\pL",
        r"[[:alpha:]]",
        "a++",
    ),
    *("(", ")", "a)", "[a", "[]", "a**", "*", "a{2}{3}", "{2}", "a{3,2}", "a{10000}", "(?>a)", "a\nb", "\ud800"),
    *("[b-a]", "\\", "(?P<>a)", "(?P<1>a)", "(?P<a", "^*", "a\\", "(?!a"),
    *("((a{99}){99}){99}", "(" * 1000 + ")" * 1000 + "(", "a" * (MAX_LENGTH + 1)),
]


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: ascii(pattern)[:20])
def test_what_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        Pattern(pattern)


def test_look_ahead_elsewhere_is_refused_with_what_to_do() -> None:
    with pytest.raises(AdapterFormatError, match=r"look-around is read only at the start.*List module names"):
        Expressions().compile("target_modules", r".*\.(?!visual).*q_proj")


EVIL = [
    *(r"(a+)+$", r"(.*)*x", r"(.|.)*x", r"(.*.*.*.*)*x", r"((.?){30}){30}x", r"((.?){60}){60}x", r"(.*,){11}P"),
    *("(.?)*" * 60 + "x", "(|.)*" * 60 + "x"),
]


@pytest.mark.parametrize("pattern", EVIL, ids=lambda pattern: pattern[:20])
def test_nothing_runs_away(pattern: str) -> None:
    """Each ends, with the right answer or with a refusal; by backtracking none would before the test is stopped."""
    paths = [f"model.layers.{i}.self_attn.{'a' * 40}!" for i in range(200)]
    try:
        matches = Pattern(pattern)
    except PatternError:
        return
    assert not any(matches.fullmatch(path) for path in paths)


def test_an_automaton_beyond_its_bound_is_refused() -> None:
    with pytest.raises(PatternError, match="too large"):
        Pattern("(?:.?){900}(?:.?){900}")


COSTLY = ["(?i)" + "[!-鿿]" * 400, "(?i)" + r"[!-\uffff]" * 150, r"(?i)[!-\U0010ffff]", r"\\\N{EM DASH}"]


@pytest.mark.parametrize("pattern", COSTLY, ids=lambda pattern: ascii(pattern)[:20])
def test_sets_beyond_ascii_are_refused_before_python_compiles_them(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each such set costs Python up to ten milliseconds, with the interpreter's lock held."""
    monkeypatch.setattr(pattern_module, "_require_python", lambda _: pytest.fail("it was compiled"))
    with pytest.raises(PatternError, match="characters that no module's name has"):
        Pattern(pattern)


def test_an_escaped_backslash_is_not_the_beginning_of_another_escape() -> None:
    assert Pattern(r"a\\up").fullmatch(r"a\up")


# Kinds of keys of which one configuration holds thousands; the last one's automata alone took minutes.
MANY = [
    [f"(x{i}|y)*z" for i in range(3000)],
    ["(a|b)*" * 30 + f"c{i}" for i in range(4000)],
    [f"(q{{900}}|k{{900}}){i}" for i in range(4000)],
    ["(a|b)" * 400 + f"c{i}" for i in range(6)],  # few, and long
]


@pytest.mark.parametrize("keys", MANY, ids=lambda keys: keys[0][:12])
def test_expressions_are_counted_before_they_are_compiled(keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    real = matching.Pattern
    monkeypatch.setattr(matching, "Pattern", lambda *args, **kwargs: compiled.append(args) or real(*args, **kwargs))
    with pytest.raises(AdapterFormatError, match="list the module names instead"):
        KeyTable("rank_pattern", dict.fromkeys(keys, 2), Expressions())
    assert len(compiled) <= MAX_EXPRESSIONS
    assert sum(len(text) for text, *_ in compiled) <= matching.MAX_CHARACTERS


KEYS = [
    *("q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "q.proj", "proj", "1.self_attn.q_proj", "."),
    *("^model.layers.0.self_attn.q_proj", "^q_proj", "q_proj$", r"self_attn\.q_proj", r"self_attn\.q\.proj", "x" * 60),
    *("^model.layers.0.self_attn.q_proj$", r"layers.\d+.mlp.down_proj", "self_attn.(q|o)_proj", ".*", "e.f.q_proj"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_as_peft_matches_it(key: str) -> None:
    table = KeyTable("rank_pattern", {key: True}, Expressions())
    for path in PATHS:
        assert table.get(path, False) == bool(re.match(rf"(.*\.)?({key})$", path)), path


@given(st.permutations(KEYS))
def test_the_first_key_that_matches_wins(keys: list[str]) -> None:
    table = KeyTable("rank_pattern", {key: key for key in keys}, Expressions())
    for path in PATHS:
        assert table.get(path, path) == get_pattern_key(keys, path)


@pytest.mark.parametrize(
    ("path", "after", "number"),
    [
        ("model.layers.3.mlp.up_proj", None, 3),
        ("model.layers.3.mlp.up_proj", "layers", 3),
        ("model.layers.3.mlp.up_proj", "model.layers", 3),
        ("model.layers.3.mlp.up_proj", "blocks", None),
        ("model.layers.3.experts.7.up_proj", None, 3),
        ("model.layers.3.experts.7.up_proj", "experts", 7),
        ("layers.3.up_proj", "layers", 3),
        ("layers.3.up_proj", None, None),
        ("model.layers.3", None, None),
        ("lm_head", None, None),
    ],
)
def test_layer_numbers_are_those_of_peft(path: str, after: str | None, number: int | None) -> None:
    assert layer_number(path, after) == number
    # PEFT's own expressions, tuners_utils.check_target_module_exists
    expression = r".*?\.[^.]*\.(?P<idx>\d+)\." if after is None else rf"(?:^|.*?\.){after}\.(?P<idx>\d+)\."
    match = re.match(expression, path)
    assert (None if match is None else int(match["idx"])) == number
