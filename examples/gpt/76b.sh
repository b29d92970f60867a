#!/usr/bin/env bash
# GPT 76B: 60 layers, hidden 10240, 80 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  76.05 billion; published: 76.1 billion
# layout      1024 GPUs: tensor 8, pipeline 4 of 3 virtual stages each, data 32
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, layers of a virtual stage, bf16, sequence parallelism,
#             distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/76b.sh
#     DRY_RUN=1 bash examples/gpt/76b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=1024 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 60 --hidden-size 10240 --num-attention-heads 80 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5 \
    --recompute-granularity full \
    --micro-batch-size 2 --global-batch-size 1792 \
    --train-iters 81743 --lr-decay-iters 70844 \
    --lr 6e-5 --min-lr 6e-6 \
    "$@"
