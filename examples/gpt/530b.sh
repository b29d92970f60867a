#!/usr/bin/env bash
# GPT 530B: 105 layers, hidden 20480, 128 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  529.6 billion; published: 529.6 billion
# layout      2520 GPUs: tensor 8, pipeline 35 of 3 virtual stages each, data 9
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, layers of a virtual stage, bf16, sequence parallelism,
#             distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/530b.sh
#     DRY_RUN=1 bash examples/gpt/530b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=2520 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 105 --hidden-size 20480 --num-attention-heads 128 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 35 --num-layers-per-virtual-pipeline-stage 1 \
    --recompute-granularity full \
    --micro-batch-size 1 --global-batch-size 2520 \
    --train-iters 58128 --lr-decay-iters 50378 \
    --lr 6e-5 --min-lr 6e-6 \
    "$@"
