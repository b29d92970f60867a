#!/usr/bin/env bash
# GPT 310B: 96 layers, hidden 16384, 128 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  310.1 billion; published: 310.1 billion
# layout      1920 GPUs: tensor 8, pipeline 16 of 2 virtual stages each, data 15
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, layers of a virtual stage, bf16, sequence parallelism,
#             distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/310b.sh
#     DRY_RUN=1 bash examples/gpt/310b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=1920 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 96 --hidden-size 16384 --num-attention-heads 128 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 16 --num-layers-per-virtual-pipeline-stage 3 \
    --recompute-granularity full \
    --micro-batch-size 1 --global-batch-size 2160 \
    --train-iters 67816 --lr-decay-iters 58774 \
    --lr 6e-5 --min-lr 6e-6 \
    "$@"
