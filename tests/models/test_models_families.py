"""The table of families: what it promises, and that reading it is cheap."""

from __future__ import annotations

import subprocess
import sys

from latent_tool.models.families import family, supported


def test_the_table_is_read_without_torch_or_transformers():
    code = (
        "import sys; from latent_tool.models.families import supported; assert len(supported()) == 18; "
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_are_complete():
    rows = supported()
    assert len({row.model_type for row in rows}) == len(rows)
    for row in rows:
        assert family(row.model_type) is row
        assert row.example.count("/") == 1
        assert callable(row.cells)
        assert row.own_processor == ("torchvision" not in row.needs)
