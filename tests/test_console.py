"""What a command prints for an error, and its exit code."""

import pytest

from runtime.console import UserError, has_package, run_command


def exit_code(main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


def test_a_user_error_prints_one_line_and_exits_with_2(capsys):
    def main():
        raise UserError("data/x: no such folder; choose another")

    assert exit_code(main) == 2
    assert capsys.readouterr().err == "error: data/x: no such folder; choose another\n"


def test_an_unusable_path_prints_one_line_and_exits_with_2(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert exit_code(lambda: (tmp_path / "file" / "below").mkdir()) == 2
    assert "file/below: Not a directory" in capsys.readouterr().err


def test_exit_codes_are_returned_and_bugs_keep_their_traceback():
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_a_folder_in_the_working_directory_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_log").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_package("json")
    assert not has_package("wandb_log")
    assert not has_package("no_such_package")
