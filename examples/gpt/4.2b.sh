#!/usr/bin/env bash
# GPT-2 4.2B: 64 layers, hidden 2304, 24 heads.
#
# source      arXiv 1909.08053, table 1
# parameters  4.197 billion; published: 4.2 billion
# layout      256 GPUs: tensor 4, data 64
# hardware    published on V100 of 32 GB
# ours        bf16, distributed optimizer, sequence parallelism; no recomputation, for GPUs of 80 GB
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/4.2b.sh
#     DRY_RUN=1 bash examples/gpt/4.2b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=256 VOCAB_SIZE=50257 launch "${GPT2_RECIPE[@]}" \
    --num-layers 64 --hidden-size 2304 --num-attention-heads 24 \
    --tensor-model-parallel-size 4 --sequence-parallel \
    --micro-batch-size 8 \
    "$@"
