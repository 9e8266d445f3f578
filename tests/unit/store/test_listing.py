"""Where a page of the list of sessions ends, and how titles are found."""

import pytest

from bamboo.store.listing import fold_title, page_token, parse_page_token


def test_page_token_is_read_back_and_nonsense_is_not() -> None:
    assert parse_page_token(page_token(1_700_000_000_000, 12)) == (1_700_000_000_000, 12)
    for nonsense in ("", "1", "1-", "-1", "g-1", "1-2-3", "1" * 16 + "-1", " 1-2"):
        with pytest.raises(ValueError, match="token"):
            parse_page_token(nonsense)


def test_titles_are_compared_without_case() -> None:
    assert fold_title("STRASSE") in fold_title("die Straße")
    assert fold_title(None) == b""
    assert fold_title("\ud83d")
