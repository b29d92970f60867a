#!/usr/bin/env bash
# GPT 18B: 40 layers, hidden 6144, 48 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  18.45 billion; published: 18.4 billion
# layout      256 GPUs: tensor 8, data 32
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, bf16, sequence parallelism, distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/18b.sh
#     DRY_RUN=1 bash examples/gpt/18b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=256 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 40 --hidden-size 6144 --num-attention-heads 48 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --recompute-granularity full \
    --micro-batch-size 8 --global-batch-size 1024 \
    --train-iters 143051 --lr-decay-iters 123977 \
    --lr 1e-4 --min-lr 1e-5 \
    "$@"
