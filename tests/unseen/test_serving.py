# ruff: noqa: E501  # one line for each case
"""Further prompts and names to serving, written before the code that reads them was looked at."""

import json

import pytest

from ovd_models.errors import InputError
from workflows.serving.fields import parse_attributes, parse_prompts
from workflows.serving.limits import Limits, ProblemError, as_problem
from workflows.serving.texts import parse_words

LIMITS = Limits()
BAD_PROMPTS = [
    "", "null", "7", "[]", '"points"', "{}", "{", '{"points": []}', '{"points": [[]]}', '{"points": [1, 2]}',
    '{"points": [[[1]]]}', '{"points": [[[1, 2, 3]]]}', '{"points": [[["1", "2"]]]}', '{"points": [[[null, 2]]]}',
    '{"points": [[[NaN, 2]]]}', '{"points": [[[Infinity, 2]]]}', '{"points": [[[1e400, 2]]]}', '{"points": [[[true, 2]]]}',
    '{"points": [[{"x": 1, "y": 2}]]}', '{"points": {"x": 1}}', '{"points": null}', '{"boxes": [[1, 2, 3]]}',
    '{"boxes": [[1, 2, 3, 4, 5]]}', '{"boxes": [[9, 2, 3, 4]]}', '{"boxes": [[1, 2, 1, 4]]}',
    '{"boxes": [[1, 2, "3", 4]]}', '{"boxes": "1,2,3,4"}', '{"point_labels": [[1]]}',
    '{"points": [[[1, 2]]], "point_labels": [[1, 0]]}', '{"points": [[[1, 2]]], "point_labels": [[2]]}',
    '{"points": [[[1, 2]]], "point_labels": [["1"]]}', '{"points": [[[1, 2]]], "labels": [[1]]}', '{"box": [[1, 2, 3, 4]]}',
    "[" * 100_000, '{"points":' * 50_000, '{"points": [[[' + "9" * 5000 + ", 2]]]}", '{"points": [[[1, 2]]]} x', "\ud800",
    "{'points': [[[1, 2]]]}", '\ufeff{"boxes": [[1, 2, 3, 4]]}',
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_PROMPTS, ids=lambda text: ascii(text[:40]))
def test_prompts_without_a_meaning_are_refused_in_one_line(text: str) -> None:
    with pytest.raises((ProblemError, InputError)) as caught:
        parse_prompts(text, LIMITS).checked(640, 480, 64)
    problem = as_problem(caught.value)
    assert problem.status_code == 422
    assert "\n" not in problem.detail
    assert len(problem.detail) < 400
    problem.detail.encode()


@pytest.mark.parametrize(
    "text",
    [
        '{"points": [[[1, 2]]]}',
        '{"boxes": [1, 2, 3, 4]}',
        '{"points": [[[1, 2]]], "point_labels": [1]}',
        '{"points": [[[1, 2]]], "boxes": [[1, 2, 3, 4]]}',
        '{"points": [[[1.5, 2e1]]]}',
        '{"points": [[[1, 2], [3, 4]]], "point_labels": [[1, 0]]}',
        '{"boxes": [[1, 2, 3, 4]]}',
        '{"boxes": [[0, 0, 0.5, 0.5]]}',
        ' {"boxes": [[1, 2, 3, 4]]}\n',
    ],
    ids=ascii,
)
def test_prompts_are_read(text: str) -> None:
    assert len(parse_prompts(text, LIMITS)) == 1


BAD_NAMES = [
    "", "umbrella", '"umbrella"', "7", "{}", "[1]", "[null]", '[""]', '[" "]', '["\\u200b"]', '["\\ud800"]', '["a\\u0000b"]',
    '[["a"]]', '[{"synonyms": ["a"]}]', '[{"name": 7}]', '[{"name": "a", "synonyms": "bc"}]', '[{"name": "a", "base": "no"}]',
    "[" * 100_000, '["a", "a"', "['a']", "[NaN]", "[]", '["' + "a" * 5000 + '"]', '[{"name": "a", "colour": "red"}]',
    "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_NAMES, ids=lambda text: ascii(text[:40]))
def test_names_that_are_none_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ProblemError) as caught:
        parse_words(text, LIMITS)
    assert caught.value.status_code == 422
    assert "\n" not in caught.value.detail
    assert len(caught.value.detail) < 400
    caught.value.detail.encode()


@pytest.mark.parametrize(
    "name",
    [
        "anchor",
        " anchor ",
        "caf\u00e9",
        "\u5716",
        "car, sedan",
        'a "b"',
        "\U0001f600",
        "{x}",
        "%s",
        "</script>",
        "null",
        "\u202ea",
        "\u0645\u06cc\u200c\u062e",
    ],
)
def test_any_name_is_read(name: str) -> None:
    words = json.loads(parse_words(json.dumps([name]), LIMITS).to_json())
    assert name.strip() in json.dumps(words, ensure_ascii=False).replace('\\"', '"')


@pytest.mark.parametrize(
    "text",
    ["red", '"red"', "[1]", '[""]', "{}", '["a", null]', "[" * 100_000, '["\\ud800"]', f'["{"a" * 101}"]'],
    ids=lambda text: ascii(text[:40]),
)
def test_words_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ProblemError) as caught:
        parse_attributes(text, LIMITS)
    assert caught.value.status_code == 422
    caught.value.detail.encode()
