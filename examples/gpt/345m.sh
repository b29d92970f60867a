#!/usr/bin/env bash
# GPT-2 345M: 24 layers, hidden 1024, 16 heads.
#
# source      arXiv 1909.08053, table 2
# parameters  354.8 million; published: 355 million
# layout      64 GPUs: data 64
# hardware    published on V100 of 32 GB
# ours        bf16, distributed optimizer; no recomputation, for GPUs of 80 GB
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/345m.sh
#     DRY_RUN=1 bash examples/gpt/345m.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=64 VOCAB_SIZE=50257 launch "${GPT2_RECIPE[@]}" \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 \
    --micro-batch-size 8 \
    "$@"
