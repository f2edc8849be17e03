"""The page of promises shows the table that the tests make."""

from __future__ import annotations

from faults.cases import PAGE, filled


def test_the_page_is_up_to_date() -> None:
    """``PYTHONPATH=.:tests python -m faults.cases`` writes it anew."""
    page = PAGE.read_text()
    assert filled(page) == page
