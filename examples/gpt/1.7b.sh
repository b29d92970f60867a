#!/usr/bin/env bash
# GPT 1.7B: 24 layers, hidden 2304, 24 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  1.652 billion; published: 1.7 billion, rounded
# layout      32 GPUs: data 32
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, bf16, distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/1.7b.sh
#     DRY_RUN=1 bash examples/gpt/1.7b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=32 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 24 --hidden-size 2304 --num-attention-heads 24 \
    --recompute-granularity full \
    --micro-batch-size 16 --global-batch-size 512 \
    --train-iters 286102 --lr-decay-iters 247955 \
    --lr 2e-4 --min-lr 2e-5 \
    "$@"
