"""The answers of a running cell.

Each is on disk once it is set, and comes back as it was; a damaged one is asked again.
"""

from dataclasses import dataclass

import pytest

from secateur.answers import Answers

CELL = "digest of the cell's identity"


@dataclass(frozen=True)
class Audit:
    counts: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    notes: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Given:
    text: str
    seconds: float
    audit: Audit


def given(text: str) -> Given:
    return Given(text, 0.1 + 0.2, Audit((1, 2), ((3,), ()), {"entropy": (1e-300, float("inf"))}))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task" / "cell.answers.jsonl"


def fill(path, *numbers: int) -> None:
    with Answers(path, Given, CELL) as answers:
        for number in numbers:
            answers["pope", number] = given(f"yes\r\n\u2028 {number}")


def test_answers_come_back_as_they_were(path):
    fill(path, 0, 7)
    with Answers(path, Given, CELL) as answers:
        assert answers == {("pope", n): given(f"yes\r\n\u2028 {n}") for n in (0, 7)}
        answers["pope", 8] = given("")
    with Answers(path, Given, CELL) as answers:
        assert len(answers) == 3


def test_an_answer_is_on_disk_at_once(path):
    with Answers(path, Given, CELL) as answers:
        answers["pope", 0] = given("no")
        assert len(Answers(path, Given, CELL)) == 1


def test_nothing_answered_leaves_no_file(path):
    fill(path)
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_line_is_dropped_and_the_file_goes_on(path, cut, caplog):
    fill(path, 0, 1)
    path.write_bytes(path.read_bytes()[:-cut])
    with Answers(path, Given, CELL) as answers:
        assert list(answers) == [("pope", 0)]
        answers["pope", 2] = given("no")
    assert f"1 lines of {path} are torn, edited or of another cell" in caplog.text
    caplog.clear()
    with Answers(path, Given, CELL) as answers:
        assert list(answers) == [("pope", 0), ("pope", 2)]
    assert not caplog.text


@pytest.mark.parametrize("wrong", ["not json", "[]", "{}", "null", '{"digest": "x"}'])
def test_an_edited_line_is_dropped_and_the_others_stay(path, wrong, caplog):
    fill(path, 0, 1, 2)
    lines = path.read_text().splitlines()
    edited = lines[1].replace("yes", "no") if wrong == "not json" else wrong
    path.write_text("\n".join([lines[0], edited, lines[2], wrong]) + "\n")
    assert list(Answers(path, Given, CELL)) == [("pope", 0), ("pope", 2)]
    assert "2 lines of" in caplog.text


def test_the_answers_of_other_processes_are_read_and_left_alone(path):
    other = path.with_name("other.jsonl")
    fill(other, 1)
    torn = other.read_bytes() + b'{"task": "pope", "doc'
    other.write_bytes(torn)
    fill(path, 0)
    with Answers(path, Given, CELL, [other, path]) as answers:
        assert set(answers) == {("pope", 0), ("pope", 1)}
        answers["pope", 2] = given("no")
    assert other.read_bytes() == torn
    assert len(path.read_text().splitlines()) == 2


def test_lines_of_another_cell_are_dropped(path, caplog):
    fill(path, 0, 1)
    assert len(Answers(path, Given, "digest of another cell")) == 0
    assert "torn, edited or of another cell" in caplog.text
