"Tables of settings are tables on the site as well: a row is one line, however long the docstring."

from dataclasses import fields

import pytest

from neighbor_grpo.rivals.catalogue import ALGORITHMS
from neighbor_grpo.tables import settings_table


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_every_setting_is_one_row(kind):
    header, marks, *rows = settings_table(kind).splitlines()
    assert [row.split("`")[1] for row in rows] == [field.name for field in fields(kind)]
    assert all(row.startswith("| ") and row.endswith(" |") for row in rows)
