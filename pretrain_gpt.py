"""Pretrains GPT: each token is predicted from those before it.

    python pretrain_gpt.py --help

    torchrun --nproc-per-node 4 pretrain_gpt.py \
        --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 \
        --seq-length 256 --max-position-embeddings 256 \
        --micro-batch-size 8 --global-batch-size 32 --train-iters 1000 --lr 1e-3 \
        --data-path text_text_document --vocab-file vocab.json --merge-file merges.txt

With rotary positions, RMSNorm, a gated MLP and grouped queries it is a Llama, as in
examples/pretrain_gpt_llama.sh.
"""

from megatron.arguments import parse_command
from megatron.errors import run_command
from megatron.planner.command import pretrain_or_plan
from megatron.training import GPTPretraining


def main() -> int:
    """From the command line to trained weights, or to a plan of it."""
    command = parse_command(
        prog="pretrain_gpt.py",
        description="Pretrain GPT on the next token.",
        defaults={"model_type": "gpt", "tokenizer_type": "GPT2BPETokenizer"},
        required=("data_path",),
    )
    return pretrain_or_plan(command, GPTPretraining)


if __name__ == "__main__":
    run_command(main)
