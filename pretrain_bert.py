"""Pretrains BERT: masked tokens and sentence pairs.

    python pretrain_bert.py --help

    torchrun --nproc-per-node 4 pretrain_bert.py \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 \
        --seq-length 128 --max-position-embeddings 128 \
        --micro-batch-size 16 --train-iters 1000 --lr 1e-3 \
        --data-path corpus_text_sentence --vocab-file vocab.txt
"""

from megatron.arguments import parse_command
from megatron.errors import run_command
from megatron.planner.command import pretrain_or_plan
from megatron.training import BertPretraining


def main() -> int:
    """From the command line to trained weights, or to a plan of it."""
    command = parse_command(
        prog="pretrain_bert.py",
        description="Pretrain BERT on masked tokens and sentence pairs.",
        defaults={"model_type": "bert", "tokenizer_type": "BertWordPieceLowerCase"},
        required=("data_path", "vocab_file"),
    )
    return pretrain_or_plan(command, BertPretraining)


if __name__ == "__main__":
    run_command(main)
