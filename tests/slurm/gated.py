"""Pretrains GPT as pretrain_gpt.py does, but waits at gates for a signal.

GATES holds a number for each start of the job: of the first rank's micro-batch that is a gate; 0
for none. There the rank makes the file GATE-restart and goes on when a signal has come.
"""

import os
import select
import signal
from pathlib import Path

from torch import Tensor

from megatron.arguments import parse_config
from megatron.errors import run_command
from megatron.training import GPTPretraining, pretrain
from megatron.training.initialize import own_rank
from megatron.training.task import Batch

RESTART = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
GATE = int(os.environ["GATES"].split()[RESTART]) if own_rank() == 0 else 0


class Gated(GPTPretraining):
    """Waits where the denominators of the gate's micro-batch are asked for."""

    counted = 0

    def denominators(self, batch: Batch) -> Tensor:
        self.counted += 1
        if self.counted == GATE:
            come, written = os.pipe()
            os.set_blocking(written, False)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            Path(f"{os.environ['GATE']}-{RESTART}").touch()
            select.select([come], [], [])
        return super().denominators(batch)


def main() -> None:
    defaults = {"model_type": "gpt", "tokenizer_type": "BertWordPieceLowerCase"}
    pretrain(parse_config(prog="gated.py", defaults=defaults), Gated)


if __name__ == "__main__":
    run_command(main)
