"""Generation with programs that compile three times faster."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_programs(quick_generation):
    """In every module here."""
