"""JSON objects in the replies of chat models."""

import pytest

from bdpo_pl.evaluation.chat.replies import json_objects


def test_objects_between_words_are_found_in_order():
    reply = 'So: {"a": {"b": 1}} and ```json\n{"c": 2}\n``` {not one}'
    assert list(json_objects(reply)) == [{"a": {"b": 1}}, {"c": 2}]


@pytest.mark.parametrize(("strict", "found"), [(True, []), (False, [{"a": "one\ntwo"}])])
def test_bare_line_breaks_are_allowed_on_request(strict, found):
    assert list(json_objects('{"a": "one\ntwo"}', strict=strict)) == found


def test_number_of_tried_braces_is_limited():
    assert list(json_objects('{ { {"a": 1}', most=2)) == []
    assert list(json_objects('{ { {"a": 1}', most=3)) == [{"a": 1}]
