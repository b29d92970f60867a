"""What stands on the console."""

import io

from megatron.monitor import console_line, open_console


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_names_every_quantity_that_matters() -> None:
    record = {
        "iteration": 20,
        "loss": 7.25,
        "lm_loss": 6.5,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "loss_scale": 1.0,
        "tokens_per_second": 12345.6,
        "model_tflops_per_second": 0.0317,
        "iteration_seconds": 0.25,
        "skipped": 0,
    }
    assert console_line(record, 1000) == (
        "iteration   20/1000 | loss 7.2500 | lm loss 6.5000 | grad norm 1.500 | lr 1.000e-03 | "
        "12,346 tokens/s | 31.7 GFLOP/s | 250.0 ms"
    )


def test_loss_scale_and_skipped_iterations_show_where_there_are_any() -> None:
    line = console_line({"iteration": 1, "loss": None, "loss_scale": 1024.0, "skipped": 2}, 1)
    assert line == "iteration 1/1 | loss nan | loss scale 1024 | skipped 2"


def test_a_pipe_gets_plain_lines_and_no_bar() -> None:
    stream = io.StringIO()
    console = open_console(10, stream=stream)
    console.print("[one]")
    console.advance(5)
    console.close()
    assert stream.getvalue() == "[one]\n"


def test_a_terminal_gets_the_lines_and_a_bar() -> None:
    stream = _Terminal()
    console = open_console(10, 2, stream=stream)
    console.print("[one]")
    console.advance(5)
    console.close()
    assert "[one]\n" in stream.getvalue().replace("\r", "")
    assert "5/10" in stream.getvalue().replace(" ", "")
