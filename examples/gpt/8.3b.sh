#!/usr/bin/env bash
# GPT-2 8.3B: 72 layers, hidden 3072, 32 heads.
#
# source      arXiv 1909.08053, table 1
# parameters  8.314 billion; published: 8.3 billion
# layout      512 GPUs: tensor 8, data 64
# hardware    published on V100 of 32 GB
# ours        bf16, distributed optimizer, sequence parallelism; no recomputation, for GPUs of 80 GB
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/8.3b.sh
#     DRY_RUN=1 bash examples/gpt/8.3b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=512 VOCAB_SIZE=50257 launch "${GPT2_RECIPE[@]}" \
    --num-layers 72 --hidden-size 3072 --num-attention-heads 32 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --micro-batch-size 8 \
    "$@"
