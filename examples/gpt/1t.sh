#!/usr/bin/env bash
# GPT 1T: 128 layers, hidden 25600, 160 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  1008 billion; published: 1008 billion
# layout      3072 GPUs: tensor 8, pipeline 64 of 2 virtual stages each, data 6
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, layers of a virtual stage, bf16, sequence parallelism,
#             distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/1t.sh
#     DRY_RUN=1 bash examples/gpt/1t.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=3072 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 128 --hidden-size 25600 --num-attention-heads 160 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 64 --num-layers-per-virtual-pipeline-stage 1 \
    --recompute-granularity full \
    --micro-batch-size 1 --global-batch-size 3072 \
    --train-iters 47683 --lr-decay-iters 41325 \
    --lr 6e-5 --min-lr 6e-6 \
    "$@"
