#!/usr/bin/env bash
# GPT 7.5B: 36 layers, hidden 4096, 32 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  7.468 billion; published: 7.5 billion
# layout      128 GPUs: tensor 4, data 32
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, bf16, sequence parallelism, distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/7.5b.sh
#     DRY_RUN=1 bash examples/gpt/7.5b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=128 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 36 --hidden-size 4096 --num-attention-heads 32 \
    --tensor-model-parallel-size 4 --sequence-parallel \
    --recompute-granularity full \
    --micro-batch-size 16 --global-batch-size 512 \
    --train-iters 286102 --lr-decay-iters 247955 \
    --lr 1.2e-4 --min-lr 1.2e-5 \
    "$@"
