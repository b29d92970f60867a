"""Pretrains T5: the spans that were cut out of a text are written down.

    python pretrain_t5.py --help

    torchrun --nproc-per-node 4 pretrain_t5.py \
        --tensor-model-parallel-size 2 \
        --pipeline-model-parallel-size 2 --pipeline-model-parallel-split-rank 1 \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 \
        --seq-length 128 --decoder-seq-length 64 --max-position-embeddings 128 \
        --micro-batch-size 8 --global-batch-size 32 --train-iters 1000 --lr 1e-3 \
        --data-path corpus_text_sentence --vocab-file vocab.txt
"""

from megatron.arguments import parse_command
from megatron.errors import run_command
from megatron.planner.command import pretrain_or_plan
from megatron.training import T5Pretraining


def main() -> int:
    """From the command line to trained weights, or to a plan of it."""
    command = parse_command(
        prog="pretrain_t5.py",
        description="Pretrain T5 on spans that were cut out.",
        defaults={
            "model_type": "t5",
            "tokenizer_type": "BertWordPieceLowerCase",
            "vocab_extra_ids": 100,
        },
        required=("data_path",),
    )
    return pretrain_or_plan(command, T5Pretraining)


if __name__ == "__main__":
    run_command(main)
