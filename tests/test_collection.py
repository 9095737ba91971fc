"""Every notebook keeps every rule of the collection (chapter_rules.py)."""

import pytest

from experiments.collection import reading_order
from tests import chapter_rules as rules


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", reading_order(rules.FOLDER), ids=lambda path: path.name)
def test_every_notebook(path, rule):
    rule(rules.Chapter(path))


def test_the_index_lists_all_notebooks_in_reading_order():
    rules.check_index(rules.FOLDER)
    assert reading_order(rules.FOLDER)
