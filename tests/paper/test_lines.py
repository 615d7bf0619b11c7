import pytest

from benchmarks.paper.lines import key_of, open_lines, read_lines
from peft_sae.errors import ArtifactError


def test_rows_are_there_when_a_file_is_opened_again(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    with open_lines(path) as cache:
        cache.add("a", {"text": "über\n"})
        cache.add("b", {"text": "two"})
        assert read_lines(path) == cache
    with open_lines(path) as cache:
        assert dict(cache) == {"a": {"text": "über\n"}, "b": {"text": "two"}}


def test_a_line_that_a_stop_has_cut_is_left_out_and_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a", "x": 1}\n{"key": "b", "x"')
    with open_lines(path) as cache:
        assert dict(cache) == {"a": {"x": 1}}
        cache.add("b", {"x": 2})
    assert read_lines(path) == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize("line", ["{", "[1]", '{"x": 1}', "7"])
def test_a_damaged_line_is_told(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"key": "a", "x": 1}}\n{line}\n{{"key": "b", "x": 1}}\n')
    with pytest.raises(ArtifactError, match=r"Line 2 of .*rows\.jsonl' is no row of a cache.*Remove the line"):
        read_lines(path)


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open_lines(path), pytest.raises(ArtifactError), open_lines(path):
        pass


def test_a_key_tells_everything_apart():
    assert len({key_of(*parts) for parts in (("a", "b"), ("ab",), ("a", None), ({"a": 1},), ({"a": 2},))}) == 5
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
