#!/usr/bin/env bash
# GPT 3.6B: 30 layers, hidden 3072, 32 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  3.562 billion; published: 3.6 billion, rounded
# layout      64 GPUs: tensor 2, data 32
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, bf16, sequence parallelism, distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/3.6b.sh
#     DRY_RUN=1 bash examples/gpt/3.6b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=64 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 30 --hidden-size 3072 --num-attention-heads 32 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --recompute-granularity full \
    --micro-batch-size 16 --global-batch-size 512 \
    --train-iters 286102 --lr-decay-iters 247955 \
    --lr 1.6e-4 --min-lr 1.6e-5 \
    "$@"
