#!/usr/bin/env bash
# Llama 3 8B: 32 layers, hidden 4096, 32 heads in 8 groups.
#
# source      arXiv 2407.21783, table 3
# parameters  8.03 billion; published: 8 billion
# layout      64 GPUs: tensor 2, data 32
# hardware    published on H100 of 80 GB
# ours        layout and batch
#
#     DATA=text_text_document VOCAB=vocab.json MERGES=merges.txt bash examples/gpt/llama-8b.sh
#     DRY_RUN=1 bash examples/gpt/llama-8b.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_gpt.py GPUS=64 VOCAB_SIZE=128256 launch "${LLAMA_RECIPE[@]}" \
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 \
    --num-attention-heads 32 --num-query-groups 8 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --micro-batch-size 1 --lr 3e-4 --min-lr 3e-6 \
    "$@"
