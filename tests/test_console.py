"""What a command prints for a mistake, and its exit code."""

import pytest

from runtime.console import UserError, has_package, run_command


def leave(main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


def test_a_mistake_is_one_line_and_code_2(capsys):
    def main():
        raise UserError("data/x: no such folder; choose another")

    assert leave(main) == 2
    assert capsys.readouterr().err == "error: data/x: no such folder; choose another\n"


def test_a_path_that_cannot_be_used_is_one_line_and_code_2(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert leave(lambda: (tmp_path / "file" / "below").mkdir()) == 2
    assert "file/below: Not a directory" in capsys.readouterr().err


def test_codes_pass_through_and_defects_are_not_hidden():
    assert leave(lambda: None) == 0 and leave(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_a_folder_in_the_working_directory_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_log").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_package("json")
    assert not has_package("wandb_log")
    assert not has_package("no_such_package")
