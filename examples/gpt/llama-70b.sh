#!/usr/bin/env bash
# Llama 3 70B: 80 layers, hidden 8192, 64 heads in 8 groups.
#
# source      arXiv 2407.21783, table 3
# parameters  70.55 billion; published: 70 billion
# layout      256 GPUs: tensor 8, pipeline 4 of 4 virtual stages each, data 8
# hardware    published on H100 of 80 GB
# ours        layout and batch
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/llama-70b.sh
#     DRY_RUN=1 bash examples/gpt/llama-70b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=256 VOCAB_SIZE=128256 launch "${LLAMA_RECIPE[@]}" \
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 \
    --num-attention-heads 64 --num-query-groups 8 \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5 \
    --micro-batch-size 1 --lr 1.5e-4 --min-lr 1.5e-6 \
    "$@"
