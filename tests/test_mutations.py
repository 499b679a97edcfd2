"Three hundred inputs that went wrong: every one is read right, or refused in one sentence"

import numpy as np
import pytest
from mutations import READERS, Input, Row, equal_to, judge, must_refuse, run, same

from ftcl.core import InputError
from ftcl.record import read_record

from test_runs import papermill


def test_what_goes_wrong_is_read_right_or_refused_in_one_sentence():
    rows = run(300, seed=0)
    assert [row.reader for row in rows] == list(READERS)
    assert sum(row.inputs for row in rows) == 300
    problems = [f"{row.reader}: {problem}" for row in rows for problem in row.problems]
    assert not problems, "\n".join(problems)
    for row in rows:
        assert row.right + row.one_sentence == row.inputs and row.right, row.reader


def test_the_notebook_counts_records_and_shows(tmp_path):
    run = papermill("reliability", tmp_path / "out", inputs=100, kills=1)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"faults.json", "faults.png"}
    told = read_record(tmp_path / "out" / "faults.json")
    counts = {name: n for name, n in told["metrics"].items() if not name.startswith("killed")}
    assert sum(counts.values()) == told["parameters"]["inputs"] == 100
    assert not any(n for name, n in counts.items() if name.endswith(": wrong"))
    killed = [n for name, n in told["metrics"].items() if name.startswith("killed")]
    assert sorted(killed) == [1, 1] and len(told["examples"]) == 5


def raising(error):
    def read(folder):
        raise error

    return read


def told_raw(text):
    "An error whose words nobody has made printable"
    error = InputError()
    error.args = (text,)
    return raising(error)


def leaving(folder):
    (folder / "left.part").write_bytes(b"")
    return 1


def grumbling(folder):
    np.float32(1) / np.zeros(1, np.float32)  # numpy warns
    return 1


@pytest.mark.parametrize(
    "read, told",
    [
        (raising(KeyError("a")), "KeyError"),
        (told_raw("it.json is wrong:\nmend it."), "several lines"),
        (told_raw("the file is wrong: mend it."), "names none of"),
        (told_raw("it.json is <object at 0x7f00aa>: mend it."), "inside of a program"),
        (told_raw("it.json\ud800 is wrong: mend it."), "cannot be printed"),
        (leaving, "a file was made"),
        (grumbling, "divide by zero"),
        (lambda folder: 2, "gives 2, not 1"),
    ],
)
def test_the_judge_finds_what_is_wrong(read, told):
    fits = equal_to(1)
    case = Input({"it.json": b"1"}, read, fits, ("it.json",))
    assert told in judge(case)[1]


def test_the_judge_counts_what_is_right():
    row = Row("numbers")
    row.add(*judge(Input({}, lambda folder: 1, lambda value, _: "", ())))
    row.add(*judge(Input({}, raising(InputError("n is 0, but must be 1.")), must_refuse, ("n",))))
    row.add(*judge(Input({}, lambda folder: 1, must_refuse, ())))
    assert (row.inputs, row.right, row.one_sentence, row.wrong) == (3, 1, 1, 1)
    assert row.messages == ["n is 0, but must be 1."]


def test_values_are_compared_with_their_types():
    assert same({"a": [1, float("nan")]}, {"a": [1, float("nan")]})
    assert not same(1, True) and not same({"a": 1}, {"a": 1.0}) and not same([1], [1, 2])
