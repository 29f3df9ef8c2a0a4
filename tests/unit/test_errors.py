"""One line for people, and the exit code."""

import pytest

from spn4cir.errors import InputError, run_command


def test_input_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """An InputError becomes one line on stderr, no traceback, and exit code 2."""

    def main() -> None:
        raise InputError("mend this")

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: mend this\n"


def test_interrupt_is_code_130() -> None:
    """Ctrl-C ends with the code that shells expect."""

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == 130


def test_other_errors_are_not_caught() -> None:
    """A bug of ours keeps its traceback."""

    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)
