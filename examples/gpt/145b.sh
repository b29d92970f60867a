#!/usr/bin/env bash
# GPT 145B: 80 layers, hidden 12288, 96 heads.
#
# source      arXiv 2104.04473, table 1
# parameters  145.6 billion; published: 145.6 billion
# layout      1536 GPUs: tensor 8, pipeline 8 of 2 virtual stages each, data 24
# hardware    published on A100 of 80 GB
# ours        optimisation, micro-batch, layers of a virtual stage, bf16, sequence parallelism,
#             distributed optimizer
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/145b.sh
#     DRY_RUN=1 bash examples/gpt/145b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=1536 VOCAB_SIZE=51200 launch "${GPT3_RECIPE[@]}" \
    --num-layers 80 --hidden-size 12288 --num-attention-heads 96 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 8 --num-layers-per-virtual-pipeline-stage 5 \
    --recompute-granularity full \
    --micro-batch-size 2 --global-batch-size 2304 \
    --train-iters 63578 --lr-decay-iters 55101 \
    --lr 6e-5 --min-lr 6e-6 \
    "$@"
