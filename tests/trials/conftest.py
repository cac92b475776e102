"""What most tests of comparisons compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparisons import write_comparison


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A regression merge of two experts with a base, and calibration texts of which some are left over."""
    return write_comparison(tmp_path)
