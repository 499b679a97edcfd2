"Recipes that are none: one sentence that names the file, and no code of a file is run"

import os

import pytest

from ftcl.core import InputError
from ftcl.launch import as_value, read_recipe, run_parameters

BAD = {
    "misspelt": ("epohcs: 1", "unknown parameter 'epohcs'. Did you mean 'epochs'?"),
    "list for a number": ("epochs: [1, 2]", "epochs is [1, 2], but must be a whole number."),
    "names for a number": ("epochs: {a: 1}", "epochs is {'a': 1}, but must be a whole number."),
    "list for text": ("method: [moco_v1]", "method is ['moco_v1'], but must be text"),
    "text for a number": ("epochs: '2'", "epochs is '2', but must be a whole number."),
    "fraction": ("epochs: 1.5", "epochs is 1.5, but must be a whole number."),
    "truth for a number": ("epochs: true", "epochs is True, but must be a whole number."),
    "truth for text": ("readouts: no", "readouts is False, but must be text"),
    "nothing": ("lr:", "lr is None, but must be a number"),
    "date": ("seed: 2001-01-01", "but must be a whole number."),
    "infinite": ("lr: .inf", "lr is inf, but must be from 0 to"),
    "no number": ("lr: .nan", "lr is nan, but must be from 0 to"),
    "circle": ("epochs: &a [*a]", "epochs is [[...]], but must be a whole number."),
    "several documents": ("epochs: 1\n---\nlr: 0.1\n", "expected a single document"),
    "twice": ("epochs: 1\nepochs: 2", "'epochs' stands twice"),
    "number as a name": ("1: 2", "'1' is a name, but no text to YAML: quote it"),
    "list as a name": ("? [a]\n: 1", "is a name, but no text to YAML"),
    "empty": ("", "is no recipe: it must hold parameters, each as name: value."),
    "text alone": ("epochs 1\n", "is no recipe: it must hold parameters"),
    "list alone": ("- epochs", "is no recipe: it must hold parameters"),
    "cut": ("epochs: [1", "cannot be read"),
    "tab": ("epochs: 1\n\tlr: 2", "cannot be read"),
    "null byte": ("epochs: 1\0", "cannot be read"),
    "deep": ("epochs: " + "[" * 3000 + "]" * 3000, "cannot be read"),
    "digits": ("epochs: " + "9" * 5000, "cannot be read"),
    "date that is none": ("seed: 2001-13-45", "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_recipe_that_is_none_is_one_sentence(tmp_path, case):
    text, said = BAD[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        run_parameters(str(file))
    told = str(caught.value)
    assert said in told and str(file) in told
    assert "\n" not in told and len(told) < 600


@pytest.mark.parametrize("coding", ["utf-16", "latin-1"])
def test_text_in_another_coding_is_refused(tmp_path, coding):
    file = tmp_path / "mine.yaml"
    file.write_bytes("name: é".encode(coding))
    with pytest.raises(InputError, match="mine.yaml cannot be read: 'utf-8' codec"):
        run_parameters(str(file))


def test_what_other_programs_write_is_read(tmp_path):
    file = tmp_path / "mine.yaml"
    for text in ("---\nepochs: 1\n...\n", "\ufeffepochs: 1", "epochs: 1\r\n", '{"epochs": 1}'):
        file.write_bytes(text.encode())
        assert read_recipe(str(file)) == dict(epochs=1)


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"])
def test_no_tag_of_a_recipe_is_called(tmp_path, tag):
    canary = tmp_path / "canary"
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: !!python/{tag} ['{canary}']")
    with pytest.raises(InputError, match="could not determine a constructor"):
        run_parameters(str(file))
    assert as_value(f"!!python/{tag} ['{canary}']").startswith("!!python")
    assert os.listdir(tmp_path) == ["mine.yaml"]


@pytest.mark.parametrize("text", ["2001-13-45", "!!timestamp x", "[" * 3000, "{", "&a", "a: b"])
def test_a_word_of_the_command_line_stays_a_word(text):
    assert as_value(text) == text


def test_a_name_that_looks_like_a_date_stays_text():
    assert run_parameters(given=[("name", "2001-13-45")]) == dict(name="2001-13-45")
    for text in ("9" * 5000, "!!timestamp x"):
        with pytest.raises(InputError, match="in the command line: seed is .*whole number"):
            run_parameters(given=[("seed", text)])
