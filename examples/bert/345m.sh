#!/usr/bin/env bash
# BERT 345M: 24 layers, hidden 1024, 16 heads.
#
# source      arXiv 1909.08053, table 4
# parameters  336.2 million; published: 336 million
# layout      64 GPUs: data 64
# hardware    published on V100 of 32 GB
# ours        layout; bf16, distributed optimizer
#
#     DATA=text_text_sentence VOCAB=vocab.txt bash examples/bert/345m.sh
#     DRY_RUN=1 bash examples/bert/345m.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

PROGRAM=pretrain_bert.py GPUS=64 VOCAB_SIZE=30522 launch "${BERT_RECIPE[@]}" \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 \
    --micro-batch-size 16 \
    "$@"
