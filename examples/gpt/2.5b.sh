#!/usr/bin/env bash
# GPT-2 2.5B: 54 layers, hidden 1920, 20 heads.
#
# source      arXiv 1909.08053, table 1
# parameters  2.489 billion; published: 2.5 billion
# layout      128 GPUs: tensor 2, data 64
# hardware    published on V100 of 32 GB
# ours        bf16, distributed optimizer, sequence parallelism; no recomputation, for GPUs of 80 GB
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/2.5b.sh
#     DRY_RUN=1 bash examples/gpt/2.5b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=128 VOCAB_SIZE=50257 launch "${GPT2_RECIPE[@]}" \
    --num-layers 54 --hidden-size 1920 --num-attention-heads 20 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --micro-batch-size 8 \
    "$@"
