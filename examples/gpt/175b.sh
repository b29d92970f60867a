#!/usr/bin/env bash
# GPT 175B: 96 layers, hidden 12288, 96 heads.
#
# source      arXiv 2205.05198, table 3
# parameters  174.6 billion; published: 175 billion
# layout      64 GPUs: tensor 8, pipeline 8 of 3 virtual stages each
# hardware    published on A100 of 80 GB
# ours        optimisation, bf16, sequence parallelism, distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/175b.sh
#     DRY_RUN=1 bash examples/gpt/175b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=64 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 8 --num-layers-per-virtual-pipeline-stage 4 \
    --recompute-granularity full \
    --micro-batch-size 1 --global-batch-size 64 \
    --train-iters 2288818 --lr-decay-iters 1983642 \
    --lr 6e-5 --min-lr 6e-6 \
    "$@"
