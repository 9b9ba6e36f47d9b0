import pyarrow as pa
import pytest

from data_prep.pairs.filters import FilterConfig, clean_caption, failed_filters, filter_rows

LIMITS = FilterConfig(min_side=32, max_aspect=3.0, min_contrast=2.0, min_caption=3, max_caption=40, min_letters=0.5)
GOOD = {"width": 64, "height": 48, "contrast": 30.0, "caption": "a red umbrella"}


def test_a_good_row_is_kept() -> None:
    assert list(failed_filters(LIMITS, **GOOD)) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 31, "height": 31}, "too_small"),
        ({"width": 64, "height": 31}, "too_small"),
        ({"width": 145, "height": 48}, "aspect"),
        ({"width": 32, "height": 97}, "aspect"),
        ({"contrast": 1.99}, "blank"),
        ({"caption": ""}, "caption_length"),
        ({"caption": "ab"}, "caption_length"),
        ({"caption": "a" * 41}, "caption_length"),
        ({"caption": "?!?! ... !?!?"}, "caption_characters"),
        ({"caption": "1234567890"}, "caption_characters"),
        ({"caption": "abc 1234"}, "caption_characters"),  # 3 letters of 7
    ],
)
def test_the_reason_is_the_filter_that_trips(change: dict[str, object], reason: str) -> None:
    rejection = next(failed_filters(LIMITS, **{**GOOD, **change}))
    assert rejection.reason == reason
    assert rejection.detail


@pytest.mark.parametrize(
    "change",
    [
        {"width": 32, "height": 32},
        {"width": 144, "height": 48},
        {"contrast": 2.0},
        {"caption": "cat"},
        {"caption": "a" * 40},
        {"caption": "abcd 1234"},
        {"caption": "白い猫"},
        {"caption": "кот на столе"},
        {"caption": "हिन्दी"},  # its vowel signs are marks, not letters
    ],
)
def test_limits_are_inclusive_and_know_every_script(change: dict[str, object]) -> None:
    assert list(failed_filters(LIMITS, **{**GOOD, **change})) == []


def test_filters_fail_in_order() -> None:
    failed = failed_filters(LIMITS, width=1, height=100, contrast=0.0, caption="")
    assert [rejection.reason for rejection in failed] == ["too_small", "aspect", "blank", "caption_length"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (None, ""),
        ("", ""),
        ("plain", "plain"),
        ("  two\n\t words  ", "two words"),
        ("salt &amp; pepper", "salt & pepper"),
        ("a<b>bold</b>claim", "a bold claim"),
        ("&lt;i&gt;hidden&lt;/i&gt; tags", "hidden tags"),
        ('<a href="x?a=1&amp;b=2">a cat</a>', "a cat"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("I <3 cats", "I <3 cats"),
        ("cafe\u0301", "café"),
        ("\u202eevil\u202c", "evil"),
        ("\ufeffbom\x07\x00", "bom"),
        ("no\u00a0break", "no break"),
        ("zero\u200bwidth", "zerowidth"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # the joiner is part of the word
        ("half \ud800 pair", "half pair"),
    ],
)
def test_captions_are_cleaned(raw: str | None, clean: str) -> None:
    assert clean_caption(raw) == clean
    assert clean_caption(clean) == clean


def test_of_rows_that_are_not_kept_the_first_of_each_reason_shows_its_picture() -> None:
    rows = pa.table(
        {
            "raw_caption": pa.array(["<b>a cat</b>", "a dog", None, "a cow", "a pig"], pa.string()),
            "original_width": pa.array([64, 8, 64, None, 9], pa.int32()),
            "original_height": pa.array([64, 64, 64, None, 64], pa.int32()),
            "contrast": pa.array([30.0, 30.0, 30.0, None, 30.0], pa.float32()),
            "content": pa.array([b"1", b"2", b"3", None, b"5"], pa.large_binary()),
            "stage": pa.array([None, None, None, "fetch", None], pa.string()),
            "reason": pa.array([None, None, None, "dns", None], pa.string()),
            "detail": pa.array([None, None, None, "", None], pa.string()),
        }
    )
    found = filter_rows(rows, FilterConfig())
    assert found["reason"].to_pylist() == [None, "too_small", "caption_length", "dns", "too_small"]
    assert found["stage"].to_pylist() == [None, "filter", "filter", "fetch", "filter"]
    assert found["content"].to_pylist() == [b"1", b"2", b"3", None, None]
    assert found["caption"].to_pylist() == ["a cat", "a dog", "", "a cow", "a pig"]
    assert found["raw_caption"].to_pylist() == rows["raw_caption"].to_pylist()
    assert "contrast" not in found.column_names
    assert filter_rows(rows.slice(0, 0), FilterConfig()).num_rows == 0
