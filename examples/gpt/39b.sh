#!/usr/bin/env bash
# GPT 39B: 48 layers, hidden 8192, 64 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  39.1 billion; published: 39.1 billion
# layout      512 GPUs: tensor 8, pipeline 2 of 2 virtual stages each, data 32
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, layers of a virtual stage, bf16, sequence parallelism,
#             distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/39b.sh
#     DRY_RUN=1 bash examples/gpt/39b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=512 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 48 --hidden-size 8192 --num-attention-heads 64 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 12 \
    --recompute-granularity full \
    --micro-batch-size 4 --global-batch-size 1536 \
    --train-iters 95367 --lr-decay-iters 82651 \
    --lr 1e-4 --min-lr 1e-5 \
    "$@"
