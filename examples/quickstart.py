"""From nothing to a BERT that stock `transformers` loads, on two cores, in a few minutes.

    make quickstart

1. Gather English text from this machine, learn a vocabulary, and make a dataset of it.
2. Train, with the model split over four processes: tensor parallelism 2, pipeline parallelism 2.
3. Export the model to Hugging Face's format.
4. Measure it on text it has not seen: as it was trained, as exported, and against a guess by token
   frequencies alone.

Everything is written to `quickstart/`. Started again, it goes on where it was interrupted;
`python examples/quickstart.py --clean` starts over.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from megatron.data import IndexedDataset, split_documents
from megatron.data.loader import Batch
from megatron.errors import UserError, run_command
from megatron.monitor import read_metrics
from megatron.training import BertPretraining, SampleCounts, Trainer, open_for_evaluation
from megatron.training.batches import evaluation_batches

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("quickstart")
CORPUS = WORK / "corpus.jsonl"
VOCABULARY = WORK / "tokenizer" / "vocab.txt"
DATASET = WORK / "bert_text_sentence"
CHECKPOINTS = WORK / "checkpoints"
METRICS = WORK / "metrics.jsonl"
EXPORT = WORK / "huggingface"
PICTURE = WORK / "loss.png"

HELD_OUT_SAMPLES = 1024
LARGEST_DIFFERENCE = 1e-3

MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.06
"""
TRAINING = """
    --train-iters 1500 --global-batch-size 64 --micro-batch-size 32
    --lr 2e-3 --lr-warmup-fraction 0.05 --adam-beta2 0.98
    --log-interval 20 --eval-interval 200 --eval-iters 8 --save-interval 500
"""


@dataclass(frozen=True)
class Step:
    """A command of the quickstart, and what exists once it has succeeded."""

    title: str
    command: str
    result: Path | None = None

    @property
    def words(self) -> list[str]:
        """The command with its continuation lines joined."""
        return shlex.split(self.command)


PREPARATION = (
    Step(
        "Gather English text from the documentation on this machine",
        f"python tools/make_corpus.py --output {CORPUS} --max-megabytes 12",
        CORPUS,
    ),
    Step(
        "Learn a vocabulary",
        f"python tools/train_tokenizer.py --type wordpiece --vocab-size 4096 "
        f"--input {CORPUS} --output {VOCABULARY.parent}",
        VOCABULARY,
    ),
    Step(
        "Turn the text into a dataset of tokens",
        f"python tools/preprocess_data.py --input {CORPUS} --output-prefix {WORK}/bert "
        f"--tokenizer-type BertWordPieceLowerCase --vocab-file {VOCABULARY} "
        f"--split-sentences --workers 2 --log-interval 2000",
        DATASET.with_suffix(".idx"),
    ),
)
TRAIN = Step(
    "Train on 4 processes: tensor parallelism 2, pipeline parallelism 2",
    f"python -m torch.distributed.run --standalone --nproc-per-node 4 pretrain_bert.py "
    f"--use-cpu --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
    f"{MODEL} {TRAINING} "
    f"--data-path {DATASET} --vocab-file {VOCABULARY} --split 90,5,5 --num-workers 0 "
    f"--save {CHECKPOINTS} --load {CHECKPOINTS} --metrics-file {METRICS}",
)
CONVERT = Step(
    "Export to Hugging Face's format",
    f"python tools/convert_checkpoint.py --from native --to hf "
    f"--load {CHECKPOINTS} --save {EXPORT}",
)


def main() -> None:
    """Does all the steps that are not done yet, and sums up."""
    parser = argparse.ArgumentParser(prog="quickstart.py", description=__doc__.split("\n")[0])
    parser.add_argument("--clean", action="store_true", help="delete what an earlier start made")
    clean = parser.parse_args().clean
    start = time.monotonic()
    os.chdir(ROOT)
    _open_folder(clean)
    for step in PREPARATION:
        if not (step.result and step.result.exists()):
            _run(step)
    _run(TRAIN)
    _run(CONVERT)
    losses = _measure()
    baseline = f"lm_loss={losses.frequencies:.4f}"
    _run(
        Step(
            "Draw the loss",
            f"python tools/plot_metrics.py {METRICS} --output {PICTURE} --baseline {baseline}",
        )
    )
    _sum_up(losses, time.monotonic() - start)


def _open_folder(clean: bool) -> None:
    """Keeps what the same commands have made before; what other commands made is deleted."""
    commands = "".join(f"{shlex.join(step.words)}\n" for step in (*PREPARATION, TRAIN, CONVERT))
    record = WORK / "commands.txt"
    if WORK.exists() and (clean or not record.exists() or record.read_text() != commands):
        print(f"starting over: deleting {WORK}/")
        shutil.rmtree(WORK)
    WORK.mkdir(exist_ok=True)
    record.write_text(commands)


def _run(step: Step) -> None:
    """Runs a command, whose output goes to the terminal; ends the quickstart where it fails."""
    words = step.words
    print(f"\n=== {step.title}\n$ {shlex.join(words)}\n", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, *words[1:]], env=environment)
    if finished.returncode:
        sys.exit(finished.returncode)


@dataclass(frozen=True)
class Losses:
    """Mean losses of masked tokens of unseen text, in nats."""

    native: float
    exported: float
    frequencies: float


def _measure() -> Losses:
    """Evaluates on the test split, which took no part in training, always on the same batches."""
    print("\n=== Measure on text that it has not seen\n", flush=True)
    trainer = open_for_evaluation(CHECKPOINTS, BertPretraining)
    counts = SampleCounts(train=0, validation=0, test=HELD_OUT_SAMPLES)
    datasets = trainer.task.datasets(trainer.config, counts, print)
    assert datasets.test is not None
    batches = list(evaluation_batches(trainer, datasets.test))
    return Losses(
        native=trainer.evaluate(batches)["lm_loss"],
        exported=_exported_loss(batches),
        frequencies=_frequency_loss(trainer, batches),
    )


@torch.no_grad()
def _exported_loss(batches: list[Batch]) -> float:
    """The loss by stock `transformers`, which knows nothing of this project."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.MegatronBertForPreTraining.from_pretrained(EXPORT).eval()
    total = masked = 0.0
    for batch in batches:
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"].long(),
            token_type_ids=batch["tokentype_ids"],
        )
        real = batch["masked_weights"] > 0
        samples = torch.arange(len(real))[:, None].expand_as(real)[real]
        logits = output.prediction_logits[samples, batch["masked_positions"][real]]
        total += F.cross_entropy(logits, batch["masked_labels"][real], reduction="sum").item()
        masked += int(real.sum())
    return total / masked


def _frequency_loss(trainer: Trainer, batches: list[Batch]) -> float:
    """The loss of guessing each masked token by how often it stands in the training text."""
    config = trainer.config
    dataset = IndexedDataset(DATASET)
    train, _, _ = split_documents(config.data.split, len(dataset.documents) - 1)
    sentences = range(dataset.documents[train.start], dataset.documents[train.stop])
    tokens = np.concatenate([dataset[i] for i in sentences])
    # One is added to every count: a token that was never seen is rare, not impossible.
    counts = torch.from_numpy(np.bincount(tokens, minlength=trainer.task.vocab_size) + 1)
    log_frequencies = (counts / counts.sum()).log()
    labels = torch.cat([batch["masked_labels"][batch["masked_weights"] > 0] for batch in batches])
    return -log_frequencies[labels].mean().item()


def _sum_up(losses: Losses, seconds: float) -> None:
    training = [r["lm_loss"] for r in read_metrics(METRICS) if "lm_loss" in r]
    difference = abs(losses.native - losses.exported)
    print(f"""
=== Done in {seconds / 60:.1f} minutes

loss of masked tokens (nats)
  training, first report         {training[0]:.4f}
  training, last report          {training[-1]:.4f}
  held out, token frequencies    {losses.frequencies:.4f}
  held out, as trained           {losses.native:.4f}
  held out, by transformers      {losses.exported:.4f}    differs by {difference:.1e}

picture of the loss    {PICTURE}
exported model         {EXPORT}
  transformers.MegatronBertForPreTraining.from_pretrained("{EXPORT}")
""")
    if difference > LARGEST_DIFFERENCE:
        raise UserError(f"the exported model's loss differs by more than {LARGEST_DIFFERENCE}")


if __name__ == "__main__":
    run_command(main)
